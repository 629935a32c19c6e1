"""Branch `fm`: the sum of the products of every two fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from twotower.arrays.types import Float
from twotower.model.branches.branch import BranchModule, ProductBranch

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class FmBranch(ProductBranch):
    """½((Σv)² - Σv²) over the fields, the sum of v_i * v_j over all i < j: a vector of their width (bi-interaction pooling,
    NFM, He and Chua 2017, equation 4). Fields of one width only.

    Use it as the cheapest branch of products: it has no weights.
    """

    kind = "fm"

    def product(self, n_fields: int, width: int) -> Fm:
        """Return the sum of products."""
        return Fm(n_fields, width)


class Fm(BranchModule):
    """Bi-interaction pooling."""

    def __init__(self, n_fields: int, width: int) -> None:
        super().__init__()
        self.n_fields, self.width, self.size = n_fields, width, width
        self.norm_widths = [width]

    def forward(self, x: Float[Tensor, "U N"]) -> Float[Tensor, "U E"]:
        """Return the sum of the products."""
        fields = x.view(len(x), self.n_fields, self.width)
        # Each field times the sum of the fields before it: the difference of squares cancels digits.
        return (fields[:, 1:] * fields.cumsum(1)[:, :-1]).sum(1)

    def lower(self, g: GraphBuilder, x: str) -> str:
        """Build `forward`."""
        fields = g.reshape(x, self.n_fields, self.width)
        before = g("CumSum", fields, g.constant(1), exclusive=1)
        return g.reduce("Sum", g("Mul", fields, before), 1, keep=False)
