"""Approximate search with FAISS.

FAISS ids are positions of the vector store. Removed positions stay in FAISS and are hidden by a selector; when the store
is compacted, the FAISS index is rebuilt.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from twotower.arrays.sets import is_in_sorted
from twotower.arrays.types import Rows, Vectors
from twotower.errors import RunError
from twotower.files import layout
from twotower.index.approximate import ApproximateIndex, Effort
from twotower.index.faiss.engine import FaissEngine, SearchParameters, Selector
from twotower.index.faiss.engine_file import read_faiss, verify_file
from twotower.index.faiss.setup import faiss, faiss_settings
from twotower.index.top_k import RESCORED_NUMBERS, SearchScope, TopK, rescore
from twotower.index.vector_store import Metric

FAISS_MIN_VECTORS = 256
"""Smallest index that FAISS searches; with fewer vectors search is exact, since centroids cannot be learned."""
EXACT_MAX_ROWS = 8192
"""Default of `exact_max_rows`: few rows pass a selector, and a graph search loses its connections."""
Bitmap = npt.NDArray[np.uint8]


class FaissIndex(ApproximateIndex):
    """A vector store with a FAISS index over it."""

    types: ClassVar[tuple[str, ...]] = ()
    """FAISS classes of the engine."""

    def __init__(self, width: int, metric: Metric, params: dict[str, int] | None = None) -> None:
        super().__init__(width, metric, params)
        self._engine: FaissEngine | None = None
        self._mapped = False
        self._alive_bits: Bitmap | None = None
        self.exact_max_rows = EXACT_MAX_ROWS
        """Number of allowed rows up to which a search is exact; at least a 32nd of all rows."""

    # The FAISS engine of a subclass

    @abstractmethod
    def _new_engine(self, vectors: Vectors) -> FaissEngine:
        """Return an empty FAISS index trained on a sample of vectors (N, D)."""

    @abstractmethod
    def _faiss_params(self, factor: int, fetch: int, selector: Selector | None) -> SearchParameters | None:
        """Return FAISS search parameters: `search_params` times `factor`, for `fetch` candidates that pass `selector`."""

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
                # FAISS aborts the process where a mapped index is added to.
                self._engine, self._mapped = faiss.deserialize_index(faiss.serialize_index(self._engine)), False
            for start in range(kept, size, 1 << 18):
                self._engine.add(self._engine_vectors(vectors[start : start + (1 << 18)]))

    # Search

    def _prefers_exact(self, k: int, scope: SearchScope) -> bool:
        few = max(self.exact_max_rows, len(self._store.rows) // 32)
        return self._engine is None or (scope.only is not None and len(scope.only) <= few)

    def _search_candidates(
        self, queries: Vectors, k: int, scope: SearchScope, effort: Effort, todo: Rows, top: TopK
    ) -> Rows:
        assert self._engine is not None
        rows, short = self._store.rows, []
        banned = scope.of(todo).banned
        only_ban = banned[0] if banned is not None and len(todo) == 1 else None
        selector, _alive_bits = self._selector(scope.only, only_ban)
        extra = 0 if banned is None or only_ban is not None else max(map(len, banned))
        fetch = min(len(rows), self._candidates(k, extra) * effort.more)
        params = self._faiss_params(effort.factor, fetch, selector)
        step = max(1, RESCORED_NUMBERS // (fetch * self.width))
        for start in range(0, len(todo), step):
            some = todo[start : start + step]
            with faiss_settings(self.threads, self._engine_width):
                _, at = self._engine.search(self._engine_queries(queries[some]), fetch, params=params)
            good = (at >= 0) & (at < len(rows))
            at[~good] = 0
            good &= rows[at] >= 0
            if extra and banned is not None:
                for line, ban in enumerate(banned[start : start + step]):
                    good[line] &= ~is_in_sorted(ban, at[line])
            top.rows[some], top.scores[some] = rescore(self._store, queries[some], at, k, good)
            short.append(some[good.sum(axis=1) < np.minimum(k, scope.remaining[some])])
        return np.concatenate(short)

    def _selector(self, only: Rows | None, banned: Rows | None) -> tuple[Selector | None, Bitmap | None]:
        """Return a FAISS selector, None for all positions, and the bit array that it reads, which must stay alive."""
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
            return None, None
        else:
            bits = self._alive_bits
        if banned is not None and len(banned):
            np.bitwise_and.at(bits, banned >> 3, ~np.left_shift(1, banned & 7).astype(np.uint8))
        return faiss.IDSelectorBitmap(bits), bits

    # Files

    def _save_engine(self, folder: Path) -> None:
        super()._save_engine(folder)
        if self._engine is not None:
            try:
                faiss.write_index(self._engine, str(folder / layout.INDEX_FAISS))
            except RuntimeError as e:
                raise RunError(f"{folder}: cannot be written ({str(e).splitlines()[-1]})") from e

    @classmethod
    def restore(cls, folder: Path, facts: dict[str, JsonValue], mmap: bool, verify: bool) -> Self:
        index = super().restore(folder, facts, mmap, verify)
        if len(index._store.rows) < FAISS_MIN_VECTORS:
            return index
        path = folder / layout.INDEX_FAISS
        if verify:
            verify_file(path)
        engine = read_faiss(path, mmap)
        if type(engine).__name__ not in cls.types or (engine.ntotal, engine.d) != (
            len(index._store.rows), index._engine_width,
        ):  # fmt: skip
            raise RunError(f"{path}: not the {cls.kind} index of this folder ({type(engine).__name__})")
        index._engine, index._mapped = engine, mmap
        return index
