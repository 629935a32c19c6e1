"""Pooling `mean`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from twotower.arrays.types import Float, Shaped
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.sum import SumLayer

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class Mean(Pooling):
    """Mean of the embeddings: their sum divided by their number n.

    Use it for lasting tastes and short histories."""

    kind = "mean"

    @property
    def decay_rates(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def length_exponent(self) -> float:
        return 1.0

    def build(self, width: int, name: str) -> MeanLayer:
        return MeanLayer(width)


class MeanLayer(SumLayer):
    def scaled(self, total: Float[Tensor, "U E"], n: Shaped[Tensor, "U"]) -> Float[Tensor, "U E"]:
        return total / n.clamp(min=1).to(total.dtype)[:, None]

    def lower_scaled(self, g: GraphBuilder, total: str, n: str) -> str:
        return g("Div", total, n)
