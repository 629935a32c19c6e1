"""Branch `identity`: the joined fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from twotower.arrays.types import Float
from twotower.model.branches.branch import Branch, BranchModule

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class IdentityBranch(Branch):
    """The joined fields, unchanged, beside the products of other branches.

    Use it so that the layers read the fields too, and not only their products.
    """

    kind = "identity"

    def build(self, widths: list[int], pieces: list[int]) -> Identity:
        """Return the identity."""
        return Identity(sum(widths))


class Identity(BranchModule):
    """Identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = width

    def forward(self, x: Float[Tensor, "U N"]) -> Float[Tensor, "U N"]:
        """Return the input."""
        return x

    def lower(self, g: GraphBuilder, x: str) -> str:
        """Return the input."""
        return x
