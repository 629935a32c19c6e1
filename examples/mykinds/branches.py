"""A branch of one's own: layers with gates that a bottleneck computes from the fields.

    [[model.pairs]]
    user.branches = [{ kind = "mykinds.branches:MaskBranch", width = 32 }, { kind = "identity" }]

Its module maps the joined fields to a vector and builds the same as ONNX nodes, so that a published model is served
without this file: it writes operators that every tower may hold. A branch that writes others names them in `operators`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.types import Float
from twotower.model.branches.branch import Branch, BranchModule
from twotower.model.lowering import lower

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class MaskBranch(Branch):
    """Instance-guided mask: relu(LayerNorm(W (mask * x))), mask = V relu(U x) (MaskNet, Wang et al. 2021, sec. 3.2)."""

    width: int = Field(32, ge=1, description="Width of the output.")
    reduction: float = Field(2.0, gt=0, description="Width of the mask's hidden layer, divided by that of the fields.")

    def build(self, widths: list[int], pieces: list[int]) -> Mask:
        """Return the block."""
        return Mask(sum(widths), self)


class Mask(BranchModule):
    """Instance-guided mask block."""

    def __init__(self, joined: int, config: MaskBranch) -> None:
        super().__init__()
        hidden, self.size = max(1, round(joined * config.reduction)), config.width
        self.mask = nn.Sequential(nn.Linear(joined, hidden), nn.ReLU(), nn.Linear(hidden, joined))
        self.block = nn.Sequential(nn.Linear(joined, self.size), nn.LayerNorm(self.size, eps=1e-10), nn.ReLU())

    def forward(self, x: Float[Tensor, "U N"]) -> Float[Tensor, "U size"]:
        """Return the masked fields through the layer."""
        out: Tensor = self.block(self.mask(x) * x)
        return out

    def lower(self, g: GraphBuilder, x: str) -> str:
        """Build `forward`."""
        return lower(self.block, g, g("Mul", lower(self.mask, g, x), x))
