"""The items that an answer is made of: the index of their vectors, their ids and titles."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from twotower.arrays.pieces import pieces
from twotower.arrays.sets import is_in_sorted, pair_keys
from twotower.arrays.types import Floats, Ints, ItemId
from twotower.data.ids import TextColumn
from twotower.data.own_items import OwnItems
from twotower.index import Index
from twotower.retrieval.request import Answer, Item, Method, Source

REMOTE_SEARCHES = 16
"""Searches of a remote index at a time."""
SIMILAR_EXCLUSIONS = 32
"""Numbers of excluded rows up to this one are searched together; from there on, those of the same power of two."""

MAX_ITEMS = 2**40
"""More than the items of any index."""
OWN_NUMBERS = 2**20
"""Numbers of the vectors of own items that are multiplied at a time."""


@dataclass(frozen=True)
class Catalogue:
    """The items of a bundle or of a run. Ranks them for a vector, and lists ranked rows in an answer."""

    index: Index
    ids: TextColumn[ItemId]
    titles: TextColumn[str]
    bundle_id: str = ""
    """Empty for the items of a run."""

    def rank(
        self, vector: Floats, k: int, excluded: Ints, allowed: Ints | None = None, own: OwnItems | None = None,
        exact: bool = False,
    ) -> tuple[Ints, Floats]:  # fmt: skip
        """Return the `k` rows of highest score for a vector (1, D) among the `allowed` ones without the `excluded`, and the
        scores; rows of -1 are padding. `own` adds to the scores of some items, and `exact` scores every vector. Raises Unavailable if the
        server of the index does not answer."""
        banned = excluded if own is None else np.concatenate([excluded, own.rows])
        found = self.index.search(vector, k, allowed=allowed, banned=[banned], exact=exact)
        if own is not None and len(own.rows):
            found = with_own(self.index, vector, found, [excluded], allowed, [own])
        return found[0][0], found[1][0]

    def rank_many(
        self, vectors: Floats, k: int, excluded: Sequence[Ints], allowed: Ints | None = None,
        own: Sequence[OwnItems] | None = None, exact: bool = False,
    ) -> tuple[Ints, Floats]:  # fmt: skip
        """Return the rows (B, k) and scores (B, k) that `rank` returns for each of the vectors (B, D) with its `excluded` rows and its
        `own` items, padded with row -1 and score -inf."""
        if own:
            banned = [np.concatenate([out, mine.rows]) for out, mine in zip(excluded, own, strict=True)]
            found = self._rank_each(vectors, k, banned, allowed, exact)
            return with_own(self.index, vectors, found, excluded, allowed, own)
        return self._rank_each(vectors, k, excluded, allowed, exact)

    def _rank_each(
        self, vectors: Floats, k: int, excluded: Sequence[Ints], allowed: Ints | None, exact: bool
    ) -> tuple[Ints, Floats]:
        rows, scores = np.full((len(vectors), k), -1, np.int64), np.full((len(vectors), k), -np.inf, np.float32)

        def search(some: Ints) -> None:
            banned = [excluded[place] for place in some.tolist()]
            found = self.index.search(vectors[some], k, allowed=allowed, banned=banned, exact=exact)
            rows[some], scores[some] = found

        if self.index.batch_invariant:
            # A search finds as many more candidates as its longest list of excluded rows has.
            level = np.ceil(np.log2(np.maximum(np.array([*map(len, excluded)], np.int64), SIMILAR_EXCLUSIONS)))
            for one in np.unique(level):
                search(np.flatnonzero(level == one))
            return rows, scores

        def search_each(places: Ints) -> None:
            for start in range(len(places)):
                search(places[start : start + 1])

        threads = REMOTE_SEARCHES if self.index.remote else self.index.threads
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(search_each, np.array_split(np.arange(len(vectors)), threads)))
        return rows, scores

    def answer(
        self,
        ranked: tuple[Ints, Floats],
        k: int,
        started: float,
        method: Method = 1,
        source: Source = "model",
        unknown: list[str] | None = None,
    ) -> Answer:
        """Return the answer of ranked rows (n,) with their scores (n,) to a question for `k` items, asked when
        `time.perf_counter` said `started`."""
        found = zip(ranked[0].tolist(), ranked[1].tolist(), strict=True)
        ids, titles = self.ids.column, self.titles.column
        items = [Item(ids[row], score, titles[row]) for row, score in found if row >= 0]
        spent = (time.perf_counter() - started) * 1e3
        return Answer(items, self.bundle_id, method, source, round(spent, 3), len(items) < k, unknown or [])


def with_own(
    index: Index, vectors: Floats, others: tuple[Ints, Floats], excluded: Sequence[Ints], allowed: Ints | None,
    own: Sequence[OwnItems],
) -> tuple[Ints, Floats]:  # fmt: skip
    """Return the best rows and their scores (B, k) of `others`, those of a search for vectors (B, D) without the own items, and of the own
    items of each that may be ranked."""
    users, n_users, k = np.repeat(np.arange(len(own)), [len(mine.rows) for mine in own]), *others[0].shape
    rows, scores = np.concatenate([mine.rows for mine in own]), np.concatenate([mine.scores for mine in own])
    out = [pair_keys(np.full(len(some), user), some, MAX_ITEMS) for user, some in enumerate(excluded)]
    may_be = ~np.isin(pair_keys(users, rows, MAX_ITEMS), np.concatenate(out))
    may_be &= ~is_in_sorted(index.rejected, rows)
    if allowed is not None:
        may_be &= is_in_sorted(allowed, rows)
    users, rows, scores = users[may_be], rows[may_be], scores[may_be]
    for some in pieces(len(rows), max(1, OWN_NUMBERS // vectors.shape[1])):
        products = index.vectors(rows[some]) * vectors[users[some]].astype(np.float64)
        scores[some] += products.sum(axis=1).astype(np.float32)
    users = np.concatenate([np.repeat(np.arange(n_users), k), users])
    rows, scores = np.concatenate([others[0].ravel(), rows]), np.concatenate([others[1].ravel(), scores])
    order = np.lexsort((rows, -scores, users))
    first = np.searchsorted(users[order], np.arange(n_users))
    chosen = order[first[:, None] + np.arange(k)]  # each has k others, padding too
    return rows[chosen], scores[chosen]
