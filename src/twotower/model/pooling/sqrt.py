"""Pooling `sqrt`: the sum of n embeddings, divided by sqrt(n)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from twotower.arrays.types import Float, Shaped
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.sum import SumLayer

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class Sqrt(Pooling):
    """Sum of n embeddings, divided by sqrt(n). The norm of the result grows slowly with n.

    Use it if a longer history should have a slightly larger vector.
    """

    kind = "sqrt"

    @property
    def length_exponent(self) -> float:
        return 0.5

    def build(self, width: int, name: str) -> SqrtLayer:
        return SqrtLayer(width)


class SqrtLayer(SumLayer):
    def scaled(self, total: Float[Tensor, "U E"], n: Shaped[Tensor, "U"]) -> Float[Tensor, "U E"]:
        return total / n.clamp(min=1).to(total.dtype).sqrt()[:, None]

    def lower_scaled(self, g: GraphBuilder, total: str, n: str) -> str:
        return g("Div", total, g("Sqrt", n))
