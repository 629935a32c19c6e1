"""Pooling `sum`, and the base of sums that are scaled by their number of terms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from twotower.arrays.types import Bool, Float, Int, Shaped
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import Prefixes
from twotower.model.pooling.decay import decayed_sums
from twotower.model.pooling.pooling import Pooling, PoolingLayer, lower_known

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class Sum(Pooling):
    """Sum of the embeddings.

    Use it if the number of codes matters too."""

    kind = "sum"

    @property
    def length_exponent(self) -> float:
        return 0.0

    def build(self, width: int, name: str) -> SumLayer:
        return SumLayer(width)


class SumLayer(PoolingLayer):
    """Sum of rows, scaled by their number n."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def scaled(self, total: Float[Tensor, "U E"], n: Shaped[Tensor, "U"]) -> Float[Tensor, "U E"]:
        """Return the scaled sums."""
        return total

    def lower_scaled(self, g: GraphBuilder, total: str, n: str) -> str:
        """Build `scaled`; n (U, 1) is float and at least 1."""
        return total

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
