"""Own items: those of a user's history, with scores that grow with how often and how lately the user took them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from twotower.arrays.ragged import Ragged, offsets_of, run_indices
from twotower.arrays.sets import pair_keys
from twotower.arrays.types import Floats, Ints, Shaped
from twotower.features.values import UNKNOWN

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset
    from twotower.features.feature import HistorySpec


class Recency(NamedTuple):
    """Weight of the n-th latest interaction of a history, rate^(n - 1) n^-exponent; at (1, 0) all count alike."""

    rate: float = 1.0
    """0 to 1."""
    exponent: float = 0.0
    """0 or more."""


class OwnItems(NamedTuple):
    """Items of one user, or of several one after another."""

    rows: Shaped[Ints, "L"]
    """Item rows, ascending for each user."""
    scores: Shaped[Floats, "L"]


def own_items(
    histories: Ragged, rows: Shaped[Ints, "codes"], weights: Shaped[Floats, "codes"], recency: Recency, factor: float,
    n_items: int,
) -> tuple[Shaped[Ints, "_"], OwnItems]:  # fmt: skip
    """Return offsets (U + 1,) and items of the histories of U users, rows of codes, oldest first.

    The score of an item is factor * log(1 + the sum over its interactions of the weight of its code times the weight of
    `recency`). `rows` has the item of each code, -1 for none."""
    codes, lengths = histories.values, histories.lengths
    places = run_indices(np.zeros(len(lengths), np.int64), lengths)
    later = (np.repeat(lengths, lengths) - places - 1).astype(np.float64)  # 0 for the latest
    owner, latest = histories.owners, recency.rate**later * (later + 1) ** -recency.exponent
    item = rows[codes]
    known = item >= 0
    keys, which = np.unique(pair_keys(owner[known], item[known], n_items), return_inverse=True)
    sums = np.bincount(which, weights[codes[known]] * latest[known], len(keys))
    scores = (factor * np.log1p(sums)).astype(np.float32)
    users, items = np.divmod(keys, n_items)
    return offsets_of(np.bincount(users, minlength=len(lengths))), OwnItems(items, scores)


def rows_of_codes(dataset: Dataset, history: HistorySpec, n_codes: int) -> Shaped[Ints, "codes"]:
    """Return the item row of each code of a history of the users, -1 for the unknown one and those of no item."""
    codes = dataset.encoders.history_codes(history, dataset.items.frame)
    rows = np.full(n_codes, -1)
    rows[codes] = np.arange(len(codes))
    rows[UNKNOWN] = -1
    return rows
