"""Types of the FAISS objects that this package uses; FAISS has no complete stubs."""

from __future__ import annotations

from typing import Protocol

from twotower.arrays.types import Rows, Shaped, Vectors


class Selector(Protocol):
    """Positions that a search may return."""


class SearchParameters(Protocol):
    """Parameters of one search."""

    sel: Selector | None


class FaissEngine(Protocol):
    """A FAISS index of vectors of dimension `d`."""

    d: int
    ntotal: int
    is_trained: bool

    def add(self, x: Shaped[Vectors, "n W"]) -> None:
        """Add vectors at the next positions."""

    def train(self, x: Shaped[Vectors, "n W"]) -> None:
        """Learn centroids from vectors."""

    def search(
        self, x: Shaped[Vectors, "B W"], k: int, *, params: SearchParameters | None = None
    ) -> tuple[Shaped[Vectors, "B k"], Shaped[Rows, "B k"]]:
        """Return distances or scores, and positions, -1 where fewer are found."""


class ClusteringParameters(Protocol):
    """Settings of k-means."""

    min_points_per_centroid: int
    max_points_per_centroid: int
    niter: int


class IvfEngine(FaissEngine, Protocol):
    """A FAISS index of inverted lists."""

    nlist: int
    cp: ClusteringParameters


class ProductQuantizer(Protocol):
    """Codes of parts of a vector."""

    cp: ClusteringParameters


class IvfPqEngine(IvfEngine, Protocol):
    """A FAISS index of inverted lists of product-quantised vectors."""

    pq: ProductQuantizer


class HnswGraph(Protocol):
    """Settings of a graph."""

    efConstruction: int


class HnswEngine(FaissEngine, Protocol):
    """A FAISS graph."""

    hnsw: HnswGraph
