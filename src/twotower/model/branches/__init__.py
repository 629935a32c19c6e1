"""Parallel branches of a tower: maps from the joined fields to vectors, which are concatenated. One file a kind."""

from twotower.kinds import Kinds
from twotower.model.branches.bilinear import BilinearBranch
from twotower.model.branches.branch import Branch
from twotower.model.branches.cin import CinBranch
from twotower.model.branches.cross import CrossBranch
from twotower.model.branches.fm import FmBranch
from twotower.model.branches.identity import IdentityBranch
from twotower.model.branches.mlp import MlpBranch

__all__ = [
    "BRANCHES", "BilinearBranch", "Branch", "CinBranch", "CrossBranch", "FmBranch", "IdentityBranch", "MlpBranch",
]  # fmt: skip

BRANCHES = Kinds("branch", Branch, MlpBranch, CrossBranch, FmBranch, CinBranch, BilinearBranch, IdentityBranch)
"""Kinds of branches, by their names in a config."""
