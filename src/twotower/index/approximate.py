"""The base of indexes whose engine proposes candidates, such as FAISS and Milvus. Candidates are re-scored exactly.

If the engine returns too few candidates, because few rows are allowed or the probed lists are empty, it searches for
more. At last exact search completes the answer, so no answer is short.

Metric "dot": graphs and centroids serve inner products badly, because long vectors are neighbours of all others. If
users do not resemble items, a graph finds less than a third of the true answer. So each vector x is augmented by one
dimension, sqrt(M² - |x|²) with M above all norms, and each query by a zero (Bachrach et al. 2014). The squared distance
is then |q|² + M² - 2 q·x, so nearest means highest score. If a few
norms are far above the rest, all other vectors are close together in the augmented space, and a graph may miss a fifth
of the answer even with `ef` = 1000; the recall check at publishing refuses such an index.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from twotower.arrays.sets import is_in_sorted
from twotower.arrays.types import Rows, Shaped, Vectors
from twotower.index.exact import Index
from twotower.index.protocol import IndexConfig
from twotower.index.top_k import RESCORED_NUMBERS, SearchScope, TopK, rescore
from twotower.index.vector_store import Similarity

EXACT_MAX_ROWS = 8192
"""Default of `exact_max_rows`. If few rows pass a filter, a graph search loses its connections."""


class Effort(NamedTuple):
    """Size of one attempt to find enough candidates."""

    factor: int
    """Factor of the search parameters."""
    more: int
    """Factor of the number of candidates."""
    name_banned: bool = False
    """True if the engine filters the banned rows; else they are dropped from its candidates."""


class ApproximateIndex(Index):
    """A vector store with an engine that proposes candidates; an approximate `Index`.

    A subclass defines `rebuild` and `propose`, or, for more control, `_build_engine` and `_search_candidates`.
    """

    batch_invariant = False  # the number of candidates depends on the banned rows of all queries
    default_search_params: ClassVar[dict[str, int]] = {}
    """Search parameters of a new index. `refine`: number of candidates for each row of the answer."""
    efforts: ClassVar[tuple[Effort, ...]] = (Effort(1, 1), Effort(4, 4), Effort(16, 16))

    def __init__(self, options: IndexConfig, width: int, metric: Similarity) -> None:
        super().__init__(options, width, metric)
        self.search_params = dict(self.default_search_params)
        self.exact_max_rows = EXACT_MAX_ROWS
        """Number of allowed rows up to which a search is exact."""

    # The engine of a subclass

    def rebuild(self, vectors: Shaped[Vectors, "N W"]) -> None:
        """Build the engine of the vectors at all positions of the store."""
        raise NotImplementedError

    def propose(self, queries: Shaped[Vectors, "b W"], n: int, factor: int) -> Shaped[Rows, "b _"]:
        """Return up to `n` positions near each query, in any order, padded with -1. `factor` multiplies
        `search_params`."""
        raise NotImplementedError

    def _build_engine(self) -> None:
        if len(self):
            self.rebuild(self._engine_vectors(self._store.vectors))

    def load_engine(self, folder: Path, verify: bool) -> None:
        self._build_engine()

    @property
    def _augmented(self) -> bool:
        """True if vectors have one more dimension."""
        return self.metric == "dot"

    @property
    def _engine_width(self) -> int:
        """Dimension of the vectors in the engine."""
        return self.width + self._augmented

    def _engine_vectors(self, vectors: Shaped[Vectors, "n D"]) -> Shaped[Vectors, "n W"]:
        """Return vectors of dimension `_engine_width`, as the engine stores them."""
        wide = self._engine_queries(vectors)
        if self._augmented:
            squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
            bound = 1.05 * self._store.max_norm  # M
            wide[:, self.width] = np.sqrt(np.maximum(bound**2 - squares, 0.0))
        return wide

    def _engine_queries(self, queries: Shaped[Vectors, "n D"]) -> Shaped[Vectors, "n W"]:
        """Return queries with zeros up to `_engine_width`."""
        if self._engine_width == self.width:
            return queries
        wide = np.zeros((len(queries), self._engine_width), np.float32)
        wide[:, : self.width] = queries
        return wide

    def _prefers_exact(self, k: int, scope: SearchScope) -> bool:
        """Return True if exact search is less work."""
        return scope.only is not None and len(scope.only) <= self.exact_max_rows

    def _search(self, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope, exact: bool) -> TopK:
        if exact or 4 * k > scope.remaining.max(initial=0) or self._prefers_exact(k, scope):
            return self._search_exactly(queries, k, scope)
        top, todo = TopK.empty(len(queries), k), np.arange(len(queries))
        for effort in self.efforts:
            todo = self._search_candidates(queries, k, scope, effort, todo, top)
            if not len(todo):
                return top
        top.rows[todo], top.scores[todo] = self._search_exactly(queries[todo], k, scope.of(todo))
        return top

    def _search_candidates(
        self, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope, effort: Effort, todo: Shaped[Rows, "b"],
        top: TopK,
    ) -> Shaped[Rows, "_"]:  # fmt: skip
        """Fill `top` for the queries `todo` with re-scored candidates; return the queries with too few."""
        banned = max(map(len, scope.banned or []), default=0)
        fetch = min(len(self), self._candidates(k, banned) * effort.more)
        return self._rescore_blocks(
            queries, k, scope, fetch, todo, top, lambda q: self.propose(q, fetch, effort.factor)
        )

    def _rescore_blocks(
        self, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope, fetch: int, todo: Shaped[Rows, "b"],
        top: TopK, find: Callable[[Shaped[Vectors, "b W"]], Shaped[Rows, "b _"]],
    ) -> Shaped[Rows, "_"]:  # fmt: skip
        """Fill `top` with the re-scored `fetch` positions that `find` returns for a block of queries; return the
        queries with too few."""
        step, short = max(1, RESCORED_NUMBERS // (fetch * self.width)), []
        for start in range(0, len(todo), step):
            some = todo[start : start + step]
            short.append(self._rescore(queries, k, scope, some, find(self._engine_queries(queries[some])), top))
        return np.concatenate(short)

    def _rescore(
        self, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope, some: Shaped[Rows, "b"],
        at: Shaped[Rows, "b n"], top: TopK,
    ) -> Shaped[Rows, "_"]:  # fmt: skip
        """Fill `top` for the queries `some` with the best of the positions `at`; return the queries with too few."""
        good = (at >= 0) & (at < len(self))
        at[~good] = 0
        if scope.only is not None:
            good &= is_in_sorted(scope.only, at)
        if scope.banned is not None:
            for line, number in enumerate(some.tolist()):
                good[line] &= ~is_in_sorted(scope.banned[number], at[line])
        top.rows[some], top.scores[some] = rescore(self._store, queries[some], at, k, good)
        return np.compress(good.sum(axis=1) < np.minimum(k, scope.remaining[some]), some)

    def _candidates(self, k: int, banned: int = 0) -> int:
        """Return the number of candidates to fetch, with room for the `banned` rows of a query."""
        # An eighth more: float32 rounding in the engine may exchange candidates near the k-th.
        return (k + max(8, k // 8) + banned) * self.search_params.get("refine", 1)
