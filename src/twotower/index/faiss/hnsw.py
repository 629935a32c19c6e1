"""The HNSW graph of FAISS: kind "hnsw"."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from twotower.arrays.types import Shaped, Vectors
from twotower.index.faiss.faiss_index import FaissIndex
from twotower.index.faiss.setup import FaissEngine, SearchParameters, Selector, faiss
from twotower.index.protocol import Count, IndexConfig, Publication
from twotower.index.top_k import SearchScope
from twotower.index.vector_store import Similarity

EXACT_SHARE = 64
"""Search is exact if a query bans at least one of this number of rows: the graph would visit all banned ones."""


class Hnsw(IndexConfig):
    """Layered graph of nearest neighbours (Malkov and Yashunin 2018); a search walks it with a beam of width `ef`.

    Use it if search must be fast and building may be slow. Larger `m` and `ef_construction` raise recall, memory and
    building time."""

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

    def _new_engine(self, vectors: Shaped[Vectors, "N D"]) -> FaissEngine:
        graph = faiss().IndexHNSWFlat(self._engine_width, self.options.m, faiss().METRIC_L2)
        graph.hnsw.efConstruction = self.options.ef_construction
        return graph

    def _faiss_params(self, factor: int, fetch: int, selector: Selector | None) -> SearchParameters:
        ef = max(self.search_params["ef"] * factor, fetch)
        return faiss().SearchParametersHNSW(sel=selector, efSearch=ef)
