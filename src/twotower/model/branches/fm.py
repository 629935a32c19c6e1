"""Branch `fm`: the sum of the elementwise products of all pairs of fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from twotower.arrays.types import Float
from twotower.model.branches.branch import BranchModule, ProductBranch

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class FmBranch(ProductBranch):
    """Sum of the elementwise products v_i * v_j over all pairs of fields i < j.

    All fields need the same width, which is also the width of the output.

    This is the bi-interaction pooling ½((Σv)² - Σv²) of NFM (He and Chua 2017, equation 4).

    Use it as the cheapest branch that multiplies fields: it has no weights.
    """

    kind = "fm"

    def product(self, n_fields: int, width: int) -> Fm:
        return Fm(n_fields, width)


class Fm(BranchModule):
    def __init__(self, n_fields: int, width: int) -> None:
        super().__init__()
        self.n_fields, self.width, self.size = n_fields, width, width
        self.norm_widths = [width]

    def forward(self, x: Float[Tensor, "U N"]) -> Float[Tensor, "U E"]:
        fields = x.view(len(x), self.n_fields, self.width)
        # Multiply each field by the sum of the fields before it. The formula with squares subtracts two large numbers
        # and so loses digits.
        return (fields[:, 1:] * fields.cumsum(1)[:, :-1]).sum(1)

    def lower(self, g: GraphBuilder, x: str) -> str:
        fields = g.reshape(x, self.n_fields, self.width)
        before = g("CumSum", fields, g.constant(1), exclusive=1)
        return g.reduce("Sum", g("Mul", fields, before), 1, keep=False)
