"""Baseline of repeats: the items that a user took most often."""

from __future__ import annotations

import numpy as np

from twotower.arrays.pieces import pieces
from twotower.arrays.types import Ints, Shaped
from twotower.data.dataset import Dataset

BLOCK_USERS = 4096
"""Users whose interactions are counted at a time."""


def own_counts(
    dataset: Dataset, part: int, users: Shaped[Ints, "Q"], k: int, block: int = BLOCK_USERS
) -> Shaped[Ints, "Q k"]:
    """Return the item rows that each user took most often as positives before a part: the most frequent first, equal
    counts by the latest time, then by item row; -1 after a user's last item. With weights a count is the sum of
    theirs."""
    best = np.full((len(users), k), -1, np.int64)
    for some in pieces(len(users), block):
        best[some] = _of_block(dataset, part, users[some], k)
    return best


def _of_block(dataset: Dataset, part: int, users: Shaped[Ints, "B"], k: int) -> Shaped[Ints, "B k"]:
    taken, best = dataset.interacted_items, np.full((len(users), k), -1, np.int64)
    assert taken.source is not None
    at, lengths = taken.indices(users)
    owner, rows = np.repeat(np.arange(len(users)), lengths), taken.source[at].astype(np.int64)
    earlier = dataset.parts[rows] < part
    owner, rows = owner[earlier], rows[earlier]
    pairs = dataset.pairs.take(rows)
    keep = pairs.target
    owner, rows, pairs = owner[keep], rows[keep], pairs.take(keep)
    item = pairs.item.astype(np.int64)
    weight = np.ones(len(rows)) if pairs.weight is None else pairs.weight.astype(np.float64)
    time = rows if dataset.times is None else dataset.times[rows]
    order = np.lexsort((time, item, owner))
    owner, item, time, weight = owner[order], item[order], time[order], weight[order]
    last = np.flatnonzero(np.r_[(owner[1:] != owner[:-1]) | (item[1:] != item[:-1]), np.ones(min(1, len(owner)), bool)])
    count = np.add.reduceat(weight, np.r_[0, last[:-1] + 1]) if len(last) else weight
    owner, item, time = owner[last], item[last], time[last]
    order = np.lexsort((item, -time, -count, owner))
    owner, item = owner[order], item[order]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    shown = place < k
    best[owner[shown], place[shown]] = item[shown]
    return best
