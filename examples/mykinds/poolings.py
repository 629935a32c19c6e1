"""A pooling of one's own: a mean whose weights by recency are learned.

`pooling = "mykinds.poolings:Recency"` in a feature of a config, or `Sequence(..., pooling=Recency(steps=4))` in Python.
`pool` is the maths, on rows padded to one length; `lower` writes the same as ONNX nodes, with the operators that are
declared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.model.pooling.pooling import Pooling, PoolingLayer, lower_known

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class Recency(Pooling):
    """Mean of the embeddings with a learned weight for each of the latest `steps` interactions, and one for all
    older."""

    needs_time_order = True
    operators = {"Where": ()}
    steps: int = Field(8, ge=1, description="Number of learned weights.")

    def build(self, width: int, name: str) -> RecencyLayer:
        return RecencyLayer(width, self.steps)


class RecencyLayer(PoolingLayer):
    """sum_n softmax(a)_n x_n over the interactions, a_n the learned score of the n-th latest."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.width, self.score = width, nn.Parameter(torch.linspace(0.0, -1.0, steps))

    def pool(self, rows: Tensor, known: Tensor) -> Tensor:
        age = (known.sum(1, keepdim=True) - known.cumsum(1)).clamp(0, len(self.score) - 1)
        weights = self.score[age].masked_fill(~known, -1e9).softmax(1) * known
        return (weights[:, None].to(rows.dtype) @ rows).flatten(1)

    def lower(self, g: GraphBuilder, table: str, codes: str) -> str:
        known = lower_known(g, codes)
        age = g("Sub", g.reduce("Sum", known, 1), g("CumSum", known, g.constant(1)))
        age = g("Min", g("Max", age, g.constant(0.0)), g.constant(len(self.score) - 1.0))
        scores = g("Gather", g.constant(self.score), g("Cast", age, to=g.onnx.TensorProto.INT64), axis=0)
        scores = g("Where", g("GreaterOrEqual", codes, g.constant(0)), scores, g.constant(-1e9))
        weights = g("Unsqueeze", g("Mul", g("Softmax", scores, axis=-1), known), g.constant([1]))
        return g.reshape(g("MatMul", weights, g("Gather", table, codes, axis=0)), self.width)
