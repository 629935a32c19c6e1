"""FAISS's brute-force search: kind "flat"."""

from __future__ import annotations

from twotower.arrays.types import Shaped, Vectors
from twotower.index.faiss.engine import FaissEngine, SearchParameters, Selector
from twotower.index.faiss.faiss_index import FaissIndex
from twotower.index.faiss.setup import faiss
from twotower.index.protocol import IndexConfig, Publication
from twotower.index.vector_store import Similarity


class Flat(IndexConfig):
    """FAISS's brute-force search. Use it to compare FAISS with `exact`, which gives the same answers faster."""

    kind = "flat"

    def empty(self, width: int, metric: Similarity, publication: Publication) -> FlatIndex:
        return FlatIndex(self, width, metric)


class FlatIndex(FaissIndex):
    """A FAISS index of whole vectors."""

    types = ("IndexFlatIP",)
    _augmented = False

    def _new_engine(self, vectors: Shaped[Vectors, "N D"]) -> FaissEngine:
        engine: FaissEngine = faiss().IndexFlatIP(self.width)
        return engine

    def _faiss_params(self, factor: int, fetch: int, selector: Selector | None) -> SearchParameters | None:
        return faiss().SearchParameters(sel=selector) if selector else None
