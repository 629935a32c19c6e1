"""Export of trained towers, one ONNX file per tower.

The graph has gathers, masked sums over padded rows and dense layers, without loops and without paths. Of the other tower
it holds only the rows that a shared sequence reads. Before a file is written, its vectors are compared with those of the
model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from twotower import files
from twotower.data.dataset import Side
from twotower.errors import RunError
from twotower.features.field import InputField
from twotower.features.side import SideName
from twotower.model.two_tower import TwoTower
from twotower.onnx.inspection import trust_tower
from twotower.onnx.model_graph import build_graph
from twotower.onnx.parity import parity, random_side
from twotower.onnx.tower import OnnxTower

MAX_DIFFERENCE = 1e-4
"""Largest allowed difference between exported tower and model, relative to the largest number in the vectors."""


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
    1e-4, if the tables exceed one file, or if the content is refused by the allow-list of towers.
    """
    data = build(model, side, fields, digest)
    trust_tower(data, str(path))
    tower = OnnxTower(data)
    difference = max(parity(tower, model, side, s, fields) for s in (random_side(fields), rows) if s is not None)
    if not difference <= MAX_DIFFERENCE:
        raise RunError(
            f"{path}: the exported {side} tower differs from the model by {difference:.1e} of the largest number in "
            f"the vectors, expected at most {MAX_DIFFERENCE:.0e}; the weights are not finite, or "
            "the exporter has a defect: report it with the config"
        )
    files.write(Path(path), data)
    return difference
