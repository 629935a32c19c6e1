"""Number of directions in which the users of a log surely differ, which user vectors can learn."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Floats, Ints
from twotower.data.dataset import Dataset
from twotower.data.splits import TRAIN

MAX_ITEMS = 2000
"""Items with most interactions of the users that are read."""
MIN_COUNT = 3
"""Interactions of an item, of the users that are read, below which it is left out."""


def significant_directions(data: Dataset, users: Ints) -> int:
    """Return the number of directions of the matrix of users and items that chance does not give, by parallel analysis (Horn 1965,
    "A rationale and test for the number of factors in factor analysis").

    The matrix has a 1 for each training target of some `users` (rising rows), less what activity and popularity expect, both
    scaled by their roots. A direction counts if its singular value is above the largest of the same interactions with the items
    drawn anew. More users show more directions, so this is a lower bound.
    """
    rng = np.random.default_rng(0)
    pairs = data.grouped(TRAIN).take(users)
    item = pairs.item[pairs.target].astype(np.int64)
    user = np.searchsorted(users, pairs.user[pairs.target])
    known, column, count = np.unique(item, return_inverse=True, return_counts=True)
    kept = np.zeros(len(known), bool)
    kept[np.argsort(-count, kind="stable")[:MAX_ITEMS]] = True
    kept &= count >= MIN_COUNT
    places = np.cumsum(kept) - 1
    rows = kept[column]
    user, column = user[rows], places[column[rows]]
    n = int(kept.sum())
    if n < 2 or len(users) < 2:
        return 0
    found = _singular_values(user, column, len(users), n)
    return int(np.count_nonzero(found > 1.02 * _singular_values(user, rng.permutation(column), len(users), n).max()))


def _singular_values(user: Ints, item: Ints, n_users: int, n_items: int) -> Floats:
    matrix = np.zeros((n_users, n_items), np.float32)
    matrix[user, item] = 1
    row, column = matrix.sum(1, keepdims=True), matrix.sum(0, keepdims=True)
    matrix -= row * column / max(1.0, float(row.sum()))
    matrix /= np.sqrt(np.maximum(row, 1)) * np.sqrt(np.maximum(column, MIN_COUNT))
    gram = matrix @ matrix.T if n_users <= n_items else matrix.T @ matrix
    values: Floats = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    return values
