"""The HNSW graph of FAISS: kind "hnsw"."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from twotower.arrays.types import Shaped, Vectors
from twotower.index.faiss.engine import HnswEngine, SearchParameters, Selector
from twotower.index.faiss.faiss_index import FaissIndex
from twotower.index.faiss.setup import faiss
from twotower.index.protocol import Count, IndexConfig, Publication
from twotower.index.top_k import SearchScope
from twotower.index.vector_store import Similarity

EXACT_SHARE = 64
"""Share of the rows, one in so many, of which an exact search is less work than a search of the graph past as many banned ones."""


class Hnsw(IndexConfig):
    """Graph of nearest neighbours in layers (Malkov and Yashunin 2018); a search walks it with a beam of width `ef`.

    Use it where a search must be fast and building may take long: `m` and `ef_construction` buy recall with memory and
    time of building."""

    kind = "hnsw"

    m: Annotated[Count, Field(ge=2)] = Field(16, description="Neighbours of a node.")
    ef_construction: Annotated[Count, Field(ge=1)] = Field(100, description="Beam width of building.")

    def empty(self, width: int, metric: Similarity, publication: Publication) -> HnswIndex:
        return HnswIndex(self, width, metric)


class HnswIndex(FaissIndex):
    """A FAISS graph."""

    options: Hnsw
    default_search_params = {"ef": 64}
    types = ("IndexHNSWFlat",)

    def search_limits(self) -> dict[str, int]:
        return {"ef": max(64, min(len(self), 4096))}

    def _prefers_exact(self, k: int, scope: SearchScope) -> bool:
        banned = max(map(len, scope.banned or []), default=0)
        return super()._prefers_exact(k, scope) or max(self.search_params["ef"], banned * EXACT_SHARE) >= len(self)

    def _new_engine(self, vectors: Shaped[Vectors, "N D"]) -> HnswEngine:
        engine: HnswEngine = faiss().IndexHNSWFlat(self._engine_width, self.options.m, faiss().METRIC_L2)
        engine.hnsw.efConstruction = self.options.ef_construction
        return engine

    def _faiss_params(self, factor: int, fetch: int, selector: Selector | None) -> SearchParameters:
        ef = max(self.search_params["ef"] * factor, fetch)
        params: SearchParameters = faiss().SearchParametersHNSW(sel=selector, efSearch=ef)
        return params
