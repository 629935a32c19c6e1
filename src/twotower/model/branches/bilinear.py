"""Branch `bilinear`: products of every two fields through a matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.types import Float
from twotower.model.branches.branch import BranchModule, ProductBranch

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class BilinearBranch(ProductBranch):
    """(v_i W) * v_j for each pair of fields i < j (FiBiNET, Huang et al. 2019, section 3.3). Fields of one width only.

    Use it for few fields whose pairs have meanings of their own. Its width grows with the square of their number.
    """

    kind = "bilinear"
    matrices: Literal["all", "each", "interaction"] = Field(
        "interaction", description="Sharing of W. all: one. each: one per left field. interaction: one per pair."
    )

    def product(self, n_fields: int, width: int) -> Bilinear:
        return Bilinear(n_fields, width, self)


class Bilinear(BranchModule):
    def __init__(self, n_fields: int, width: int, config: BilinearBranch) -> None:
        super().__init__()
        self.n_fields, self.width, self.sharing = n_fields, width, config.matrices
        self.left_fields, self.right_fields = (
            list(i) for i in zip(*[(i, j) for i in range(n_fields) for j in range(i + 1, n_fields)], strict=True)
        )
        count = {"all": 1, "each": n_fields - 1, "interaction": len(self.left_fields)}[self.sharing]
        # Variance 1 / E: v W has the variance of v.
        self.matrices = nn.Parameter(torch.randn(count, width, width) / math.sqrt(width))
        self.size = len(self.left_fields) * width
        self.norm_widths = [self.size]

    def forward(self, x: Float[Tensor, "U N"]) -> Float[Tensor, "U size"]:
        """Return the concatenated products of the ½ F (F - 1) pairs."""
        fields = x.view(len(x), self.n_fields, self.width)
        weight = self.matrices.to(x.dtype)
        if self.sharing == "all":
            left = (fields @ weight[0])[:, self.left_fields]
        else:
            left = fields[:, :-1] if self.sharing == "each" else fields[:, self.left_fields]
            left = torch.einsum("ufe,feg->ufg", left, weight)
            left = left[:, self.left_fields] if self.sharing == "each" else left
        return (left * fields[:, self.right_fields]).flatten(1)

    def lower(self, g: GraphBuilder, x: str) -> str:
        fields = g.reshape(x, self.n_fields, self.width)
        first, second = (g("Gather", fields, g.constant(i), axis=1) for i in (self.left_fields, self.right_fields))
        weight = g.constant(self.matrices)
        if self.sharing != "interaction":
            indices = [0] * len(self.left_fields) if self.sharing == "all" else self.left_fields
            weight = g("Gather", weight, g.constant(indices), axis=0)
        by_pair = g("MatMul", g("Transpose", first, perm=[1, 0, 2]), weight)  # (pairs, U, E)
        return g.reshape(g("Mul", g("Transpose", by_pair, perm=[1, 0, 2]), second), self.size)
