"""The base of indexes whose engine proposes candidates: FAISS and Milvus. Candidates are re-scored exactly.

If the engine returns too few candidates, because few rows are allowed or the probed lists are empty, it is asked for more,
and at last exact search completes the answer, so no answer is short.

Metric "dot": graphs and centroids serve inner products badly, because long vectors are neighbours of all others; where
users do not resemble items a graph finds less than a third of the true answer. So each vector x is augmented by one
dimension, sqrt(M² - |x|²) with M above all norms, and each query by a zero (Bachrach et al. 2014). The squared
distance is then |q|² + M² - 2 q·x, so nearest means highest score. A vector with a norm above M rebuilds the engine.
If a few norms are far above the rest, all other vectors lie close together in the augmented space, and a graph may miss a
fifth of the answer even with `ef` = 1000; the recall check at publishing refuses such an index.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

from twotower.arrays.types import Rows, Vectors
from twotower.index.description import AugmentedDescription, IndexDescription
from twotower.index.exact import ExactIndex
from twotower.index.top_k import SearchScope, TopK
from twotower.index.vector_store import Metric


class Effort(NamedTuple):
    """Size of one attempt to find enough candidates."""

    factor: int
    """Factor of the search parameters."""
    more: int
    """Factor of the number of candidates."""
    name_banned: bool = False
    """True if the engine is told the banned rows; else they are dropped from its candidates."""


class ApproximateIndex(ExactIndex):
    """A vector store with an engine that proposes candidates; implements `protocol.Index` approximately."""

    default_search_params: ClassVar[dict[str, int]] = {}
    """Search parameters of a new index."""
    description_type: ClassVar[type[IndexDescription]] = AugmentedDescription
    efforts: ClassVar[tuple[Effort, ...]] = (Effort(1, 1), Effort(4, 4), Effort(16, 16))

    def __init__(self, width: int, metric: Metric, params: dict[str, int] | None = None) -> None:
        super().__init__(width, metric, params)
        self.search_params = dict(self.default_search_params)
        self._norm_bound = 0.0
        """M, the norm of every augmented vector."""

    @property
    def _augmented(self) -> bool:
        """True if vectors have one more dimension."""
        return self.metric == "dot"

    @property
    def _engine_width(self) -> int:
        """Dimension of the vectors in the engine."""
        return self.width + self._augmented

    def _engine_vectors(self, vectors: Vectors) -> Vectors:
        """Return vectors (n, D) as the engine stores them, (n, `_engine_width`)."""
        wide = self._engine_queries(vectors)
        if self._augmented:
            squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
            wide[:, self.width] = np.sqrt(np.maximum(self._norm_bound**2 - squares, 0.0))
        return wide

    def _engine_queries(self, queries: Vectors) -> Vectors:
        """Return queries (n, D) with zeros up to `_engine_width`."""
        if self._engine_width == self.width:
            return queries
        wide = np.zeros((len(queries), self._engine_width), np.float32)
        wide[:, : self.width] = queries
        return wide

    @abstractmethod
    def _prefers_exact(self, k: int, scope: SearchScope) -> bool:
        """Return True if exact search is less work."""

    @abstractmethod
    def _search_candidates(
        self, queries: Vectors, k: int, scope: SearchScope, effort: Effort, todo: Rows, top: TopK
    ) -> Rows:
        """Fill `top` for the queries `todo` with re-scored candidates; return the queries with too few."""

    def _search(self, queries: Vectors, k: int, scope: SearchScope, exact: bool) -> TopK:
        if exact or 4 * k > scope.remaining.max(initial=0) or self._prefers_exact(k, scope):
            return self._search_exactly(queries, k, scope)
        top, todo = TopK.empty(len(queries), k), np.arange(len(queries))
        for effort in self.efforts:
            todo = self._search_candidates(queries, k, scope, effort, todo, top)
            if not len(todo):
                return top
        top.rows[todo], top.scores[todo] = self._search_exactly(queries[todo], k, scope.of(todo))
        return top

    def _candidates(self, k: int, banned: int = 0) -> int:
        """Return the number of candidates to ask for, with room for the `banned` rows of a query."""
        # An eighth more: float32 rounding in the engine may exchange candidates near the k-th.
        return (k + max(8, k // 8) + banned) * self.search_params.get("refine", 1)

    def describe(self) -> AugmentedDescription:
        return AugmentedDescription(**super().describe().model_dump(), norm_bound=self._norm_bound)

    def _set_description(self, facts: IndexDescription) -> None:
        super()._set_description(facts)
        if isinstance(facts, AugmentedDescription):
            self._norm_bound = facts.norm_bound
