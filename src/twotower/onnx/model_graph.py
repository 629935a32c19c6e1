"""The graph of one side's vectors, built node by node from the modules of a model."""

from __future__ import annotations

import numpy as np

from twotower.errors import RunError
from twotower.features.field import InputField
from twotower.features.side import SideName
from twotower.model.branches.branch import TowerBranch
from twotower.model.layers import lower_normalized_pieces
from twotower.model.lowering import lower
from twotower.model.towers import Tower
from twotower.model.two_tower import FirstOrder, TwoTower
from twotower.onnx.builder import MAX_TABLE_BYTES, GraphBuilder

_TOWER_MODULES = {"embeddings", "senet", "field_dropout", "branches", "augmented", "layers", "head"}
"""Modules of a tower that the exporter knows."""


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
    vectors, biases = [], []
    for number, tower in enumerate(model.towers(side)):
        vector, tower_bias = _tower(g, tower, names, number)
        vectors.append(vector)
        biases += [tower_bias] if tower_bias else []
    joined, width = g.concat(vectors), sum(tower.size for tower in model.towers(side))
    if model.config.similarity == "cosine":
        square = g("Max", g.reduce("SumSquare", joined, 1), g.constant(1e-12))
        joined = g("Div", joined, g("Sqrt", square))
    if side == "user":
        joined = g("Div", joined, g.constant(model.temperature.item()))
    if model.config.bias:
        bias = _first_order(g, model.first_order(side), joined)
        for tower_bias in biases:
            bias = g("Add", bias, tower_bias)
        if side == "user":
            bias = g("Add", bias, g.constant(model.global_bias))
        ones = g.filled(bias, 1.0)
        joined = g.concat([joined, bias, ones] if side == "user" else [joined, ones, bias])
        width += 2
    return g.serialize(joined, width, {"side": side} | ({"model": digest} if digest else {}))


def _tower(g: GraphBuilder, tower: Tower, names: dict[str, str], number: int) -> tuple[str, str]:
    """Build `Tower.forward` of the pair with index `number`: vectors and biases, "" without."""
    pair, fields = f"pair {number + 1}", tower.field_names
    if unknown := {name for name, _ in tower.named_children()} - _TOWER_MODULES:
        raise RunError(
            f"a tower with the module '{min(unknown)}' cannot be exported; the model is newer than the exporter"
        )
    joined = tower.embeddings.lower(g, names, number)
    if tower.pieces:
        joined = lower_normalized_pieces(g, joined, tower.pieces)
    if tower.senet is not None:
        joined = tower.senet.lower(g, joined, pair, fields)
    if tower.shift is not None:
        joined = g.reshape(joined, len(tower.field_names), len(tower.shift))
        joined = g("Add", g.reduce("Sum", joined, 1, keep=False), g.constant(tower.shift))
    parts = [
        branch.lower(g, joined, f"{pair}, branch {i} ({branch.kind})", fields)
        for i, branch in enumerate(tower.branches, 1)
        if isinstance(branch, TowerBranch)
    ] or [joined]
    if tower.augmented is not None:
        codes = g("Gather", "lookup", g.constant([tower.augmented.column]), axis=1)
        rows = g("Gather", g.constant(tower.augmented.table.weight, (number, "augmented")), codes, axis=0)
        parts.append(g.reshape(rows, tower.augmented.width))
    return tower.head.lower(g, lower(tower.layers, g, g.concat(parts)), joined)


def _first_order(g: GraphBuilder, linear: FirstOrder, like: str) -> str:
    """Build `FirstOrder.forward`: (U, 1), with the rows of `like` (U, D)."""
    if not len(linear.first_rows):
        return g.filled(g.reduce("Sum", like, 1), 0.0)
    codes = g("Add", "lookup", g.constant(linear.first_rows))
    return g.reduce("Sum", g("Gather", g.constant(linear.table.weight.flatten(), "linear"), codes, axis=0), 1)
