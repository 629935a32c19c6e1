"""Inverted lists of product-quantised vectors: kind "ivfpq"."""

from __future__ import annotations

from twotower.arrays.types import Shaped, Vectors
from twotower.index.faiss.ivf import Ivf, IvfIndex
from twotower.index.faiss.setup import FaissEngine, faiss
from twotower.index.protocol import Publication
from twotower.index.vector_store import Similarity


class IvfPq(Ivf):
    """Inverted lists as in `ivf`, of vectors product-quantised to 4 bits for two dimensions (Jégou et al. 2011; scan of
    André et al. 2015). `refine` times k candidates are re-scored exactly.

    Use it above two million items, where memory limits a search of whole vectors."""

    kind = "ivfpq"

    def empty(self, width: int, metric: Similarity, publication: Publication) -> IvfPqIndex:
        return IvfPqIndex(self, width, metric)


class IvfPqIndex(IvfIndex):
    """FAISS lists of product-quantised vectors."""

    default_search_params = {"nprobe": 16, "refine": 8}
    types = ("IndexIVFPQFastScan",)

    def search_limits(self) -> dict[str, int]:
        return super().search_limits() | {"refine": 64}

    @property
    def _engine_width(self) -> int:
        return super()._engine_width + super()._engine_width % 2

    def _new_engine(self, vectors: Shaped[Vectors, "N D"]) -> FaissEngine:
        width = self._engine_width
        engine = faiss().IndexIVFPQFastScan(
            faiss().IndexFlatL2(width), width, self._lists(len(vectors)), width // 2, 4, faiss().METRIC_L2
        )
        engine.pq.cp.min_points_per_centroid = 1
        self._train(engine, vectors)
        return engine
