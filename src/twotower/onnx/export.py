"""Export of trained towers, one ONNX file per tower.

The graph has gathers, masked sums over padded rows and dense layers, without loops and without paths. Of the other tower
it holds only the rows that a shared sequence reads. Before a file is written, its vectors are compared with those of the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from twotower import files
from twotower.data.side import Side
from twotower.errors import RunError
from twotower.features.field import InputField
from twotower.features.side import SideName
from twotower.model.inputs import carrier, stacked
from twotower.model.lowering import MAX_TABLE_BYTES
from twotower.model.pooling import resolve
from twotower.model.two_tower import TwoTower
from twotower.onnx.builder import GraphBuilder
from twotower.onnx.inspection import trust_tower
from twotower.onnx.parity import parity, random_side
from twotower.onnx.tower import OnnxTower

MAX_DIFFERENCE = 1e-4
"""Largest allowed difference between exported tower and model, relative to the largest number in the vectors, over random features; over rows
of data that of the pooling whose vectors depend most on rounding, if it is larger."""


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


def export_tower(
    model: TwoTower,
    side: SideName,
    fields: tuple[InputField, ...],
    path: Path,
    rows: Side | None = None,
    digest: str = "",
    build: Callable[[TwoTower, SideName, tuple[InputField, ...], str], bytes] = build_graph,
) -> float:
    """Write the tower of `side` as ONNX: inputs as `inputs.feed.feed` makes them, output "vector" (U, D), equal to
    `user_vectors` or `item_vectors` in evaluation mode. `fields` are those of the side, as `Encoders.fields` returns
    them.

    If the side has SENet gates, a second output "gates" (U, G) holds the concatenated weights of all gates, for each
    pair the tower's own gate before those of its branches. The metadata "gates" of the file lists them as JSON:
    [{"name": "pair 1" or "pair 2, branch 3 (fm)", "fields": [feature names in the order of the weights]}, …].

    Returns the `parity` with the model over random features and over `rows`, if given. `digest` of the model is written
    into the metadata; `build` makes the content of the file. Raises RunError, and writes nothing, if the parity exceeds
    `allowed_difference`, if the tables exceed one file, or if the content is refused by the allow-list of towers.
    """
    data = build(model, side, fields, digest)
    trust_tower(data, str(path))
    tower = OnnxTower(data)
    largest = 0.0
    for compared, allowed in ((random_side(fields), MAX_DIFFERENCE), (rows, allowed_difference(fields))):
        if compared is None:
            continue
        difference = parity(tower, model, side, compared, fields)
        if not difference <= allowed:
            raise RunError(
                f"{path}: the exported {side} tower differs from the model by {difference:.1e} of the largest number in "
                f"the vectors, expected at most {allowed:.0e}; the weights are not finite, or "
                "the exporter has a defect: report it with the config"
            )
        largest = max(largest, difference)
    files.write(Path(path), data)
    return largest


def allowed_difference(fields: Iterable[InputField]) -> float:
    """Return the largest allowed difference over rows of data for a tower that reads some fields."""
    return max([MAX_DIFFERENCE, *(resolve(f.pooling).rounding for f in fields if f.pooling)])
