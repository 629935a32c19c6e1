"""Parity of an exported tower with the model that it was made from."""

from __future__ import annotations

import math

import numpy as np
import polars as pl

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Ints
from twotower.data.side import Side
from twotower.features.field import InputField
from twotower.features.side import SideName
from twotower.model.inputs import carrier
from twotower.model.inputs.feed import feed
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower, evaluation_mode
from twotower.onnx.tower import OnnxTower

PARITY_ROWS = 512
"""Rows that `parity` compares."""
_PARITY_BATCH = 64
"""Rows of one call of `parity`: a row is padded to the longest of its call."""


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
        if isinstance(bag := side.columns[f.name], Ragged) and len(side):
            lengths = bag.lengths
            extreme += [int(lengths.argmin()), int(lengths.argmax())]
    extreme = extreme[:PARITY_ROWS]
    others = np.linspace(0, len(side) - 1, min(len(side), PARITY_ROWS - len(extreme))).astype(np.int64)
    return np.unique(np.r_[np.array(extreme, np.int64), others])


def random_side(fields: tuple[InputField, ...]) -> Side:
    """Return 96 rows of random features: first and last code of every table, empty bags, bags of one code and long
    bags."""
    rng, n = np.random.default_rng(0), 96
    columns = {f.name: carrier(f.kind).sample(f, n, rng) for f in fields}
    for f in fields:
        if f.beside and isinstance(host := columns[f.beside], Ragged):  # as long as the sequence that it stands beside
            columns[f.name] = Ragged(rng.integers(0, f.rows, len(host.values)).astype(np.int32), host.offsets)
    return Side(pl.DataFrame({"row": np.arange(n)}), columns, "row")
