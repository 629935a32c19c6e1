"""Tables of users and items with versions as they are when a part is ranked."""

from __future__ import annotations

import numpy as np
import polars as pl

from twotower.arrays.pieces import pieces
from twotower.arrays.types import Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.side import Side


def asked_times(dataset: Dataset, part: int) -> Shaped[Ints, "U"]:
    """Return the time of the ranking of each user, of its first pair of a part; of a user without one, of the first
    pair of all."""
    pairs, times = dataset.pairs_of(part), dataset.times_of(part)
    assert times is not None
    asked = np.full(len(dataset.users), int(times.min()) if len(times) else 0)
    first = np.full(len(asked), np.iinfo(np.int64).max)
    for some in pieces(len(pairs)):
        np.minimum.at(first, pairs.user[some], times[some])
    return np.where(first < np.iinfo(np.int64).max, first, asked)


def users_during(dataset: Dataset, part: int) -> pl.DataFrame:
    """Return the table of the users, of each the version that holds at its ranking in a part."""
    return dataset.users.frame if dataset.users.versions is None else _held(dataset.users, asked_times(dataset, part))


def items_during(dataset: Dataset, part: int) -> pl.DataFrame:
    """Return the table of the items, of each the version that holds at the first pair of a part."""
    if dataset.items.versions is None:
        return dataset.items.frame
    return _held(dataset.items, np.full(len(dataset.items), asked_times(dataset, part).min()))


def _held(side: Side, times: Shaped[Ints, "n"]) -> pl.DataFrame:
    """Return the table of a side (n rows) at a time for each row; columns that its versions lack are those of the
    newest rows."""
    assert side.versions is not None
    held = side.versions.frame[side.versions.at(np.arange(len(side)), times)]
    return held.with_columns(side.frame[name] for name in side.frame.columns if name not in held.columns)
