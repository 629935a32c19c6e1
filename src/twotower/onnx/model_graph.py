"""The graph of one side's vectors: its inputs, and the nodes that the modules of a model build."""

from __future__ import annotations

import numpy as np

from twotower.features.field import InputField
from twotower.features.side import SideName
from twotower.model.two_tower import TwoTower
from twotower.onnx.builder import MAX_TABLE_BYTES, GraphBuilder


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
    inputs = {}
    for number, f in enumerate(fields):
        if f.kind == "bag":
            inputs[f.name] = g.input(f"bag{number}", np.int64, ["U", f"T{number}"])
        elif f.kind == "dense":
            inputs[f.name] = g.input(f"dense{number}", np.float32, ["U", f.length])
    output, width = model.lower(g, side, inputs)
    return g.serialize(output, width, {"side": side} | ({"model": digest} if digest else {}))
