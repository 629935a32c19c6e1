"""The HNSW graph of FAISS."""

from __future__ import annotations

from twotower.arrays.types import Vectors
from twotower.index.faiss.engine import HnswEngine, SearchParameters, Selector
from twotower.index.faiss.faiss_index import FaissIndex
from twotower.index.faiss.setup import faiss
from twotower.index.top_k import SearchScope


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
