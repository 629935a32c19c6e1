"""Items of a bundle or a run: ranked for a vector, nearest to an item, or most popular."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from twotower.arrays.pieces import pieces
from twotower.arrays.sets import is_in_sorted, pair_keys
from twotower.arrays.types import Floats, Ints, ItemId, ItemRow, Numbers
from twotower.data.ids import TextColumn
from twotower.evaluation.own_items import OwnItems
from twotower.index import Index
from twotower.index.top_k import TopK, best, kth_largest
from twotower.retrieval.request import Answer, Item, Method, Source

REMOTE_SEARCHES = 16
"""Searches of a remote index at a time."""
SIMILAR_EXCLUSIONS = 32
"""Queries with up to this number of excluded rows are searched together; above it, those of the same power of two."""
MAX_ITEMS = 2**40
"""More than the items of any index."""
OWN_NUMBERS = 2**20
"""Numbers of the vectors of own items multiplied at a time."""
NORM_BLOCK_ROWS = 2**13
"""Vectors whose norms are computed at a time."""


@dataclass(frozen=True)
class Catalogue:
    """Ranks the items for a vector, and lists ranked rows in an answer."""

    index: Index
    ids: TextColumn[ItemId]
    titles: TextColumn[str]
    bundle_id: str = ""
    """Empty for the items of a run."""

    def rank(
        self, vector: Floats, k: int, excluded: Ints, allowed: Ints | None = None, own: OwnItems | None = None,
        exact: bool = False,
    ) -> tuple[Ints, Floats]:  # fmt: skip
        """Return the `k` rows with the highest scores for a vector (1, D), and the scores, padded with row -1.

        `allowed` None: all rows. `own` adds to the scores of some items. `exact` scores every vector. Raises
        Unavailable if the server of the index does not answer."""
        rows, scores = self.rank_many(vector, k, [excluded], allowed, None if own is None else [own], exact)
        return rows[0], scores[0]

    def rank_many(
        self, vectors: Floats, k: int, excluded: Sequence[Ints], allowed: Ints | None = None,
        own: Sequence[OwnItems] | None = None, exact: bool = False,
    ) -> tuple[Ints, Floats]:  # fmt: skip
        """Return rows (B, k) and scores (B, k): `rank` of each of the vectors (B, D) with its `excluded` rows and `own`
        items, padded with row -1 and score -inf."""
        if not own or not any(len(mine.rows) for mine in own):
            return self._rank_each(vectors, k, excluded, allowed, exact)
        banned = [np.concatenate([out, mine.rows]) for out, mine in zip(excluded, own, strict=True)]
        found = self._rank_each(vectors, k, banned, allowed, exact)
        return merge_own_items(self.index, vectors, found, excluded, allowed, own)

    def _rank_each(
        self, vectors: Floats, k: int, excluded: Sequence[Ints], allowed: Ints | None, exact: bool
    ) -> tuple[Ints, Floats]:
        if len(vectors) == 1:
            return self.index.search(vectors, k, allowed=allowed, banned=excluded, exact=exact)
        rows, scores = np.full((len(vectors), k), -1, np.int64), np.full((len(vectors), k), -np.inf, np.float32)

        def search(some: Ints) -> None:
            banned = [excluded[place] for place in some.tolist()]
            rows[some], scores[some] = self.index.search(vectors[some], k, allowed=allowed, banned=banned, exact=exact)

        if self.index.batch_invariant:
            # A search fetches candidates for its longest list of excluded rows.
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
        self, ranked: tuple[Ints, Floats], k: int, started: float, method: Method = 1, source: Source = "model",
        unknown: list[str] | None = None,
    ) -> Answer:  # fmt: skip
        """Return the answer of `ranked` rows (n,) and scores (n,) to a call for `k` items, `started` at a
        `perf_counter`."""
        found = zip(ranked[0].tolist(), ranked[1].tolist(), strict=True)
        ids, titles = self.ids.column, self.titles.column
        items = [Item(ids[row], score, titles[row]) for row, score in found if row >= 0]
        spent = (time.perf_counter() - started) * 1e3
        return Answer(items, self.bundle_id, method, source, round(spent, 3), len(items) < k, unknown or [])


def merge_own_items(
    index: Index, vectors: Floats, others: tuple[Ints, Floats], excluded: Sequence[Ints], allowed: Ints | None,
    own: Sequence[OwnItems],
) -> tuple[Ints, Floats]:  # fmt: skip
    """Return the best rows and scores (B, k) of `others`, the answers to vectors (B, D) without own items, and of the
    own items that are allowed and not excluded."""
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
    chosen = order[first[:, None] + np.arange(k)]  # each user has k others, with padding
    return rows[chosen], scores[chosen]


class Popularity:
    """Items in descending order of popularity."""

    def __init__(self, positives: Numbers, recent: Floats | None = None) -> None:
        """Order the items by recent popularity (n,) if given, then by the number or weight of their training positives
        (n,), then by row."""
        self.rows: Ints = np.lexsort([-positives] if recent is None else [-positives, -recent])
        """Item rows (n,), most popular first."""
        self._rank = np.empty_like(self.rows)
        self._rank[self.rows] = np.arange(len(self.rows))

    def top(self, k: int, excluded: Ints, allowed: Ints | None) -> tuple[Ints, Floats]:
        """Return the `k` most popular of the `allowed` rows without `excluded` ones, and scores of 0."""
        # Only n rows are compared with `excluded`: the catalogue may be large.
        n = k + len(excluded)
        if allowed is None:
            rows = self.rows[:n]
        else:
            rank = self._rank[allowed]
            rows = self.rows[np.sort(rank[-rank >= kth_largest(-rank, n)])]
        rows = rows[~np.isin(rows, excluded)][:k]
        return rows, np.zeros(len(rows), np.float32)


class Neighbours:
    """Finds the nearest items of an item, by the cosine of their vectors without the bias columns.

    The norms of a local index are computed once."""

    def __init__(self, index: Index, bias: bool, similarity: str) -> None:
        """Take an index. `bias`: its last two columns are biases. `similarity` of the model: "cosine" or "dot"."""
        self._index, self._bias, self._cosine = index, bias, similarity == "cosine"
        self._rows = np.empty(0, np.int64) if index.remote else index.rows
        self._norms = np.empty(len(self._rows), np.float32)
        for part in pieces(len(self._rows), NORM_BLOCK_ROWS):
            self._norms[part] = _norms(self._without_bias(self._rows[part]))

    @property
    def broken_row(self) -> ItemRow | None:
        """Row of a local index whose vector is not finite, None if all are."""
        broken = self._rows[~np.isfinite(self._norms)]
        return ItemRow(broken[0]) if len(broken) else None

    def nearest(self, row: ItemRow, k: int) -> TopK | None:
        """Return at most `k` other rows (n,) in descending order of their cosines (n,) with a row, and then by row.

        None if the row is not in the index. Raises Unavailable."""
        query = self._without_bias(np.array([row]))
        if not len(query):
            return None
        query /= np.maximum(np.linalg.norm(query), 1e-12)
        rows, cosines = self._nominate(query, k)
        at = int(np.searchsorted(rows, row))
        found = int(at < len(rows) and rows[at] == row)
        cosines[at : at + found] = -np.inf
        kept = np.flatnonzero(cosines >= kth_largest(cosines, k))
        return best(rows[kept], cosines[kept], min(k, len(rows) - found))

    def unit_vectors(self, rows: Ints) -> Floats:
        """Return the vectors (n, D) of rows (n,) of the index, of norm 1, without the bias columns."""
        vectors = self._index.vectors(rows)
        if self._bias:
            vectors = vectors[:, :-2]
        norms = _norms(vectors) if self._index.remote else self._norms[np.searchsorted(self._rows, rows)]
        return vectors / norms[:, None]

    def _nominate(self, query: Floats, k: int) -> tuple[Ints, Floats]:
        """Return rows (n,) that include the `k` nearest to a unit vector (1, D), and their cosines (n,)."""
        if not self._index.remote:
            return self._rows, self._index.scores(query) / self._norms
        # The index ranks by inner product; if norms differ, more candidates are needed to include the highest cosines.
        n = min(len(self._index), k + 1 if self._cosine else 8 * k + 64)
        rows = np.sort(self._index.search(query, n)[0][0])
        rows = rows[rows >= 0]
        vectors = self._without_bias(rows)
        return rows, (vectors @ query[0]) / _norms(vectors)

    def _without_bias(self, rows: Ints) -> Floats:
        """Return the vectors (n, D) of rows of the index, with zeros in the bias columns."""
        vectors = np.array(self._index.vectors(rows), np.float32)
        if self._bias:
            vectors[:, -2:] = 0
        return vectors


def _norms(vectors: Floats) -> Floats:
    """Return the norms (n,) of vectors (n, D), at least 1e-12."""
    norms: Floats = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
    return norms
