"""Pooling `power`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from twotower.arrays.types import Float, Shaped
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.sum import SumLayer

if TYPE_CHECKING:
    from torch import Tensor

    from twotower.onnx.builder import GraphBuilder


class Power(Pooling):
    """Sum of the embeddings divided by n^exponent, n their number: `sum` for 0, `sqrt` for 0.5, `mean` for 1.

    Use it with similarity = "dot" to set the weight of long texts or lists, as b does in BM25 (Robertson and Zaragoza
    2009, "The Probabilistic Relevance Framework", section 3.4).
    """

    kind = "power"

    exponent: float = Field(0.35, ge=0, le=1, description="Exponent of the number of embeddings. 0: their sum.")

    @property
    def length_exponent(self) -> float:
        return self.exponent

    def build(self, width: int, name: str) -> PowerLayer:
        return PowerLayer(width, self.exponent)


class PowerLayer(SumLayer):
    def __init__(self, width: int, exponent: float) -> None:
        super().__init__(width)
        self.exponent = exponent

    def scaled(self, total: Float[Tensor, "U E"], n: Shaped[Tensor, "U"]) -> Float[Tensor, "U E"]:
        return total / n.clamp(min=1).to(total.dtype).pow(self.exponent)[:, None]

    def lower_scaled(self, g: GraphBuilder, total: str, n: str) -> str:
        return g("Div", total, g("Pow", n, g.constant(self.exponent)))
