"""Poolings `sum`, `sqrt`, `mean` and `power`: the sum of n embeddings divided by a power of n."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from twotower.arrays.types import Bool, Float, Int, Shaped
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import Prefixes
from twotower.model.pooling.decay import decayed_sums
from twotower.model.pooling.pooling import Pooling, PoolingLayer, lower_known

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class ScaledSum(Pooling):
    """Sum of n embeddings divided by n^p."""

    @property
    @abstractmethod
    def length_exponent(self) -> float:
        """The exponent p."""

    def build(self, width: int, name: str) -> SumLayer:
        return SumLayer(width, self.length_exponent)


class Sum(ScaledSum):
    """Sum of the embeddings.

    Use it if the number of codes matters too."""

    kind = "sum"

    @property
    def length_exponent(self) -> float:
        return 0.0


class Sqrt(ScaledSum):
    """Sum of n embeddings, divided by sqrt(n). The norm of the result grows slowly with n.

    Use it if a longer history should have a slightly larger vector.
    """

    kind = "sqrt"

    @property
    def length_exponent(self) -> float:
        return 0.5


class Mean(ScaledSum):
    """Mean of the embeddings: their sum divided by their number n.

    Use it for lasting tastes and short histories."""

    kind = "mean"

    @property
    def decay_rates(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def length_exponent(self) -> float:
        return 1.0


class Power(ScaledSum):
    """Sum of the embeddings divided by n^exponent, n their number: `sum` for 0, `sqrt` for 0.5, `mean` for 1.

    Use it with similarity = "dot" to set the weight of long texts or lists, as b does in BM25 (Robertson and Zaragoza
    2009, "The Probabilistic Relevance Framework", section 3.4).
    """

    kind = "power"

    exponent: float = Field(0.35, ge=0, le=1, description="Exponent of the number of embeddings. 0: their sum.")

    @property
    def length_exponent(self) -> float:
        return self.exponent


class SumLayer(PoolingLayer):
    """Sum of rows, divided by a power of their number n."""

    def __init__(self, width: int, exponent: float) -> None:
        super().__init__()
        self.width, self.exponent = width, exponent

    def scaled(self, total: Float[Tensor, "U E"], n: Shaped[Tensor, "U"]) -> Float[Tensor, "U E"]:
        """Return the scaled sums."""
        if not self.exponent:
            return total
        return total / n.clamp(min=1).to(total.dtype).pow(self.exponent)[:, None]

    def lower_scaled(self, g: GraphBuilder, total: str, n: str) -> str:
        """Build `scaled`; n (U, 1) is float and at least 1."""
        if not self.exponent:
            return total
        if self.exponent == 0.5:
            n = g("Sqrt", n)
        elif self.exponent != 1:
            n = g("Pow", n, g.constant(self.exponent))
        return g("Div", total, n)

    def pool(self, rows: Float[Tensor, "U T E"], known: Bool[Tensor, "U T"]) -> Float[Tensor, "U E"]:
        return self.scaled((known.to(rows.dtype)[:, None] @ rows).flatten(1), known.sum(1))

    def pool_bag(self, table: Float[Tensor, "rows E"], bag: Bag) -> Float[Tensor, "U E"]:
        total: Tensor = _BagSum.apply(table, bag)  # type: ignore[no-untyped-call]
        return self.scaled(total, bag.lengths)

    def pool_prefixes(self, table: Float[Tensor, "rows E"], prefixes: Prefixes) -> Float[Tensor, "U E"]:
        return self.scaled(decayed_sums(table, prefixes, (1.0,)), prefixes.length)

    def lower(self, g: GraphBuilder, table: str, codes: str) -> str:
        known = lower_known(g, codes)
        rows = g("Gather", table, codes, axis=0)  # (U, T, width); -1 reads a row of weight 0
        total = g.reshape(g("MatMul", g("Unsqueeze", known, g.constant([1])), rows), self.width)
        return self.lower_scaled(g, total, g("Max", g.reduce("Sum", known, 1), g.constant(1.0)))


class _BagSum(torch.autograd.Function):
    """Sum of table rows per bag. The backward pass is the same sum over the transposed bag: fast and deterministic."""

    @staticmethod
    def forward(ctx: BackwardCFunction, table: Float[Tensor, "rows E"], bag: Bag) -> Float[Tensor, "U E"]:
        ctx.save_for_backward(bag.rows_by_code, bag.code_offsets)
        return _bag_sum(table, bag.values, bag.offsets)

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Float[Tensor, "U E"]) -> tuple[Float[Tensor, "rows E"], None]:
        transposed: tuple[Tensor, ...] = ctx.saved_tensors
        return _bag_sum(grads[0].contiguous(), *transposed), None


def _bag_sum(
    table: Float[Tensor, "rows E"], values: Int[Tensor, "L"], offsets: Int[Tensor, "_"]
) -> Float[Tensor, "U E"]:
    return nn.functional.embedding_bag(values, table, offsets, mode="sum", include_last_offset=True)
