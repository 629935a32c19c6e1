"""Pooling `sqrt`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from twotower.arrays.types import Float, Shaped
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.sum import SumLayer

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class Sqrt(Pooling):
    """Sum of the embeddings divided by sqrt(n): the length of the vector grows slowly with their number n.

    Use it if a longer history should count a little more.
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
