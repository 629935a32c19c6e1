"""Exact search: the highest scores of a vector store.

Speed: FAISS's brute-force search selects more than k candidates by float32 sums; each thread searches its share of the
items. numpy scores few items, or a large share of them.

Exactness: float32 sums depend on the order of addition, so candidates are scored again, with products and sums in
float64 rounded to float32. That is the score for all kinds of index, batch sizes and thread counts; equal scores are
ordered by row. If the k-th score exceeds the float32 sum of the last candidate by no more than the rounding error, an
item outside the candidates may belong to the answer, and numpy scores all items.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from twotower.arrays.sets import is_in_sorted
from twotower.arrays.types import Bool, Bools, Rows, Shaped, Vectors
from twotower.index.vector_store import VectorStore, norms

NUMPY_MAX_SCORES = 1 << 13
"""Number of scores (items x queries) up to which numpy computes all."""
GATHER_NUMBERS = 1 << 22
"""Numbers copied at a time when only allowed items are searched."""
ROUGH_SCORES = 1 << 22
"""Float32 sums of queries and all items in memory at a time: 16 MiB."""
RESCORED_NUMBERS = 1 << 22
"""Numbers of candidates scored again at a time: float64 products of at most 32 MiB."""
_NO_ROWS: Rows = np.empty(0, np.int64)


class OneBlasThread:
    """Sets one thread for the OpenBLAS that numpy ships, while a `with` block of any thread runs.

    OpenBLAS's own threads spin while they wait, and several calling threads would queue for them. The last `with` block
    restores the number of threads before the first, so a process has one instance.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, 1
        self._get: Callable[[], int] | None = None
        self._set: Callable[[int], None] | None = None
        folder = Path(np.__file__).resolve().parent.with_name("numpy.libs")
        for library in ThreadpoolController().select(internal_api="openblas").lib_controllers:
            if Path(library.filepath).resolve().parent == folder:
                # The functions of the library: `set_num_threads` obeys only the first thread that calls it, and `limit`
                # takes ten times as long.
                name = next(name for name in library.check_symbols if hasattr(library.dynlib, name))
                self._get = getattr(library.dynlib, name)
                self._set = getattr(library.dynlib, name.replace("_get_", "_set_"))

    def __enter__(self) -> None:
        if self._get is None or self._set is None:
            return
        with self._lock:
            if not self._users:
                self._before = self._get()
                self._set(1)
            self._users += 1

    def __exit__(self, *error: object) -> None:
        if self._set is None:
            return
        with self._lock:
            self._users -= 1
            if not self._users:
                self._set(self._before)


one_blas_thread = OneBlasThread()
"""The instance of this process."""


class SearchScope(NamedTuple):
    """Positions of the vector store that a search covers."""

    only: Shaped[Rows, "_"] | None
    """Allowed positions, ascending. None: all."""
    banned: list[Shaped[Rows, "_"]] | None
    """Banned positions of each query, ascending, within `only`."""
    remaining: Shaped[Rows, "B"]
    """Number of allowed positions of each query."""

    def of(self, queries: Shaped[Rows, "b"]) -> SearchScope:
        """Return the scope of some queries, by number."""
        banned = None if self.banned is None else [self.banned[number] for number in queries]
        return SearchScope(self.only, banned, self.remaining[queries])


class TopK(NamedTuple):
    """The best rows of each query in descending order of score; equal scores are ordered by row."""

    rows: Shaped[Rows, "*B k"]
    """Rows, padded with -1."""
    scores: Shaped[Vectors, "*B k"]
    """Scores, padded with -inf."""

    @classmethod
    def empty(cls, n_queries: int, k: int) -> TopK:
        """Return an answer of padding."""
        return cls(np.full((n_queries, k), -1, np.int64), np.full((n_queries, k), -np.inf, np.float32))

    def put(self, query: int, rows: Shaped[Rows, "n"], scores: Shaped[Vectors, "n"]) -> None:
        """Set the rows and scores of one query, n at most k."""
        self.rows[query, : len(rows)], self.scores[query, : len(rows)] = rows, scores
        self.rows[query, len(rows) :], self.scores[query, len(rows) :] = -1, -np.inf


