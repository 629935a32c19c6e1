"""Branch `cross`: products of the joined fields with linear maps of themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.types import Float
from twotower.errors import ConfigError
from twotower.model.branches.branch import Branch, BranchModule
from twotower.model.lowering import lower

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class CrossBranch(Branch):
    """Cross layers x <- x0 * (W x + b) + x over the joined fields x0 (DCN-v2, Wang et al. 2021, equations 1 and 4).

    Use it where combinations of features matter, such as a genre for an age; with a `rank` where the fields are wide.
    """

    kind = "cross"
    depth: int = Field(2, ge=1, description="Number of cross layers.")
    rank: int = Field(0, ge=0, description="Rank of W as a product of two matrices. 0: one full matrix.")

    def build(self, widths: list[int], pieces: list[int]) -> Cross:
        """Return the layers. Raises ConfigError for a rank whose factors of W are larger than W."""
        if 2 * self.rank > sum(widths):
            raise ConfigError(
                f"rank = {self.rank} of a cross branch over {sum(widths)} joined numbers is larger than the full "
                f"matrix; give at most {sum(widths) // 2}, or 0 for the full matrix"
            )
        return Cross(sum(widths), self)


class Cross(BranchModule):
    def __init__(self, width: int, config: CrossBranch) -> None:
        super().__init__()
        r = config.rank
        self.layers = nn.ModuleList()
        for _ in range(config.depth):
            last = nn.Linear(r or width, width)
            # With biases of zero a layer starts as x0 * (W x) + x: the fields plus small products.
            nn.init.zeros_(last.bias)
            self.layers.append(nn.Sequential(nn.Linear(width, r, bias=False), last) if r else last)
        self.size = width

    def forward(self, x: Float[Tensor, "U N"]) -> Float[Tensor, "U N"]:
        first = x
        for layer in self.layers:
            x = torch.addcmul(x, first, layer(x))
        return x

    def lower(self, g: GraphBuilder, x: str) -> str:
        first = x
        for layer in self.layers:
            x = g("Add", x, g("Mul", first, lower(layer, g, x)))
        return x
