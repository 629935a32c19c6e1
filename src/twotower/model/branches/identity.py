"""Branch `identity`: the joined fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from twotower.arrays.types import Float
from twotower.model.branches.branch import Branch, BranchModule

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class IdentityBranch(Branch):
    """The joined fields, unchanged.

    Use it with branches of products, so that the layers read the fields too.
    """

    kind = "identity"

    def build(self, widths: list[int], pieces: list[int]) -> Identity:
        return Identity(sum(widths))


class Identity(BranchModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = width

    def forward(self, x: Float[Tensor, "U N"]) -> Float[Tensor, "U N"]:
        return x

    def lower(self, g: GraphBuilder, x: str) -> str:
        return x
