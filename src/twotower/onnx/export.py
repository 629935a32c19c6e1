"""Export of trained towers, one ONNX file per tower.

The graph is built node by node from the modules of the model: gathers, masked sums over padded rows and dense layers,
without loops and without paths. Of the other tower it holds only the rows that a shared sequence reads. Before a file
is written, its vectors are compared with those of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from torch import Tensor

from twotower import files
from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Ints
from twotower.data.dataset import Side
from twotower.errors import RunError
from twotower.features.field import InputField
from twotower.features.schema import SideName
from twotower.model.attention import HistoryEncoder
from twotower.model.branches import Branch, TowerBranch
from twotower.model.embeddings import FieldEmbeddings
from twotower.model.inputs.feed import feed
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.towers import Tower
from twotower.model.two_tower import FirstOrder, TwoTower, evaluation_mode
from twotower.onnx.builder import MAX_TABLE_BYTES, GraphBuilder
from twotower.onnx.layers import branch_nodes, gated, layer_nodes, normalized
from twotower.onnx.pooling import encoded, pooled
from twotower.onnx.tower import GateInfo, OnnxTower, trust_tower

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


# ---- the model's modules as nodes ----------------------------------------------------------------------------------


def _fields(g: GraphBuilder, own: FieldEmbeddings, other: FieldEmbeddings, names: dict[str, str], key: Any) -> str:
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
            parts.append(layer_nodes(g, own.projections[f"dense{number}"], names[f.name]))
            continue
        if f.share_with:
            table = g.constant(other.rows_of(f.share_with), (key, "other", f.share_with))
        else:
            table = g.constant(own.rows_of(f.name), (key, "bag", f.name))
        if f.limit:
            parts.append(encoded(g, cast(HistoryEncoder, own.encoders[f"bag{number}"]), table, names[f.name]))
        else:
            parts.append(pooled(g, table, names[f.name], f))
    return g.concat(parts)


def _tower(
    g: GraphBuilder, tower: Tower, other: Tower, names: dict[str, str], number: int, branches: Sequence[Branch]
) -> str:
    """Build `Tower.forward` of the pair with index `number`; `branches` are the settings of the tower's branches."""
    pair, fields = f"pair {number + 1}", tuple(tower.field_names)
    if unknown := {name for name, _ in tower.named_children()} - _TOWER_MODULES:
        raise RunError(
            f"a tower with the module '{min(unknown)}' cannot be exported; the model is newer than the exporter"
        )
    joined = _fields(g, tower.embeddings, other.embeddings, names, number)
    if tower.pieces:
        joined = normalized(g, joined, tower.pieces)
    if tower.senet is not None:
        joined = gated(g, joined, tower.senet, GateInfo(pair, fields))
    if tower.shift is not None:
        joined = g.reshape(joined, len(tower.field_names), len(tower.shift))
        joined = g("Add", g.reduce("Sum", joined, 1, keep=False), g.constant(tower.shift))
    parts = [
        branch_nodes(g, cast(TowerBranch, branch), joined, GateInfo(f"{pair}, branch {i} ({config.kind})", fields))
        for i, (branch, config) in enumerate(zip(tower.branches, branches, strict=True), 1)
    ] or [joined]
    if tower.augmented is not None:
        codes = g("Gather", "lookup", g.constant([tower.augmented.column]), axis=1)
        rows = g("Gather", g.constant(tower.augmented.table.weight, (number, "augmented")), codes, axis=0)
        parts.append(g.reshape(rows, tower.augmented.width))
    out = layer_nodes(g, tower.layers, g.concat(parts))
    if tower.residual is not None:
        out = g("Add", out, layer_nodes(g, tower.residual, joined))
    if tower.last is None and tower.output_norm is None:
        return out
    vector, *bias = g.split(out, [tower.size - tower.extra, *([tower.extra] if tower.extra else [])])
    for module in (tower.last, tower.output_norm):
        vector = vector if module is None else layer_nodes(g, module, vector)
    return g.concat([vector, *bias])


def _first_order(g: GraphBuilder, linear: FirstOrder, like: str) -> str:
    """Build `FirstOrder.forward`: (U, 1), with the rows of `like` (U, D)."""
    if not len(linear.first_rows):
        return g.filled(g.reduce("Sum", like, 1), 0.0)
    codes = g("Add", "lookup", g.constant(linear.first_rows))
    return g.reduce("Sum", g("Gather", g.constant(linear.table.weight.flatten(), "linear"), codes, axis=0), 1)


def build_graph(
    model: TwoTower,
    side: SideName,
    fields: tuple[InputField, ...],
    digest: str = "",
    max_table_bytes: int = MAX_TABLE_BYTES,
) -> bytes:
    """Return the ONNX file of one side's vectors. Raises RunError if its constants exceed `max_table_bytes`."""
    g = GraphBuilder(max_table_bytes)
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
    fields: tuple[InputField, ...],
    path: Path,
    rows: Side | None = None,
    digest: str = "",
    build: Callable[[TwoTower, SideName, tuple[InputField, ...], str], bytes] = build_graph,
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


def parity(
    tower: OnnxTower, model: TwoTower, side: SideName, dataset_side: Side, fields: tuple[InputField, ...]
) -> float:
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


def _parity_rows(side: Side, fields: tuple[InputField, ...]) -> Ints:
    """Return the rows with the fewest and the most codes of each bag field, and evenly spaced other rows."""
    extreme: list[int] = []
    for f in fields:
        if f.kind == "bag" and len(side):
            lengths = cast(Ragged, side.columns[f.name]).lengths
            extreme += [int(lengths.argmin()), int(lengths.argmax())]
    extreme = extreme[:PARITY_ROWS]
    others = np.linspace(0, len(side) - 1, min(len(side), PARITY_ROWS - len(extreme))).astype(np.int64)
    return np.unique(np.r_[np.array(extreme, np.int64), others])


def _random_side(fields: tuple[InputField, ...], n: int = 96) -> Side:
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
