"""Approximate search with FAISS.

FAISS ids are positions of the vector store. A selector hides removed positions; when the store is compacted, the FAISS
index is rebuilt.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Array, Rows, Shaped, Vectors
from twotower.errors import RunError
from twotower.files import layout
from twotower.index.approximate import ApproximateIndex, Effort
from twotower.index.faiss.engine_file import read_faiss, verify_file
from twotower.index.faiss.setup import FaissEngine, SearchParameters, Selector, faiss, faiss_settings
from twotower.index.protocol import IndexConfig
from twotower.index.top_k import SearchScope, TopK
from twotower.index.vector_store import Similarity

FAISS_MIN_VECTORS = 256
"""Smallest number of vectors that FAISS searches; fewer are too few for centroids, so search is exact."""


class FaissIndex(ApproximateIndex):
    """A vector store with a FAISS index over it."""

    types: ClassVar[tuple[str, ...]] = ()
    """FAISS classes of the engine."""

    def __init__(self, options: IndexConfig, width: int, metric: Similarity) -> None:
        super().__init__(options, width, metric)
        self._engine: FaissEngine | None = None
        self._mapped = False
        self._alive_bits: npt.NDArray[np.uint8] | None = None

    # The FAISS engine of a subclass

    @abstractmethod
    def _new_engine(self, vectors: Shaped[Vectors, "N D"]) -> FaissEngine:
        """Return an empty FAISS index trained on a sample of the vectors."""

    @abstractmethod
    def _faiss_params(self, factor: int, fetch: int, selector: Selector | None) -> SearchParameters:
        """Return FAISS search parameters: `search_params` times `factor`, for `fetch` candidates and a `selector`.

        `fetch` includes the positions that the selector rejects: a graph has them in its queue."""

    # Changes

    def _changed(self, kept: int | None) -> None:
        if kept is None:
            return
        self._alive_bits = None
        vectors = self._store.vectors
        size = len(vectors)
        if size < FAISS_MIN_VECTORS:
            self._engine = None
            return
        with faiss_settings(self.threads, self._engine_width):
            if self._engine is None or kept == 0 or (self._augmented and self._store.max_norm > self._norm_bound):
                self._norm_bound = 1.05 * self._store.max_norm
                self._engine, kept = self._new_engine(vectors), 0
                self._mapped = False
            elif self._mapped and kept < size:
                # FAISS aborts the process if vectors are added to a mapped index.
                self._engine, self._mapped = faiss().deserialize_index(faiss().serialize_index(self._engine)), False
            for start in range(kept, size, 1 << 18):
                self._engine.add(self._engine_vectors(vectors[start : start + (1 << 18)]))

    # Search

    def _prefers_exact(self, k: int, scope: SearchScope) -> bool:
        few = scope.only is not None and len(scope.only) <= len(self._store.rows) // 32
        return self._engine is None or few or super()._prefers_exact(k, scope)

    def _search_candidates(
        self, queries: Shaped[Vectors, "B D"], k: int, scope: SearchScope, effort: Effort, todo: Shaped[Rows, "b"],
        top: TopK,
    ) -> Shaped[Rows, "_"]:  # fmt: skip
        assert self._engine is not None
        banned, single = scope.banned, len(todo) == 1
        bits = self._permitted(scope.only, banned[todo[0]] if banned is not None and single else None)
        selector = None if bits is None else faiss().IDSelectorBitmap(bits)  # which reads `bits`
        rest = SearchScope(None, None if single else banned, scope.remaining)
        hidden = 0 if rest.banned is None else max(len(rest.banned[number]) for number in todo)
        fetch = min(len(self._store.rows), self._candidates(k, hidden) * effort.more)
        named = len(banned[todo[0]]) if banned is not None and single else 0
        params = self._faiss_params(effort.factor, min(len(self._store.rows), fetch + named), selector)
        engine = self._engine

        def find(some: Shaped[Vectors, "b W"]) -> Shaped[Rows, "b _"]:
            with faiss_settings(self.threads, self._engine_width):
                return engine.search(some, fetch, params=params)[1]

        return self._rescore_blocks(queries, k, rest, fetch, todo, top, find)

    def _permitted(self, only: Shaped[Rows, "_"] | None, banned: Shaped[Rows, "_"] | None) -> Shaped[Array, "_"] | None:
        """Return a bit for each position, set if a search may return it. None: all positions."""
        rows = self._store.rows
        if self._alive_bits is None:
            self._alive_bits = np.packbits(rows >= 0, bitorder="little")
        if only is not None:
            good = np.zeros(len(rows), bool)
            good[only] = True
            bits = np.packbits(good, bitorder="little")
        elif banned is not None and len(banned):
            bits = self._alive_bits.copy()
        elif len(self) == len(rows):
            return None
        else:
            bits = self._alive_bits
        if banned is not None and len(banned):
            np.bitwise_and.at(bits, banned >> 3, ~np.left_shift(1, banned & 7).astype(np.uint8))
        return bits

    # Files

    def _save_engine(self, folder: Path) -> None:
        super()._save_engine(folder)
        if self._engine is not None:
            try:
                faiss().write_index(self._engine, str(folder / layout.INDEX_FAISS))
            except RuntimeError as e:
                raise RunError(f"{folder}: cannot be written ({str(e).splitlines()[-1]})") from e

    def load_engine(self, folder: Path, mmap: bool, verify: bool) -> None:
        size = len(self._store.rows)
        if size < FAISS_MIN_VECTORS:
            return
        path = folder / layout.INDEX_FAISS
        if verify:
            verify_file(path)
        engine = read_faiss(path, mmap)
        if type(engine).__name__ not in self.types or (engine.ntotal, engine.d) != (size, self._engine_width):
            found = f"{type(engine).__name__} of {engine.ntotal:,} vectors of {engine.d} numbers"
            wanted = f"{' or '.join(self.types)} of {size:,} of {self._engine_width}, by {layout.INDEX_FACTS}"
            raise RunError(f"{path}: not the {self.kind} index of this folder ({found}, expected {wanted})")
        self._engine, self._mapped = engine, mmap
