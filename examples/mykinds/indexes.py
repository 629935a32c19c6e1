"""An index of one's own: signatures of random hyperplanes."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from twotower.arrays.types import Array, Rows, Shaped, Vectors
from twotower.index.approximate import ApproximateIndex
from twotower.index.protocol import IndexConfig, Publication
from twotower.index.vector_store import Similarity

ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
"""Number of bits that are set in a byte."""


class Lsh(IndexConfig):
    """Locality-sensitive hashing: bit b of a signature is the side of hyperplane b (Charikar 2002).

    The share of bits in which two signatures differ estimates the angle between two vectors. A search compares the
    signature of the query with all others, 8 bytes each instead of a vector, and scores the nearest exactly.

    [index]
    kind = "mykinds.indexes:Lsh"
    bits = 128"""

    bits: int = Field(64, ge=8, le=4096, multiple_of=8, description="Number of hyperplanes.")

    def empty(self, width: int, metric: Similarity, publication: Publication) -> LshIndex:
        return LshIndex(self, width, metric)


class LshIndex(ApproximateIndex):
    """The signatures of all vectors. The base keeps the vectors, drops what a search bans, and scores what is
    proposed."""

    options: Lsh
    default_search_params = {"refine": 8}

    def search_limits(self) -> dict[str, int]:
        return {"refine": 64}

    def rebuild(self, vectors: Shaped[Vectors, "P W"]) -> None:
        rng = np.random.default_rng(0)
        self._planes = rng.standard_normal((vectors.shape[1], self.options.bits), np.float32)
        self._signatures = self._sign(vectors)

    def propose(self, queries: Shaped[Vectors, "b W"], n: int, factor: int) -> Shaped[Rows, "b n"]:
        distances = np.stack([ONES[self._signatures ^ own].sum(axis=1) for own in self._sign(queries)])
        return np.argpartition(distances, n - 1, axis=1)[:, :n]

    def _sign(self, vectors: Shaped[Vectors, "P W"]) -> Shaped[Array, "P _"]:
        return np.packbits(vectors @ self._planes > 0, axis=1)
