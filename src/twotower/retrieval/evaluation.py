"""Vectors and rankings of many users, for the evaluation of a bundle with the index and the tower that serve it."""

from __future__ import annotations

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Floats, Ints
from twotower.data.dataset import Dataset
from twotower.model.inputs.feed import feed
from twotower.retrieval.request import Method
from twotower.retrieval.retriever import Retriever

BLOCK_USERS = 256
"""Users whose items are searched at a time."""
ATTENTION_MAX_CELLS = 2**21
"""Attention weights that one call of the tower may hold for each head: users times squared history length."""


def rank_items(retriever: Retriever, users: Ints, k: int, method: Method, seen: Ragged, exact: bool = False) -> Ints:
    """Return the top `k` item rows (B, k) for user rows (B,), without those in `seen`, padded with -1."""
    best = np.full((len(users), k), -1, np.int64)
    for start in range(0, len(users), BLOCK_USERS):
        rows = users[start : start + BLOCK_USERS]
        vectors = embed_users(retriever, rows, method)
        banned = [np.unique(seen.row(int(r))).astype(np.int64) for r in rows]
        best[start : start + BLOCK_USERS] = retriever.index.search(vectors, k, banned=banned, exact=exact)[0]
    return best


def embed_users(retriever: Retriever, users: Ints, method: Method) -> Floats:
    """Return the vectors (B, D) of user rows (B,): precomputed (1), or by the tower on stored features (2)."""
    loaded = retriever.loaded
    if method == 1:
        return np.asarray(loaded.user_vectors[users], np.float32)
    # Attention holds a weight for every two items of a history, for all users of a call.
    longest = max((f.limit for f in loaded.fields), default=0)
    step = max(1, ATTENTION_MAX_CELLS // longest**2) if longest else max(1, len(users))
    blocks = range(0, max(1, len(users)), step)
    return np.concatenate([loaded.tower(feed(loaded.fields, loaded.columns, users[b : b + step])) for b in blocks])


def seen_before(dataset: Dataset, part: int) -> Ragged:
    """Return the item rows of each user's interactions in the parts before `part`."""
    pairs = dataset.pairs.take(dataset.parts < part)
    return Ragged.from_pairs(pairs.user, pairs.item, len(dataset.users))
