"""Export of trained towers, one ONNX file per tower.

The graph is built node by node from the modules of the model: gathers, masked sums over padded rows and dense layers,
without loops and without paths. Of the other tower it holds only the rows that a shared sequence reads. Before a file
is written, its vectors are compared with those of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor, nn

import twotower
from twotower import files
from twotower.config.experiment import Branch
from twotower.data.batches import SideTensors
from twotower.data.dataset import Side
from twotower.data.feed import feed
from twotower.errors import ConfigError, RunError
from twotower.evaluation.evaluation import evaluation_mode
from twotower.features.encoders import Column, Field, Ints, Ragged
from twotower.features.schema import SideName
from twotower.model.attention import AttentionPool, HistoryEncoder, TransformerBlock, rotary_cos_sin
from twotower.model.branches import Bilinear, Cin, Cross, Fm, Mlp, TowerBranch
from twotower.model.embeddings import FieldEmbeddings
from twotower.model.layers import Dropout, SenetGate
from twotower.model.towers import Tower
from twotower.model.two_tower import FirstOrder, TwoTower
from twotower.onnx.graph import IR_VERSION, OPERATORS, OPSET
from twotower.onnx.tower import GATES_OUTPUT, VECTOR_OUTPUT, GateInfo, OnnxTower, trust_tower

MAX_TABLE_BYTES = (1 << 31) - (1 << 20)
"""Bytes of constants that fit one ONNX file: protobuf limits a message to 2 GiB."""
MAX_DIFFERENCE = 1e-4
"""Largest allowed difference between exported tower and model, relative to the largest number in the vectors."""
PARITY_ROWS = 512
"""Rows that `parity` compares."""

_TOWER_MODULES = {
    "embeddings",
    "senet",
    "field_dropout",
    "branches",
    "augmented",
    "layers",
    "last",
    "residual",
    "output_norm",
}
"""Modules of a tower that the exporter knows."""
_PARITY_BATCH = 64
"""Rows of one call of `parity`: a row is padded to the longest of its call."""


# ---- a graph -----------------------------------------------------------------------------------------------------


class _Graph:
    """Builder of an ONNX graph: nodes, constants and inputs with numbered names."""

    def __init__(self, max_table_bytes: int = MAX_TABLE_BYTES) -> None:
        try:
            import onnx
        except ImportError:
            raise ConfigError("exporting a tower needs onnx and onnxruntime: pip install onnx onnxruntime") from None
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.constants: list[Any] = []
        self.gates: dict[GateInfo, str] = {}  # each with the name of its weights (U, fields)
        self.size, self.max_table_bytes = 0, max_table_bytes
        self._known: dict[Any, str] = {}

    def input(self, name: str, kind: type[np.generic], shape: Sequence[str | int]) -> str:
        """Add an input of the graph and return its name."""
        elements = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, elements, shape))
        return name

    def constant(self, value: Tensor | npt.NDArray[Any] | Sequence[int] | int | float, key: Any = None) -> str:
        """Add a constant, once per `key`, and return its name. Small arrays are their own key; int64 or float32."""
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        if key is None and array.size <= 64:
            key = (array.dtype, array.shape, array.tobytes())
        if key is not None and key in self._known:
            return self._known[key]
        self.size += array.nbytes
        if self.size > self.max_table_bytes:
            raise RunError(
                f"the tables of the tower exceed the {self.max_table_bytes / 2**30:.1f} GiB of one ONNX file; "
                "reduce its vocabularies (min_count, hash_buckets) or the widths of its fields"
            )
        name = f"c{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(array.copy(order="C"), name))
        if key is not None:
            self._known[key] = name
        return name

    def __call__(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node and return the name of its output, or the list of names if `outputs` exceeds 1."""
        if not attributes.keys() <= OPERATORS[kind]:
            raise KeyError(f"{kind} {[*attributes]}: the operator or an attribute is not in onnx_graph.OPERATORS")
        names = [f"v{len(self.nodes)}"] if outputs == 1 else [f"v{len(self.nodes)}.{i}" for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape (U, …) to (U, *shape)."""
        return cast(str, self("Reshape", x, self.constant([0, *shape])))

    def reduce(self, kind: str, x: str, axis: int, keep: bool = True) -> str:
        """Reduce one axis by "Sum", "Mean", "Max" or "SumSquare"."""
        return cast(str, self(f"Reduce{kind}", x, self.constant([axis]), keepdims=int(keep)))

    def split(self, x: str, widths: Sequence[int]) -> list[str]:
        """Split (U, sum of `widths`) into one array per width."""
        if len(widths) == 1:
            return [x]
        return cast(list[str], self("Split", x, self.constant(list(widths)), axis=1, outputs=len(widths)))

    def concat(self, parts: Sequence[str]) -> str:
        """Concatenate arrays (U, n) along the second axis."""
        return parts[0] if len(parts) == 1 else self("Concat", *parts, axis=1)

    def filled(self, like: str, value: float) -> str:
        """Return an array of the shape of `like` filled with `value`."""
        number = self.onnx.numpy_helper.from_array(np.array([value], np.float32))
        return cast(str, self("ConstantOfShape", self("Shape", like), value=number))

    def serialize(self, output: str, width: int, metadata: dict[str, str]) -> bytes:
        """Return the ONNX file of the graph with output `output` (U, width) and, if there are gates, their weights."""
        helper = self.onnx.helper
        outputs = {VECTOR_OUTPUT: (output, width)}
        if self.gates:
            outputs[GATES_OUTPUT] = (
                self.concat(list(self.gates.values())),
                sum(len(gate.fields) for gate in self.gates),
            )
            metadata = metadata | {GATES_OUTPUT: json.dumps([asdict(gate) for gate in self.gates])}
        self.nodes += [helper.make_node("Identity", [value], [name]) for name, (value, _) in outputs.items()]
        shapes = [
            helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, ["U", size])
            for name, (_, size) in outputs.items()
        ]
        graph = helper.make_graph(self.nodes, "tower", self.inputs, shapes, self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
            producer_name="twotower", producer_version=twotower.__version__,
        )  # fmt: skip
        helper.set_model_props(model, metadata)
        return cast(bytes, model.SerializeToString())


# ---- the model's modules as nodes ----------------------------------------------------------------------------------


def _pooled(g: _Graph, table: str, codes: str, f: Field) -> str:
    """Build `embeddings.pool` over padded codes (U, T): (U, width), or (U, rates x width) for decay."""
    known = g("Cast", g("GreaterOrEqual", codes, g.constant(0)), to=g.onnx.TensorProto.FLOAT)
    n = g.reduce("Sum", known, 1)
    weights = g("Unsqueeze", known, g.constant([1]))  # (U, 1, T)
    if f.pooling == "decay":
        age = g("Unsqueeze", g("Sub", n, g("CumSum", known, g.constant(1))), g.constant([1]))
        # rate^age = exp(age log rate): the Pow of onnxruntime takes twenty times as long. e^-1000 is 0, as is rate 0.
        rates = g.constant(np.array([math.log(r) if r else -1000.0 for r in f.rates], np.float32)[:, None])
        weights = g("Mul", g("Exp", g("Mul", rates, age)), weights)  # (U, R, T)
        weights = g("Div", weights, g("Max", g.reduce("Sum", weights, 2), g.constant(1e-12)))
    rows = g("Gather", table, codes, axis=0)  # (U, T, width); -1 takes a row of weight 0
    total = g.reshape(g("MatMul", weights, rows), f.width * max(1, len(f.rates)))
    if f.pooling in ("sum", "decay"):
        return total
    n = g("Max", n, g.constant(1.0))
    return cast(str, g("Div", total, n if f.pooling == "mean" else g("Sqrt", n)))


def _keep_latest(g: _Graph, codes: str, n: str, limit: int) -> tuple[str, str]:
    """Build `attention.keep_latest`; n (U, 1) is float."""
    width = g("Squeeze", g("Shape", codes, start=1, end=2), g.constant([0]))
    offsets = g("Range", g.constant(0), g("Min", width, g.constant(limit)), g.constant(1))  # (min(T, limit),)
    first = g("Cast", g("Max", g("Sub", n, g.constant(float(limit))), g.constant(0.0)), to=g.onnx.TensorProto.INT64)
    return g("GatherElements", codes, g("Add", first, offsets), axis=1), g("Min", n, g.constant(float(limit)))


class _Queries(NamedTuple):
    """Queries of attention in each history: all items (Q = T) or the last one (Q = 1)."""

    rows: str  # rows of the queries in (U T, E); "" for all
    shape: str  # [U, Q]
    angles: list[str]  # cosines and sines of their positions, to be multiplied with (U, heads, Q, width)
    mask: str  # added to the scores (U, heads, Q, T): causal; "" if these queries are never used


def _encoded(g: _Graph, encoder: HistoryEncoder, table: str, codes: str) -> str:
    """Build `HistoryEncoder.forward` over padded codes (U, T): (U, width).

    Only the output at the last item is used, so the last block has one query per row.
    """
    n = g.reduce("Sum", g("Cast", g("GreaterOrEqual", codes, g.constant(0)), to=g.onnx.TensorProto.FLOAT), 1)
    codes, n = _keep_latest(g, codes, n, encoder.limit)
    rows = g("Gather", table, codes, axis=0)  # -1 takes a row that the mask hides
    x = _layer(g, encoder.input_norm, g("Flatten", rows, axis=2))  # (U T, E)
    every, last = _queries(g, encoder, codes, n)
    *before, block = encoder.blocks
    for b in before:
        x = _block(g, cast(TransformerBlock, b), x, every, every)
    if isinstance(block, TransformerBlock):
        x = _block(g, block, x, last, every)
    else:
        x = _attention_pool(g, cast(AttentionPool, block), x, last, every)
    return cast(str, g("Mul", _layer(g, encoder.norm, x), g("Min", n, g.constant(1.0))))


def _queries(g: _Graph, encoder: HistoryEncoder, codes: str, n: str) -> tuple[_Queries, _Queries]:
    """Return the queries of all items of the codes (U, T), and of the last of the n (U, 1) items of each row."""
    users, width = g("Shape", codes, end=1), g("Shape", codes, start=1)
    positions = g("Range", g.constant(0), g("Squeeze", width), g.constant(1))  # (T,)
    end = g("Max", g("Sub", n, g.constant(1.0)), g.constant(0.0))
    position = g("Cast", end, to=g.onnx.TensorProto.INT64)  # (U, 1)
    starts = g("Mul", g("Range", g.constant(0), g("Squeeze", users), g.constant(1)), width)  # (U,)
    index = g("Add", starts, g("Squeeze", position, g.constant([1])))

    cos, sin = rotary_cos_sin(encoder.limit, encoder.head_width)
    tables = [g.constant(torch.cat([cos, cos], 1)), g.constant(torch.cat([-sin, sin], 1))]
    scaled = g("Mul", g("Cast", positions, to=g.onnx.TensorProto.FLOAT), g.constant(1e9))

    def causal_mask(query_position: str) -> str:
        # Padding follows the codes of a row, so a causal mask hides it too.
        return cast(str, g("Min", g("Sub", query_position, scaled), g.constant(0.0)))

    every = _Queries(
        rows="",
        shape=g("Shape", codes),
        angles=[g("Slice", table, g.constant([0]), width) for table in tables],
        mask=causal_mask(g("Unsqueeze", scaled, g.constant([1]))) if len(encoder.blocks) > 1 else "",
    )
    last = _Queries(
        rows=index,
        shape=g("Concat", users, g.constant([1]), axis=0),
        angles=[g("Gather", table, g.reshape(position, 1, 1), axis=0) for table in tables],
        mask=causal_mask(g("Mul", g.reshape(end, 1, 1, 1), g.constant(1e9))),
    )
    return every, last


def _heads(g: _Graph, x: str, shape: str, heads: int, width: int) -> str:
    """Map (U T, heads x width) to (U, heads, T, width); `shape` is [U, T]."""
    x = g("Reshape", x, g("Concat", shape, g.constant([heads, width]), axis=0))
    return cast(str, g("Transpose", x, perm=[0, 2, 1, 3]))


def _rotated(g: _Graph, x: str, angles: list[str]) -> str:
    """Build `attention.apply_rotary`: (a, b) cos + (-b, a) sin; `angles` include the sign."""
    left, right = g("Split", x, axis=-1, num_outputs=2, outputs=2)
    cos, sin = angles
    return cast(str, g("Add", g("Mul", x, cos), g("Mul", g("Concat", right, left, axis=-1), sin)))


def _attended(g: _Graph, query: str, key: str, value: str, mask: str, width: int) -> str:
    """Build softmax(Q K^T / sqrt(width) + mask) V of queries (U, heads, Q, width) over T keys: (U Q, heads x width)."""
    scores = g("Mul", g("MatMul", query, g("Transpose", key, perm=[0, 1, 3, 2])), g.constant(width**-0.5))
    attended = g("MatMul", g("Softmax", g("Add", scores, mask), axis=-1), value)
    return cast(str, g("Flatten", g("Transpose", attended, perm=[0, 2, 1, 3]), axis=2))


def _block(g: _Graph, block: TransformerBlock, x: str, queries: _Queries, every: _Queries) -> str:
    """Build `TransformerBlock.forward` over (U T, E) at the queries: (U Q, E)."""
    heads, width = block.heads, block.out.in_features // block.heads
    normed = _layer(g, block.attend_norm, x)
    query_rows = normed
    if queries.rows:
        x, query_rows = (g("Gather", items, queries.rows, axis=0) for items in (x, normed))
    weights, biases = block.query_key_value.weight.chunk(3), block.query_key_value.bias.chunk(3)
    query = _heads(g, _linear(g, query_rows, weights[0], biases[0]), queries.shape, heads, width)
    key = _heads(g, _linear(g, normed, weights[1], biases[1]), every.shape, heads, width)
    value = _heads(g, _linear(g, normed, weights[2], biases[2]), every.shape, heads, width)
    query, key = _rotated(g, query, queries.angles), _rotated(g, key, every.angles)
    change = _layer(g, block.out, _attended(g, query, key, value, queries.mask, width))
    if block.attend_gate is not None:
        change = g("Mul", change, g("Sigmoid", _layer(g, block.attend_gate, x)))
    x = g("Add", x, change)
    inner = _layer(g, block.first, _layer(g, block.layer_norm, x))
    change = _layer(g, block.second, g("Mul", inner, g("Sigmoid", inner)))
    if block.layer_gate is not None:
        change = g("Mul", change, g("Sigmoid", _layer(g, block.layer_gate, x)))
    return cast(str, g("Add", x, change))


def _attention_pool(g: _Graph, pool: AttentionPool, x: str, queries: _Queries, every: _Queries) -> str:
    """Build `AttentionPool.forward` over (U T, E) at the queries: (U Q, E)."""
    heads, width = pool.heads, pool.out.in_features // pool.heads
    normed = _layer(g, pool.norm, x)
    weights, biases = pool.key_value.weight.chunk(2), pool.key_value.bias.chunk(2)
    key = _heads(g, _linear(g, normed, weights[0], biases[0]), every.shape, heads, width)
    value = _heads(g, _linear(g, normed, weights[1], biases[1]), every.shape, heads, width)
    query = _rotated(g, g.constant(pool.query[None]), queries.angles)  # (U, heads, Q, width)
    return _layer(g, pool.out, _attended(g, query, _rotated(g, key, every.angles), value, queries.mask, width))


def _fields(g: _Graph, own: FieldEmbeddings, other: FieldEmbeddings, names: dict[str, str], key: Any) -> str:
    """Build `FieldEmbeddings.forward`; `names` maps a field to its input."""
    parts = []
    for table, columns in own._lookup_groups:
        codes = "lookup" if columns is None else g("Gather", "lookup", g.constant(columns), axis=1)
        first = getattr(own, f"first_rows_{table}")
        weight = cast(Tensor, own.tables[table].weight)
        rows = g("Gather", g.constant(weight, (key, "own", table)), g("Add", codes, g.constant(first)), axis=0)
        parts.append(g.reshape(rows, len(first) * weight.shape[1]))
    for number, f in enumerate(own._other_fields):
        if f.kind == "dense":
            parts.append(_layer(g, own.projections[f"dense{number}"], names[f.name]))
            continue
        if f.share_with:
            table = g.constant(other.rows_of(f.share_with), (key, "other", f.share_with))
        else:
            table = g.constant(own.rows_of(f.name), (key, "bag", f.name))
        if f.limit:
            parts.append(_encoded(g, cast(HistoryEncoder, own.encoders[f"bag{number}"]), table, names[f.name]))
        else:
            parts.append(_pooled(g, table, names[f.name], f))
    return g.concat(parts)


def _linear(g: _Graph, x: str, weight: Tensor, bias: Tensor | None) -> str:
    """Build W x + b: (U, n) -> (U, m)."""
    return cast(str, g("Gemm", x, g.constant(weight), *([] if bias is None else [g.constant(bias)]), transB=1))


def _layer(g: _Graph, module: nn.Module, x: str) -> str:
    """Build a module of a tower's `layers`, a gate's `excite` or a projection: (U, n) -> (U, m).

    Raises RunError for a module of an unknown class.
    """
    if isinstance(module, nn.Sequential):
        for inner in module:
            x = _layer(g, inner, x)
        return x
    if isinstance(module, Dropout):
        return x
    if isinstance(module, nn.Linear):
        return _linear(g, x, module.weight, module.bias)
    if isinstance(module, nn.LayerNorm):
        weights = (g.constant(module.weight), g.constant(module.bias))
        return cast(str, g("LayerNormalization", x, *weights, axis=-1, epsilon=module.eps))
    if isinstance(module, nn.LeakyReLU):
        return cast(str, g("LeakyRelu", x, alpha=module.negative_slope))
    if isinstance(module, nn.GELU):
        half = g("Mul", x, g.constant(0.5))  # the pattern that onnxruntime fuses into one node
        return cast(str, g("Mul", half, g("Add", g("Erf", g("Div", x, g.constant(math.sqrt(2)))), g.constant(1.0))))
    if isinstance(module, nn.SiLU):
        return cast(str, g("Mul", x, g("Sigmoid", x)))
    simple = {nn.ReLU: "Relu", nn.Tanh: "Tanh", nn.Sigmoid: "Sigmoid"}
    if type(module) not in simple:
        raise RunError(f"a layer of kind {type(module).__name__} cannot be exported")
    return cast(str, g(simple[type(module)], x))


def _normalized(g: _Graph, joined: str, widths: list[int]) -> str:
    """Build `towers._normalize_pieces`."""

    def norm(x: str, width: int) -> str:
        ones = g.constant(np.ones(width, np.float32))
        return cast(str, g("LayerNormalization", x, ones, axis=-1, epsilon=1e-5))

    if len(set(widths)) == 1:
        return g.reshape(norm(g.reshape(joined, len(widths), widths[0]), widths[0]), sum(widths))
    return g.concat([norm(piece, w) for piece, w in zip(g.split(joined, widths), widths, strict=True)])


def _gated(g: _Graph, joined: str, gate: SenetGate, info: GateInfo) -> str:
    """Build `SenetGate.reweight`; the weights become the gate `info` of the graph."""
    squeeze = {"mean": "Mean", "sum": "Sum", "max": "Max"}[gate.squeeze]
    widths = gate.widths
    if len(set(widths)) == 1:
        fields = g.reshape(joined, len(widths), widths[0])
        gates = g.gates[info] = _layer(g, gate.excite, g.reduce(squeeze, fields, 2, keep=False))
        return g.reshape(g("Mul", fields, g.reshape(gates, len(widths), 1)), sum(widths))
    pieces = g.split(joined, widths)
    gates = g.gates[info] = _layer(g, gate.excite, g.concat([g.reduce(squeeze, p, 1) for p in pieces]))
    parts = g.split(gates, [1] * len(widths))
    return g.concat([g("Mul", p, w) for p, w in zip(pieces, parts, strict=True)])


def _products(g: _Graph, module: nn.Module, x: str) -> str:
    """Build `forward` of `Cross`, `Fm`, `Cin` or `Bilinear`."""
    if isinstance(module, Cross):
        first = x
        for layer in module.layers:
            x = g("Add", x, g("Mul", first, _layer(g, layer, x)))
        return x
    assert isinstance(module, Fm | Cin | Bilinear)
    fields = g.reshape(x, module.n_fields, module.width)
    if isinstance(module, Fm):
        before = g("CumSum", fields, g.constant(1), exclusive=1)
        return g.reduce("Sum", g("Mul", fields, before), 1, keep=False)
    if isinstance(module, Cin):
        maps, out = fields, []
        for weight in module.maps:
            products = g("Mul", g("Unsqueeze", maps, g.constant([2])), g("Unsqueeze", fields, g.constant([1])))
            maps = g("MatMul", g.constant(weight), g.reshape(products, weight.shape[1], module.width))
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


def _branch(g: _Graph, branch: TowerBranch, x: str, gate: GateInfo) -> str:
    """Build `TowerBranch.forward`."""
    if branch.senet is not None:
        x = _gated(g, x, branch.senet, gate)
    if isinstance(branch.module, Mlp):
        x = _layer(g, branch.module.layers, x)
    elif not isinstance(branch.module, nn.Identity):
        x = _products(g, branch.module, x)
    if not branch.norms:
        return x
    return g.concat([_layer(g, n, p) for n, p in zip(branch.norms, g.split(x, branch.norm_widths), strict=True)])


def _tower(
    g: _Graph, tower: Tower, other: Tower, names: dict[str, str], number: int, branches: Sequence[Branch]
) -> str:
    """Build `Tower.forward` of the pair with index `number`; `branches` are the settings of the tower's branches."""
    pair, fields = f"pair {number + 1}", tuple(tower.field_names)
    if unknown := {name for name, _ in tower.named_children()} - _TOWER_MODULES:
        raise RunError(
            f"a tower with the module '{min(unknown)}' cannot be exported; the model is newer than the exporter"
        )
    joined = _fields(g, tower.embeddings, other.embeddings, names, number)
    if tower.pieces:
        joined = _normalized(g, joined, tower.pieces)
    if tower.senet is not None:
        joined = _gated(g, joined, tower.senet, GateInfo(pair, fields))
    if tower.shift is not None:
        joined = g.reshape(joined, len(tower.field_names), len(tower.shift))
        joined = g("Add", g.reduce("Sum", joined, 1, keep=False), g.constant(tower.shift))
    parts = [
        _branch(g, cast(TowerBranch, branch), joined, GateInfo(f"{pair}, branch {i} ({config.kind})", fields))
        for i, (branch, config) in enumerate(zip(tower.branches, branches, strict=True), 1)
    ] or [joined]
    if tower.augmented is not None:
        codes = g("Gather", "lookup", g.constant([tower.augmented.column]), axis=1)
        rows = g("Gather", g.constant(tower.augmented.table.weight, (number, "augmented")), codes, axis=0)
        parts.append(g.reshape(rows, tower.augmented.width))
    out = _layer(g, tower.layers, g.concat(parts))
    if tower.residual is not None:
        out = g("Add", out, _layer(g, tower.residual, joined))
    if tower.last is None and tower.output_norm is None:
        return out
    vector, *bias = g.split(out, [tower.size - tower.extra, *([tower.extra] if tower.extra else [])])
    for module in (tower.last, tower.output_norm):
        vector = vector if module is None else _layer(g, module, vector)
    return g.concat([vector, *bias])


def _first_order(g: _Graph, linear: FirstOrder, like: str) -> str:
    """Build `FirstOrder.forward`: (U, 1), with the rows of `like` (U, D)."""
    if not len(linear.first_rows):
        return g.filled(g.reduce("Sum", like, 1), 0.0)
    codes = g("Add", "lookup", g.constant(linear.first_rows))
    return g.reduce("Sum", g("Gather", g.constant(linear.table.weight.flatten(), "linear"), codes, axis=0), 1)


def build_graph(
    model: TwoTower,
    side: SideName,
    fields: tuple[Field, ...],
    digest: str = "",
    max_table_bytes: int = MAX_TABLE_BYTES,
) -> bytes:
    """Return the ONNX file of one side's vectors. Raises RunError if its constants exceed `max_table_bytes`."""
    g = _Graph(max_table_bytes)
    g.input("lookup", np.int64, ["U", sum(f.kind == "lookup" for f in fields)])
    names = {}
    for number, f in enumerate(fields):
        if f.kind == "bag":
            names[f.name] = g.input(f"bag{number}", np.int64, ["U", f"T{number}"])
        elif f.kind == "dense":
            names[f.name] = g.input(f"dense{number}", np.float32, ["U", f.length])
    vectors, biases, width = [], [], 0
    for number, ((tower, other), pair) in enumerate(zip(model.towers(side), model.config.pairs, strict=True)):
        config = pair.user if side == "user" else pair.item
        out, size = _tower(g, tower, other, names, number, config.branches), tower.size
        if model.config.bias and tower.has_layers:
            size -= 1
            out, bias = g.split(out, [size, 1])
            biases.append(bias)
        vectors.append(out)
        width += size
    joined = g.concat(vectors)
    if model.config.similarity == "cosine":
        square = g("Max", g.reduce("SumSquare", joined, 1), g.constant(1e-12))
        joined = g("Div", joined, g("Sqrt", square))
    if side == "user":
        joined = g("Div", joined, g.constant(model.temperature.item()))
    if model.config.bias:
        bias = _first_order(g, model.user_bias if side == "user" else model.item_bias, joined)
        for tower_bias in biases:
            bias = g("Add", bias, tower_bias)
        if side == "user":
            bias = g("Add", bias, g.constant(model.global_bias))
        ones = g.filled(bias, 1.0)
        joined = g.concat([joined, bias, ones] if side == "user" else [joined, ones, bias])
        width += 2
    return g.serialize(joined, width, {"side": side} | ({"model": digest} if digest else {}))


# ---- export and parity ---------------------------------------------------------------------------------------------


def export_tower(
    model: TwoTower,
    side: SideName,
    fields: tuple[Field, ...],
    path: Path,
    rows: Side | None = None,
    digest: str = "",
    build: Callable[[TwoTower, SideName, tuple[Field, ...], str], bytes] = build_graph,
) -> float:
    """Write the tower of `side` as ONNX: inputs as `data.feed.feed` makes them, output "vector" (U, D), equal to
    `user_vectors` or `item_vectors` in evaluation mode. `fields` are those of the side, as `Encoders.fields` returns
    them.

    If the side has SENet gates, a second output "gates" (U, G) holds the concatenated weights of all gates, for each
    pair the tower's own gate before those of its branches. The metadata "gates" of the file lists them as JSON:
    [{"name": "pair 1" or "pair 2, branch 3 (fm)", "fields": [feature names in the order of the weights]}, …].

    Returns the `parity` with the model over random features and over `rows`, if given. `digest` of the model is written
    into the metadata; `build` makes the content of the file. Raises RunError, and writes nothing, if the parity exceeds
    1e-4, if the tables exceed one file, or if the content is refused by the allow-list of towers.
    """
    data = build(model, side, fields, digest)
    trust_tower(data, str(path))
    tower = OnnxTower(data)
    difference = max(parity(tower, model, side, s, fields) for s in (_random_side(fields), rows) if s is not None)
    if not difference <= MAX_DIFFERENCE:
        raise RunError(
            f"{path}: the exported {side} tower differs from the model by {difference:.1e} of the largest number in "
            f"the vectors, expected at most {MAX_DIFFERENCE:.0e}; the weights are not finite, or the model is newer than "
            "the exporter"
        )
    files.write(Path(path), data)
    return difference


def parity(tower: OnnxTower, model: TwoTower, side: SideName, dataset_side: Side, fields: tuple[Field, ...]) -> float:
    """Return the largest difference between exported tower and model, relative to the largest number in the vectors.

    Up to 512 rows of `dataset_side` are compared, among them those with the shortest and the longest bags. Infinity if
    shapes differ or a difference is not finite.
    """
    tensors = SideTensors(dataset_side, fields, model.log_temperature.device)
    largest, scale = 0.0, 0.0
    rows = _parity_rows(dataset_side, fields)
    vectors = model.user_vectors if side == "user" else model.item_vectors
    for start in range(0, len(rows), _PARITY_BATCH):
        block = rows[start : start + _PARITY_BATCH]
        with evaluation_mode(model):
            expected = vectors(tensors.take(block)).cpu().numpy()
        found = tower(feed(fields, dataset_side.columns, block))
        if found.shape != expected.shape:
            return math.inf
        difference = float(np.abs(found - expected).max(initial=0.0))
        if not math.isfinite(difference):
            return math.inf
        largest = max(largest, difference)
        scale = max(scale, float(np.abs(expected).max(initial=0.0)))
    return largest / scale if scale else largest


def _parity_rows(side: Side, fields: tuple[Field, ...]) -> Ints:
    """Return the rows with the fewest and the most codes of each bag field, and evenly spaced other rows."""
    extreme: list[int] = []
    for f in fields:
        if f.kind == "bag" and len(side):
            lengths = cast(Ragged, side.columns[f.name]).lengths
            extreme += [int(lengths.argmin()), int(lengths.argmax())]
    extreme = extreme[:PARITY_ROWS]
    others = np.linspace(0, len(side) - 1, min(len(side), PARITY_ROWS - len(extreme))).astype(np.int64)
    return np.unique(np.r_[np.array(extreme, np.int64), others])


def _random_side(fields: tuple[Field, ...], n: int = 96) -> Side:
    """Return `n` rows of random features: first and last code of every table, empty bags, bags of one code and long
    bags."""
    rng = np.random.default_rng(0)
    columns: dict[str, Column] = {}
    for f in fields:
        if f.kind == "dense":
            columns[f.name] = rng.standard_normal((n, f.length)).astype(np.float32)
        elif f.kind == "lookup":
            columns[f.name] = np.r_[0, f.rows - 1, rng.integers(0, f.rows, n - 2)].astype(np.int32)
        else:
            lengths = np.r_[0, 1, 300, rng.integers(0, 40, n - 3)]
            offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
            columns[f.name] = Ragged(rng.integers(0, f.rows, offsets[-1]).astype(np.int32), offsets)
    return Side(pl.DataFrame({"row": np.arange(n)}), columns, "row")
