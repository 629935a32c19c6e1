"""Inverted lists of FAISS, of whole or product-quantised vectors."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Vectors
from twotower.index.faiss.engine import IvfEngine, IvfPqEngine, SearchParameters, Selector
from twotower.index.faiss.faiss_index import FaissIndex
from twotower.index.faiss.setup import faiss


class IvfIndex(FaissIndex):
    """Inverted lists of `nlist` centroids (0: 4 sqrt(N)), of which a search visits the `nprobe` nearest."""

    kind = "ivf"
    defaults = {"nlist": 0}
    default_search_params = {"nprobe": 16}
    types = ("IndexIVFFlat",)

    _engine: IvfEngine | None

    def search_limits(self) -> dict[str, int]:
        return {"nprobe": self._engine.nlist if self._engine is not None else 1}

    def _new_engine(self, vectors: Vectors) -> IvfEngine:
        engine: IvfEngine = faiss.IndexIVFFlat(
            faiss.IndexFlatL2(self._engine_width), self._engine_width, self._lists(vectors)
        )
        self._train(engine, vectors)
        return engine

    def _lists(self, vectors: Vectors) -> int:
        nlist = self.params["nlist"] or round(4 * len(vectors) ** 0.5)
        return max(1, min(nlist, len(vectors) // 8))

    def _train(self, engine: IvfEngine, vectors: Vectors) -> None:
        engine.cp.min_points_per_centroid = 1
        engine.cp.max_points_per_centroid = 64
        engine.cp.niter = 10
        engine.train(self._engine_vectors(_sample(vectors, 64 * engine.nlist)))

    def _faiss_params(self, factor: int, fetch: int, selector: Selector | None) -> SearchParameters:
        nprobe = min(self.search_limits()["nprobe"], self.search_params["nprobe"] * factor)
        params: SearchParameters = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
        return params


class IvfPqIndex(IvfIndex):
    """Inverted lists as in `ivf`, of vectors product-quantised to 4 bits for two dimensions; `refine` times k candidates
    are re-scored exactly."""

    kind = "ivfpq"
    default_search_params = {"nprobe": 16, "refine": 8}
    types = ("IndexIVFPQFastScan",)

    def search_limits(self) -> dict[str, int]:
        return super().search_limits() | {"refine": 64}

    @property
    def _engine_width(self) -> int:
        return super()._engine_width + super()._engine_width % 2

    def _new_engine(self, vectors: Vectors) -> IvfPqEngine:
        width = self._engine_width
        engine: IvfPqEngine = faiss.IndexIVFPQFastScan(
            faiss.IndexFlatL2(width), width, self._lists(vectors), width // 2, 4, faiss.METRIC_L2
        )
        engine.pq.cp.min_points_per_centroid = 1
        self._train(engine, vectors)
        return engine


def _sample(vectors: Vectors, n: int) -> Vectors:
    """Return at most `n` of the vectors, a deterministic sample."""
    if len(vectors) <= n:
        return vectors
    return vectors[np.sort(np.random.default_rng(0).choice(len(vectors), n, replace=False))]
