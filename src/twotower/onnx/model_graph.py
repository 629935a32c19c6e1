"""The graph of one side's vectors: its inputs, and the nodes that the modules of a model build."""

from __future__ import annotations

import numpy as np

from twotower.features.field import InputField
from twotower.features.side import SideName
from twotower.model.inputs import carrier, stacked
from twotower.model.lowering import MAX_TABLE_BYTES
from twotower.model.two_tower import TwoTower
from twotower.onnx.builder import GraphBuilder


def build_graph(
    model: TwoTower,
    side: SideName,
    fields: tuple[InputField, ...],
    digest: str = "",
    max_table_bytes: int = MAX_TABLE_BYTES,
) -> bytes:
    """Return the ONNX file of one side's vectors. Raises RunError if its constants exceed `max_table_bytes`."""
    g = GraphBuilder(max_table_bytes)
    g.input("lookup", np.int64, ["U", len(stacked(fields))])
    inputs = {
        f.name: carrier(f.kind).declare(g, f"{carrier(f.kind).label}{number}", f)
        for number, f in enumerate(fields)
        if not carrier(f.kind).is_stacked
    }
    output, width = model.lower(g, side, inputs)
    return g.serialize(output, width, {"side": side} | ({"model": digest} if digest else {}))
