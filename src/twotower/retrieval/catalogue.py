"""The items that an answer is made of: the index of their vectors, their ids and titles."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from twotower.arrays.types import Floats, Ints, ItemId
from twotower.data.ids import TextColumn
from twotower.data.own_items import OwnItems
from twotower.index import Index
from twotower.index.top_k import best
from twotower.retrieval.request import Answer, Item, Method, Source

REMOTE_SEARCHES = 16
"""Searches of a remote index at a time."""
SIMILAR_EXCLUSIONS = 32
"""Numbers of excluded rows up to this one are searched together; from there on, those of the same power of two."""


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
        if own is None or not len(own.rows):
            rows, scores = self.index.search(vector, k, allowed=allowed, banned=[excluded], exact=exact)
            return rows[0], scores[0]
        banned = [np.concatenate([excluded, own.rows])]
        others = self.index.search(vector, k, allowed=allowed, banned=banned, exact=exact)
        return with_own(self.index, vector, (others[0][0], others[1][0]), k, excluded, allowed, own)

    def rank_many(
        self, vectors: Floats, k: int, excluded: Sequence[Ints], allowed: Ints | None = None,
        own: Sequence[OwnItems] | None = None,
    ) -> tuple[Ints, Floats]:  # fmt: skip
        """Return the rows (B, k) and scores (B, k) that `rank` returns for each of the vectors (B, D) with its `excluded` rows and its
        `own` items, padded with row -1 and score -inf."""
        if own is not None:
            banned = [np.concatenate([out, mine.rows]) for out, mine in zip(excluded, own, strict=True)]
            rows, scores = self._rank_each(vectors, k, banned, allowed)
            for place, (out, mine) in enumerate(zip(excluded, own, strict=True)):
                vector, others = vectors[place : place + 1], (rows[place], scores[place])
                rows[place], scores[place] = with_own(self.index, vector, others, k, out, allowed, mine)
            return rows, scores
        return self._rank_each(vectors, k, excluded, allowed)

    def _rank_each(
        self, vectors: Floats, k: int, excluded: Sequence[Ints], allowed: Ints | None
    ) -> tuple[Ints, Floats]:
        rows, scores = np.full((len(vectors), k), -1, np.int64), np.full((len(vectors), k), -np.inf, np.float32)

        def search(some: Ints) -> None:
            banned = [excluded[place] for place in some.tolist()]
            rows[some], scores[some] = self.index.search(vectors[some], k, allowed=allowed, banned=banned)

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
    index: Index, vector: Floats, others: tuple[Ints, Floats], k: int, excluded: Ints, allowed: Ints | None, own: OwnItems
) -> tuple[Ints, Floats]:  # fmt: skip
    """Return the `k` best rows and their scores of `others`, the best of a search for a vector (1, D) without the own items, and of the
    own items that may be ranked."""
    may_be = ~np.isin(own.rows, excluded)
    if allowed is not None:
        may_be &= np.isin(own.rows, allowed)
    if not may_be.any():
        return others
    rows, scores = (found[0] for found in index.search(vector, int(may_be.sum()), allowed=own.rows[may_be], exact=True))
    rows, scores = rows[rows >= 0], scores[rows >= 0]  # without those that the index rejects
    scores = scores + own.scores[np.searchsorted(own.rows, rows)]
    found = best(np.concatenate([others[0], rows]), np.concatenate([others[1], scores.astype(np.float32)]), k)
    return found.rows, found.scores