def best(rows: Shaped[Rows, "*B n"], scores: Shaped[Vectors, "*B n"], k: int) -> TopK:
    """Return the `k` best rows by score; every search orders ties by this function."""
    order = np.lexsort((rows, -scores))[..., :k]
    if rows.ndim == 1:
        return TopK(rows[order], scores[order])
    return TopK(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))


def rescore(
    store: VectorStore, queries: Shaped[Vectors, "B D"], at: Shaped[Rows, "B n"], k: int,
    good: Bool[Bools, "B n"] | None = None,
) -> TopK:  # fmt: skip
    """Return the `k` best of the `good` positions by exact scores."""
    scores = (store.vectors[at] * queries[:, None].astype(np.float64)).sum(axis=2).astype(np.float32)
    rows = store.rows[at]
    if good is not None:
        rows[~good], scores[~good] = -1, -np.inf
    return best(rows, scores, k)


def exact_scores(vectors: Shaped[Vectors, "n D"], query: Shaped[Vectors, "D"]) -> Shaped[Vectors, "n"]:
    """Return the scores of vectors for a query: products and sums in float64, rounded to float32."""
    scores: Vectors = (vectors * query.astype(np.float64)).sum(axis=1).astype(np.float32)
    return scores


def exact_top_k(
    store: VectorStore, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope, threads: int,
    numbers: int = RESCORED_NUMBERS,
) -> TopK:  # fmt: skip
    """Return the `k` best rows for each query among the positions of `scope`, by at most `threads` threads.

    About `numbers` numbers of candidates are in memory at a time."""
    only = scope.only
    n = len(store) if only is None else len(only)
    # The error of a float32 sum of D products is below D / 2^24 of the product of the norms; twice for two sums.
    slack = norms(queries) * store.max_norm * store.width * 2.0**-22 + 1e-30
    top, todo = TopK.empty(len(queries), k), np.arange(len(queries))
    banned = scope.banned or [_NO_ROWS] * len(queries)
    keep = k + max(8, k // 8)
    fetch = keep + max(map(len, banned), default=0)
    if n * len(queries) > NUMPY_MAX_SCORES and 4 * fetch < n:
        certain = np.zeros(len(queries), np.bool_)
        # Wide vectors are read once for many queries, and rescored for few at a time. Each gathered block has nominees.
        blocks = 1 if only is None else -(-n // max(1, numbers // store.width))
        many, step = max(1, numbers // (fetch * blocks)), max(1, numbers // (keep * store.width))
        for first in range(0, len(queries), many):
            nominated = slice(first, first + many)
            at, rough = _nominate(store, queries[nominated], fetch, only, banned[nominated], keep, threads, numbers)
            for start in range(0, len(at), step):
                ours = slice(start, min(start + step, len(at)))
                part = slice(first + ours.start, first + ours.stop)
                top.rows[part], top.scores[part] = rescore(store, queries[part], at[ours], k)
                certain[part] = top.scores[part, -1] > rough[ours, -1] + slack[part]
        todo = todo[~certain]
    with one_blas_thread:
        step = max(1, ROUGH_SCORES // max(1, n))
        for start in range(0, len(todo), step):
            block = todo[start : start + step]
            sums = _rough_scores(store, queries[block], only, n)
            for number, rough in zip(block.tolist(), sums, strict=True):
                top.put(number, *_score_again(store, queries[number], k, only, banned[number], slack[number], rough))
    return top


def _nominate(
    store: VectorStore, queries: Shaped[Vectors, "B D"], n: int, only: Shaped[Rows, "_"] | None,
    banned: list[Shaped[Rows, "_"]], keep: int, threads: int, numbers: int,
) -> tuple[Shaped[Rows, "B keep"], Shaped[Vectors, "B keep"]]:  # fmt: skip
    """Return the positions with the `keep` largest float32 sums, and the sums, in descending order.

    They are among the `n` largest, without banned positions. Allowed vectors are gathered about `numbers` numbers at a
    time.
    """
    from twotower.index.faiss.setup import faiss, faiss_settings

    vectors, width = store.vectors, store.width
    total = len(vectors) if only is None else len(only)
    threads = min(threads, total // n) if total * len(queries) * width > 1 << 22 else 1
    bounds = [total * t // threads for t in range(threads + 1)]

    def search_block(start: int, stop: int) -> tuple[Shaped[Rows, "B n"], Shaped[Vectors, "B n"]]:
        items = vectors[start:stop] if only is None else vectors[only[start:stop]]
        found, at = faiss().knn(queries, items, min(n, stop - start), metric=faiss().METRIC_INNER_PRODUCT)
        return (at + start if only is None else only[at + start]), found

    def search_share(start: int, stop: int) -> tuple[Shaped[Rows, "B n"], Shaped[Vectors, "B n"]]:
        with faiss_settings(1, width):
            step = stop - start if only is None else max(1, numbers // width)
            return _merge_largest([search_block(low, min(low + step, stop)) for low in range(start, stop, step)], n)

    if threads == 1:
        at, rough = search_share(0, total)
    else:
        with ThreadPoolExecutor(threads) as pool:
            at, rough = _merge_largest(list(pool.map(search_share, bounds[:-1], bounds[1:])), n)
    if n > keep:
        bad = np.array([is_in_sorted(ban, line) for ban, line in zip(banned, at, strict=True)])
        order = np.argsort(bad, axis=1, kind="stable")[:, :keep]
        at, rough = np.take_along_axis(at, order, 1), np.take_along_axis(rough, order, 1)
    return at, rough


def _rough_scores(
    store: VectorStore, queries: Shaped[Vectors, "B D"], only: Shaped[Rows, "n"] | None, n: int
) -> Shaped[Vectors, "B n"]:
    """Return the float32 sums of queries and the vectors at some positions."""
    if only is None:
        return queries @ store.vectors.T
    sums = np.empty((len(queries), n), np.float32)
    step = max(1, GATHER_NUMBERS // store.width)
    for start in range(0, n, step):
        sums[:, start : start + step] = queries @ store.vectors[only[start : start + step]].T
    return sums


def _score_again(
    store: VectorStore, query: Shaped[Vectors, "D"], k: int, only: Shaped[Rows, "n"] | None,
    banned: Shaped[Rows, "_"], slack: float, rough: Shaped[Vectors, "n"],
) -> TopK:  # fmt: skip
    """Return the rows and scores of one query from its float32 sums, by descending score. Changes `rough`."""
    rough[banned if only is None else np.searchsorted(only, banned)] = -np.inf
    places = np.flatnonzero((rough >= kth_largest(rough, k) - slack) & (rough > -np.inf))
    return best_of(store, query, places if only is None else only[places], k)


def best_of(store: VectorStore, query: Shaped[Vectors, "D"], positions: Shaped[Rows, "n"], k: int) -> TopK:
    """Return the `k` best of some positions by exact scores."""
    blocks = [positions[start : start + 4096] for start in range(0, max(1, len(positions)), 4096)]
    scores = [exact_scores(store.vectors[block], query) for block in blocks]
    return best(store.rows[positions], scores[0] if len(scores) == 1 else np.concatenate(scores), k)


def kth_largest(values: Shaped[Vectors, "n"] | Shaped[Rows, "n"], k: int) -> float:
    """Return the k-th largest value, -inf if there are no more than k."""
    return float(np.partition(values, len(values) - k)[len(values) - k]) if len(values) > k else -np.inf


def _merge_largest(
    parts: list[tuple[Shaped[Rows, "B _"], Shaped[Vectors, "B _"]]], n: int
) -> tuple[Shaped[Rows, "B m"], Shaped[Vectors, "B m"]]:
    """Merge positions and sums of several parts into the `n` largest, in descending order."""
    if len(parts) == 1:
        return parts[0]
    at, found = (np.concatenate(side, axis=1) for side in zip(*parts, strict=True))
    order = np.argsort(-found, axis=1)[:, :n]
    return np.take_along_axis(at, order, 1), np.take_along_axis(found, order, 1)
