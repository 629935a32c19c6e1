"""Rankings of many users, for the evaluation of a bundle with the index and the tower that serve it."""

from __future__ import annotations

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Ints
from twotower.data.dataset import Dataset
from twotower.retrieval.request import Method
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.user_vectors import embed_users

BLOCK_USERS = 256
"""Users whose items are searched at a time."""


def rank_items(retriever: Retriever, users: Ints, k: int, method: Method, seen: Ragged, exact: bool = False) -> Ints:
    """Return the top `k` item rows (B, k) for user rows (B,), without those in `seen`, padded with -1."""
    best = np.full((len(users), k), -1, np.int64)
    for start in range(0, len(users), BLOCK_USERS):
        rows = users[start : start + BLOCK_USERS]
        vectors = embed_users(retriever, rows, method)
        banned = [np.unique(seen.row(int(r))).astype(np.int64) for r in rows]
        best[start : start + BLOCK_USERS] = retriever.index.search(vectors, k, banned=banned, exact=exact)[0]
    return best


def seen_before(dataset: Dataset, part: int) -> Ragged:
    """Return the item rows of each user's interactions in the parts before `part`."""
    pairs = dataset.pairs.take(dataset.parts < part)
    return Ragged.from_pairs(pairs.user, pairs.item, len(dataset.users))
