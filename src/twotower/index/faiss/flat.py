"""Brute-force search by FAISS."""

from __future__ import annotations

from twotower.arrays.types import Vectors
from twotower.index.faiss.engine import FaissEngine, SearchParameters, Selector
from twotower.index.faiss.faiss_index import FaissIndex
from twotower.index.faiss.setup import faiss


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
