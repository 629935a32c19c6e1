"""Branch `cin`: feature maps of products of the fields."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.types import Float
from twotower.model.branches.branch import BranchModule, ProductBranch
from twotower.section import Positive

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class CinBranch(ProductBranch):
    """Compressed interaction network of xDeepFM: sums of feature maps over their width. Fields of one width only.

    X_k[h] = Σ_ij W_k[h, i, j] X_{k-1}[i] * X_0[j], X_0 the fields (Lian et al. 2018, equations 6 and 7, without
    activation).

    Use it where products of three and more fields matter.
    """

    kind = "cin"
    widths: tuple[Positive, ...] = Field((16, 16), min_length=1, description="Number of feature maps of each layer.")

    def product(self, n_fields: int, width: int) -> Cin:
        return Cin(n_fields, width, self)


class Cin(BranchModule):
    def __init__(self, n_fields: int, width: int, config: CinBranch) -> None:
        super().__init__()
        self.n_fields, self.width = n_fields, width
        before = [n_fields, *config.widths[:-1]]
        # Weights of variance 1 / (H F) keep the variance of a sum of H F products at that of one product.
        self.maps = nn.ParameterList(
            nn.Parameter(torch.randn(w, h * n_fields) / math.sqrt(h * n_fields))
            for h, w in zip(before, config.widths, strict=True)
        )
        self.size = sum(config.widths)
        self.norm_widths = config.widths  # the feature maps of one layer are products of one degree

    def forward(self, x: Float[Tensor, "U N"]) -> Float[Tensor, "U size"]:
        fields = x.view(len(x), self.n_fields, self.width).transpose(1, 2)  # (U, E, F): a map is one matrix product
        maps, out = fields, []
        for weight in self.maps:
            maps = nn.functional.linear((maps[:, :, :, None] * fields[:, :, None]).flatten(2), weight)  # (U, E, H)
            out.append(maps.sum(1))
        return torch.cat(out, 1)

    def lower(self, g: GraphBuilder, x: str) -> str:
        maps = fields = g.reshape(x, self.n_fields, self.width)
        out = []
        for weight in self.maps:
            pairs = g("Mul", g("Unsqueeze", maps, g.constant([2])), g("Unsqueeze", fields, g.constant([1])))
            maps = g("MatMul", g.constant(weight), g.reshape(pairs, weight.shape[1], self.width))
            out.append(g.reduce("Sum", maps, 2, keep=False))
        return g.concat(out)
