"""Layers, gates and branches of a tower as ONNX nodes."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor, nn

from twotower.errors import RunError
from twotower.model.branches import Bilinear, Cin, Cross, Fm, Mlp, TowerBranch
from twotower.model.layers import Dropout, SenetGate
from twotower.onnx.builder import GraphBuilder
from twotower.onnx.tower import GateInfo


def linear_nodes(g: GraphBuilder, x: str, weight: Tensor, bias: Tensor | None) -> str:
    """Build W x + b: (U, n) -> (U, m)."""
    return g("Gemm", x, g.constant(weight), *([] if bias is None else [g.constant(bias)]), transB=1)


def layer_nodes(g: GraphBuilder, module: nn.Module, x: str) -> str:
    """Build a module of a tower's `layers`, a gate's `excite` or a projection: (U, n) -> (U, m).

    Raises RunError for a module of an unknown class.
    """
    if isinstance(module, nn.Sequential):
        for inner in module:
            x = layer_nodes(g, inner, x)
        return x
    if isinstance(module, Dropout):
        return x
    if isinstance(module, nn.Linear):
        return linear_nodes(g, x, module.weight, module.bias)
    if isinstance(module, nn.LayerNorm):
        weights = (g.constant(module.weight), g.constant(module.bias))
        return g("LayerNormalization", x, *weights, axis=-1, epsilon=module.eps)
    if isinstance(module, nn.LeakyReLU):
        return g("LeakyRelu", x, alpha=module.negative_slope)
    if isinstance(module, nn.GELU):
        half = g("Mul", x, g.constant(0.5))  # the pattern that onnxruntime fuses into one node
        return g("Mul", half, g("Add", g("Erf", g("Div", x, g.constant(math.sqrt(2)))), g.constant(1.0)))
    if isinstance(module, nn.SiLU):
        return g("Mul", x, g("Sigmoid", x))
    simple = {nn.ReLU: "Relu", nn.Tanh: "Tanh", nn.Sigmoid: "Sigmoid"}
    if type(module) not in simple:
        raise RunError(f"a layer of kind {type(module).__name__} cannot be exported")
    return g(simple[type(module)], x)


def normalization_nodes(g: GraphBuilder, joined: str, widths: list[int]) -> str:
    """Build `layers.normalize_pieces`."""

    def norm(x: str, width: int) -> str:
        ones = g.constant(np.ones(width, np.float32))
        return g("LayerNormalization", x, ones, axis=-1, epsilon=1e-5)

    if len(set(widths)) == 1:
        return g.reshape(norm(g.reshape(joined, len(widths), widths[0]), widths[0]), sum(widths))
    return g.concat([norm(piece, w) for piece, w in zip(g.split(joined, widths), widths, strict=True)])


def gate_nodes(g: GraphBuilder, joined: str, gate: SenetGate, info: GateInfo) -> str:
    """Build `SenetGate.reweight`; the weights become the gate `info` of the graph."""
    squeeze = {"mean": "Mean", "sum": "Sum", "max": "Max"}[gate.squeeze]
    widths = gate.widths
    if len(set(widths)) == 1:
        fields = g.reshape(joined, len(widths), widths[0])
        gates = g.gates[info] = layer_nodes(g, gate.excite, g.reduce(squeeze, fields, 2, keep=False))
        return g.reshape(g("Mul", fields, g.reshape(gates, len(widths), 1)), sum(widths))
    pieces = g.split(joined, widths)
    gates = g.gates[info] = layer_nodes(g, gate.excite, g.concat([g.reduce(squeeze, p, 1) for p in pieces]))
    parts = g.split(gates, [1] * len(widths))
    return g.concat([g("Mul", p, w) for p, w in zip(pieces, parts, strict=True)])


def product_nodes(g: GraphBuilder, module: nn.Module, x: str) -> str:
    """Build `forward` of `Cross`, `Fm`, `Cin` or `Bilinear`."""
    if isinstance(module, Cross):
        first = x
        for layer in module.layers:
            x = g("Add", x, g("Mul", first, layer_nodes(g, layer, x)))
        return x
    assert isinstance(module, Fm | Cin | Bilinear)
    fields = g.reshape(x, module.n_fields, module.width)
    if isinstance(module, Fm):
        before = g("CumSum", fields, g.constant(1), exclusive=1)
        return g.reduce("Sum", g("Mul", fields, before), 1, keep=False)
    if isinstance(module, Cin):
        maps, out = fields, []
        for weight in module.maps:
            pairs = g("Mul", g("Unsqueeze", maps, g.constant([2])), g("Unsqueeze", fields, g.constant([1])))
            maps = g("MatMul", g.constant(weight), g.reshape(pairs, weight.shape[1], module.width))
            out.append(g.reduce("Sum", maps, 2, keep=False))
        return g.concat(out)
    first, second = (g("Gather", fields, g.constant(i), axis=1) for i in (module.left_fields, module.right_fields))
    if module.sharing == "interaction":
        weight = g.constant(module.matrices)
    else:
        indices = [0] * len(module.left_fields) if module.sharing == "all" else module.left_fields
        weight = g("Gather", g.constant(module.matrices), g.constant(indices), axis=0)
    by_pair = g("MatMul", g("Transpose", first, perm=[1, 0, 2]), weight)  # (pairs, U, E)
    return g.reshape(g("Mul", g("Transpose", by_pair, perm=[1, 0, 2]), second), module.size)


def branch_nodes(g: GraphBuilder, branch: TowerBranch, x: str, gate: GateInfo) -> str:
    """Build `TowerBranch.forward`."""
    if branch.senet is not None:
        x = gate_nodes(g, x, branch.senet, gate)
    if isinstance(branch.module, Mlp):
        x = layer_nodes(g, branch.module.layers, x)
    elif not isinstance(branch.module, nn.Identity):
        x = product_nodes(g, branch.module, x)
    if not branch.norms:
        return x
    return g.concat([layer_nodes(g, n, p) for n, p in zip(branch.norms, g.split(x, branch.norm_widths), strict=True)])
