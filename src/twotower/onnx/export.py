"""Export of trained towers, one ONNX file a tower, and their parity with the model.

The graph has gathers, masked sums over padded rows and dense layers, without loops and paths. It holds only the rows of
the other tower that a shared sequence reads. A file is written only if its vectors equal the vectors of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl

from twotower import files
from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Ints
from twotower.data.side import Side
from twotower.errors import RunError
from twotower.features.field import InputField
from twotower.features.side import SideName
from twotower.model.inputs import carrier, stacked
from twotower.model.inputs.gather import feed
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.pooling import resolve
from twotower.model.two_tower import TwoTower, evaluation_mode
from twotower.onnx.builder import GraphBuilder, StoredWeights
from twotower.onnx.tower import OnnxTower, trust_tower

MAX_DIFFERENCE = 1e-4
"""Largest allowed `parity` over random features. Over rows of data it is the largest `Pooling.rounding`, if larger."""


def build_graph(
    model: TwoTower,
    side: SideName,
    fields: tuple[InputField, ...],
    digest: str = "",
    weights: StoredWeights | None = None,
) -> bytes:
    """Return the ONNX file of one side's vectors. Raises RunError if its constants exceed MAX_TABLE_BYTES.

    It names the weights that are stored in `weights`, without a copy."""
    g = GraphBuilder(stored=weights)
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
    weights: StoredWeights | None = None,
) -> float:
    """Write the tower of `side` as ONNX and return its `parity` with the model over random features and over `rows`.

    Inputs are as `gather.feed` makes them; `fields` are as `Encoders.fields` returns them. The output "vector" (U, D)
    is `user_vectors` or `item_vectors` in evaluation mode. With SENet gates a second output "gates" (U, G) has their
    concatenated weights, for each pair the tower's gate before the gates of its branches. The metadata "gates" lists
    them as JSON: [{"name": "pair 1" or "pair 2, branch 3 (fm)", "fields": [feature names, as the weights]}, …].

    The metadata has the `digest` of the model. `weights` are stored beside `path`: the large ones are named there by
    ONNX external data, not copied. Raises RunError, and writes nothing, if the parity exceeds
    `allowed_difference`, the tables exceed one file, or the allow-list refuses the content.
    """
    data = build_graph(model, side, fields, digest, weights)
    stored = digest if weights else ""
    trust_tower(data, str(path), stored)
    tower = OnnxTower(data, folder=path.parent, weights=stored)
    largest = 0.0
    for compared, allowed in ((random_side(fields), MAX_DIFFERENCE), (rows, allowed_difference(fields))):
        if compared is None:
            continue
        difference = parity(tower, model, side, compared, fields)
        if not difference <= allowed:
            raise RunError(
                f"{path}: the exported {side} tower differs from the model by {difference:.1e} of the largest number "
                f"in the vectors, expected at most {allowed:.0e}; the weights are not finite, or the exporter has a "
                "defect: report it with the config"
            )
        largest = max(largest, difference)
    files.write(Path(path), data)
    return largest


def allowed_difference(fields: Iterable[InputField]) -> float:
    """Return the largest allowed `parity` over rows of data for a tower of some fields."""
    return max([MAX_DIFFERENCE, *(resolve(f.pooling).rounding for f in fields if f.pooling)])


PARITY_ROWS = 512
"""Most rows that `parity` compares."""
_PARITY_BATCH = 64
"""Rows of one call, which are padded to the longest of them."""


def parity(tower: OnnxTower, model: TwoTower, side: SideName, data: Side, fields: tuple[InputField, ...]) -> float:
    """Return the largest difference of an exported tower from its model, relative to the largest number in the vectors.

    Compares up to 512 rows, with the shortest and the longest bags among them. Returns infinity if shapes differ or a
    difference is not finite.
    """
    tensors = SideTensors(data, fields, model.log_temperature.device)
    largest, scale = 0.0, 0.0
    rows = _parity_rows(data, fields)
    vectors = model.user_vectors if side == "user" else model.item_vectors
    for start in range(0, len(rows), _PARITY_BATCH):
        block = rows[start : start + _PARITY_BATCH]
        with evaluation_mode(model):
            expected = vectors(tensors.take(block)).cpu().numpy()
        found = tower(feed(fields, data.columns, block))
        if found.shape != expected.shape:
            return math.inf
        difference = float(np.abs(found - expected).max(initial=0.0))
        if not math.isfinite(difference):
            return math.inf
        largest = max(largest, difference)
        scale = max(scale, float(np.abs(expected).max(initial=0.0)))
    return largest / scale if scale else largest


def _parity_rows(side: Side, fields: tuple[InputField, ...]) -> Ints:
    """Return the rows with the fewest and the most codes of each bag, and evenly spaced others."""
    extreme: list[int] = []
    for f in fields:
        if isinstance(bag := side.columns[f.name], Ragged) and len(side):
            lengths = bag.lengths
            extreme += [int(lengths.argmin()), int(lengths.argmax())]
    extreme = extreme[:PARITY_ROWS]
    others = np.linspace(0, len(side) - 1, min(len(side), PARITY_ROWS - len(extreme))).astype(np.int64)
    return np.unique(np.r_[np.array(extreme, np.int64), others])


def random_side(fields: tuple[InputField, ...]) -> Side:
    """Return 96 rows of random features, with the first and last code of every table, empty, short and long bags."""
    rng, n = np.random.default_rng(0), 96
    columns = {f.name: carrier(f.kind).sample(f, n, rng) for f in fields}
    for f in fields:
        if f.added_to and isinstance(host := columns[f.added_to], Ragged):  # of the same lengths
            columns[f.name] = Ragged(rng.integers(0, f.rows, len(host.values)).astype(np.int32), host.offsets)
    return Side(pl.DataFrame({"row": np.arange(n)}), columns, "row")
