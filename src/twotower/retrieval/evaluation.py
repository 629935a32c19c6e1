"""Rankings of many users, for the evaluation of a bundle with the index and the tower that serve it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from twotower.arrays.pieces import pieces
from twotower.arrays.sets import distinct_keys, pair_keys
from twotower.arrays.types import Ints
from twotower.data.pairs import GroupedPairs, Pairs
from twotower.progress import JobProgress
from twotower.retrieval.request import Method
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.user_vectors import embed_users

log = logging.getLogger(__name__)

_NO_ROWS: Ints = np.zeros(0, np.int64)
BLOCK_USERS = 256
"""Users whose items are searched at a time."""


def rank_items(
    retriever: Retriever,
    users: Ints,
    k: int,
    method: Method,
    seen: Sequence[GroupedPairs],
    exact: bool = False,
    only_seen: bool = False,
    interactions: Ints | None = None,
) -> Ints:
    """Return the top `k` item rows (B, k) for user rows (B,), without those in `seen`, or of those alone, padded with -1.
    `interactions` (B,) are those with the context of each user, for a tower that reads one."""
    best, rank = np.full((len(users), k), -1, np.int64), retriever.catalogue.rank
    progress = JobProgress(log, "users ranked", len(users), seconds=60.0)
    for part in pieces(len(users), BLOCK_USERS):
        vectors = embed_users(retriever, users[part], method, None if interactions is None else interactions[part])
        items = _distinct_items(seen, users[part], len(retriever.item_ids))
        own = retriever.own_counts.of_users(users[part]) if retriever.own_counts else None
        if only_seen:
            for n, (vector, allowed) in enumerate(zip(vectors, items, strict=True)):
                best[part.start + n] = rank(vector[None], k, _NO_ROWS, allowed, own[n] if own else None, exact)[0]
        elif own:
            best[part] = retriever.catalogue.rank_many(vectors, k, items, None, own, exact)[0]
        else:
            best[part] = retriever.index.search(vectors, k, banned=items, exact=exact)[0]
        progress.advance(len(vectors))
    return best


def _distinct_items(seen: Sequence[GroupedPairs], users: Ints, n_items: int) -> list[Ints]:
    """Return the distinct item rows of each user's pairs, rising."""
    if not seen:
        return [np.zeros(0, np.int64)] * len(users)
    taken = Pairs.concatenated([pairs.take(users) for pairs in seen])
    cells = distinct_keys(pair_keys(taken.user, taken.item, n_items))
    ends = np.searchsorted(cells, np.arange(1, len(users)) * n_items)
    return np.split(cells % n_items, ends)
