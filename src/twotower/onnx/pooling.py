"""Poolings of padded codes as ONNX nodes."""

from __future__ import annotations

import math

import numpy as np

from twotower.features.field import InputField
from twotower.model.pooling.decay import Decay
from twotower.model.pooling.pooling import Pooling
from twotower.onnx.builder import GraphBuilder


def pooling_nodes(g: GraphBuilder, table: str, codes: str, f: InputField, pooling: Pooling) -> str:
    """Build `embeddings.pool` over padded codes (U, T): (U, width), or (U, rates x width) for decay."""
    known = g("Cast", g("GreaterOrEqual", codes, g.constant(0)), to=g.onnx.TensorProto.FLOAT)
    n = g.reduce("Sum", known, 1)
    weights = g("Unsqueeze", known, g.constant([1]))  # (U, 1, T)
    if isinstance(pooling, Decay):
        age = g("Unsqueeze", g("Sub", n, g("CumSum", known, g.constant(1))), g.constant([1]))
        # rate^age = exp(age log rate): the Pow of onnxruntime takes twenty times as long. e^-1000 is 0, as is rate 0.
        rates = g.constant(np.array([math.log(r) if r else -1000.0 for r in pooling.rates], np.float32)[:, None])
        weights = g("Mul", g("Exp", g("Mul", rates, age)), weights)  # (U, R, T)
        weights = g("Div", weights, g("Max", g.reduce("Sum", weights, 2), g.constant(1e-12)))
    rows = g("Gather", table, codes, axis=0)  # (U, T, width); -1 takes a row of weight 0
    total = g.reshape(g("MatMul", weights, rows), f.width * pooling.pieces)
    if pooling.kind in ("sum", "decay"):
        return total
    n = g("Max", n, g.constant(1.0))
    return g("Div", total, n if pooling.kind == "mean" else g("Sqrt", n))
