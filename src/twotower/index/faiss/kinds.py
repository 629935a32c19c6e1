"""Kinds of FAISS index: brute force, the HNSW graph, and inverted lists of whole or product-quantised vectors."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Vectors
from twotower.index.faiss.engine import FaissEngine, HnswEngine, IvfEngine, IvfPqEngine, SearchParameters, Selector
from twotower.index.faiss.faiss_index import FaissIndex
from twotower.index.faiss.setup import faiss
from twotower.index.top_k import SearchScope


class FlatIndex(FaissIndex):
    """FAISS's brute-force search."""

    kind = "flat"
    types = ("IndexFlatIP",)
    _augmented = False

    def _new_engine(self, vectors: Vectors) -> FaissEngine:
        engine: FaissEngine = faiss.IndexFlatIP(self.width)
        return engine

    def _faiss_params(self, factor: int, fetch: int, selector: Selector | None) -> SearchParameters | None:
        return faiss.SearchParameters(sel=selector) if selector else None


class HnswIndex(FaissIndex):
    """HNSW graph: `m` neighbours a node, beam width `ef_construction` to build it and `ef` to search it."""

    kind = "hnsw"
    defaults = {"m": 16, "ef_construction": 100}
    default_search_params = {"ef": 64}
    types = ("IndexHNSWFlat",)

    def search_limits(self) -> dict[str, int]:
        return {"ef": max(64, min(len(self), 4096))}

    def _prefers_exact(self, k: int, scope: SearchScope) -> bool:
        return super()._prefers_exact(k, scope) or self.search_params["ef"] >= len(self)

    def _new_engine(self, vectors: Vectors) -> HnswEngine:
        engine: HnswEngine = faiss.IndexHNSWFlat(self._engine_width, max(2, self.params["m"]), faiss.METRIC_L2)
        engine.hnsw.efConstruction = max(1, self.params["ef_construction"])
        return engine

    def _faiss_params(self, factor: int, fetch: int, selector: Selector | None) -> SearchParameters:
        ef = max(self.search_params["ef"] * factor, fetch)
        params: SearchParameters = faiss.SearchParametersHNSW(sel=selector, efSearch=ef)
        return params


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
