"""Inverted lists of whole vectors: kind "ivf"."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from twotower.arrays.types import Shaped, Vectors
from twotower.index.faiss.faiss_index import FaissIndex
from twotower.index.faiss.setup import FaissEngine, SearchParameters, Selector, faiss
from twotower.index.protocol import Count, IndexConfig, Publication
from twotower.index.vector_store import Similarity


class Ivf(IndexConfig):
    """Inverted lists (Sivic and Zisserman 2003): each vector is in the list of its nearest centroid, and a search
    visits the `nprobe` nearest lists.

    Use it from 50,000 to two million items: as fast as a graph at recall 0.95, and built in a fifth of the time."""

    kind = "ivf"

    nlist: Count = Field(0, description="Number of lists, each with at least eight vectors. 0: 4 sqrt(N).")

    def empty(self, width: int, metric: Similarity, publication: Publication) -> IvfIndex:
        return IvfIndex(self, width, metric)


class IvfIndex(FaissIndex):
    """FAISS lists of whole vectors."""

    options: Ivf
    default_search_params = {"nprobe": 16}
    types = ("IndexIVFFlat",)

    def search_limits(self) -> dict[str, int]:
        return {"nprobe": self._engine.nlist if self._engine is not None else 1}

    def _new_engine(self, vectors: Shaped[Vectors, "N D"]) -> FaissEngine:
        width = self._engine_width
        engine = faiss().IndexIVFFlat(faiss().IndexFlatL2(width), width, self._lists(len(vectors)))
        self._train(engine, vectors)
        return engine

    def _lists(self, n: int) -> int:
        return max(1, min(self.options.nlist or round(4 * n**0.5), n // 8))

    def _train(self, engine: FaissEngine, vectors: Shaped[Vectors, "N D"]) -> None:
        engine.cp.min_points_per_centroid = 1
        engine.cp.max_points_per_centroid = 64
        engine.cp.niter = 10
        engine.train(self._engine_vectors(_sample(vectors, 64 * engine.nlist)))

    def _faiss_params(self, factor: int, fetch: int, selector: Selector | None) -> SearchParameters:
        nprobe = min(self.search_limits()["nprobe"], self.search_params["nprobe"] * factor)
        return faiss().SearchParametersIVF(sel=selector, nprobe=nprobe)


def _sample(vectors: Shaped[Vectors, "N D"], n: int) -> Shaped[Vectors, "_ D"]:
    """Return a deterministic sample of at most `n` vectors."""
    if len(vectors) <= n:
        return vectors
    return vectors[np.sort(np.random.default_rng(0).choice(len(vectors), n, replace=False))]
