"""Approximate search with FAISS, and the files of its indexes.

FAISS ids are positions of the vector store.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np

from twotower import limited_process
from twotower.arrays.pieces import pieces
from twotower.arrays.types import Array, Rows, Shaped, Vectors
from twotower.errors import RunError
from twotower.files import inspections, layout
from twotower.files.readers import file_digest, read_checked
from twotower.index.approximate import ApproximateIndex, Effort
from twotower.index.faiss.setup import FaissEngine, SearchParameters, Selector, faiss, faiss_settings
from twotower.index.protocol import IndexConfig
from twotower.index.top_k import SearchScope, TopK
from twotower.index.vector_store import Similarity

FAISS_MIN_VECTORS = 256
"""Smallest number of vectors that FAISS searches; fewer are too few for centroids, so search is exact."""
FILE_ARRAY_MAX_BYTES = 1 << 40
FILE_LOOP_MAX_ITEMS = 1 << 31
"""Limits for reading a FAISS file: bytes of one array, items of one loop."""
VERIFY_FUNCTION = "twotower.index.faiss.faiss_index:load_and_search"
"""Function that the child process runs."""


class FaissIndex(ApproximateIndex):
    """A vector store with a FAISS index over it."""

    types: ClassVar[tuple[str, ...]] = ()
    """FAISS classes of the engine."""

    def __init__(self, options: IndexConfig, width: int, metric: Similarity) -> None:
        super().__init__(options, width, metric)
        self._engine: FaissEngine | None = None

    # The FAISS engine of a subclass

    @abstractmethod
    def _new_engine(self, vectors: Shaped[Vectors, "N D"]) -> FaissEngine:
        """Return an empty FAISS index trained on a sample of the vectors."""

    @abstractmethod
    def _faiss_params(self, factor: int, fetch: int, selector: Selector | None) -> SearchParameters:
        """Return FAISS search parameters: `search_params` times `factor`, for `fetch` candidates and a `selector`.

        `fetch` includes the positions that the selector rejects: a graph has them in its queue."""

    def _build_engine(self) -> None:
        vectors = self._store.vectors
        if len(vectors) >= FAISS_MIN_VECTORS:
            with faiss_settings(self.threads, self._engine_width):
                engine = self._engine = self._new_engine(vectors)
                for part in pieces(len(vectors), 1 << 18):
                    engine.add(self._engine_vectors(vectors[part]))

    # Search

    def _prefers_exact(self, k: int, scope: SearchScope) -> bool:
        few = scope.only is not None and len(scope.only) <= len(self) // 32
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
        fetch = min(len(self), self._candidates(k, hidden) * effort.more)
        named = len(banned[todo[0]]) if banned is not None and single else 0
        params = self._faiss_params(effort.factor, min(len(self), fetch + named), selector)
        engine = self._engine

        def find(some: Shaped[Vectors, "b W"]) -> Shaped[Rows, "b _"]:
            with faiss_settings(self.threads, self._engine_width):
                found: Rows = engine.search(some, fetch, params=params)[1]
            return found

        return self._rescore_blocks(queries, k, rest, fetch, todo, top, find)

    def _permitted(self, only: Shaped[Rows, "_"] | None, banned: Shaped[Rows, "_"] | None) -> Shaped[Array, "_"] | None:
        """Return a bit for each position, set if a search may return it. None: all positions."""
        if only is not None:
            good = np.zeros(len(self), bool)
            good[only] = True
            bits = np.packbits(good, bitorder="little")
        elif banned is None or not len(banned):
            return None
        else:
            bits = np.full(-(-len(self) // 8), 255, np.uint8)
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

    def load_engine(self, folder: Path, verify: bool) -> None:
        size = len(self)
        if size < FAISS_MIN_VECTORS:
            return
        path = folder / layout.INDEX_FAISS
        if verify:
            verify_file(path)
        engine = read_faiss(path)
        if type(engine).__name__ not in self.types or (engine.ntotal, engine.d) != (size, self._engine_width):
            found = f"{type(engine).__name__} of {engine.ntotal:,} vectors of {engine.d} numbers"
            wanted = f"{' or '.join(self.types)} of {size:,} of {self._engine_width}, by {layout.INDEX_FACTS}"
            raise RunError(f"{path}: not the {self.kind} index of this folder ({found}, expected {wanted})")
        self._engine = engine


def read_faiss(path: Path, mmap: bool = True) -> FaissEngine:
    """Read a FAISS index from a file within size limits, memory-mapped if `mmap`, and check its structure.

    Raises RunError. A damaged file can still crash the process: `verify_file` reads untrusted files in a child process.
    """
    try:
        size = path.stat().st_size
        faiss().set_deserialization_vector_byte_limit(min(FILE_ARRAY_MAX_BYTES, 2 * size + (1 << 20)))
        faiss().set_deserialization_loop_limit(min(FILE_LOOP_MAX_ITEMS, size + (1 << 20)))
        engine: FaissEngine = faiss().read_index(str(path), faiss().IO_FLAG_MMAP_IFC if mmap else 0)
        damage = find_damage(engine)
    except (OSError, RuntimeError, ValueError, MemoryError, AttributeError, OverflowError) as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise RunError(f"{path}: not a usable FAISS index ({lines[-1][:200]})") from e
    if damage:
        raise RunError(f"{path}: not a usable FAISS index ({damage})")
    return engine


def load_and_search(path: Path) -> str:
    """Load a FAISS file and search it. Returns its SHA-256; raises RunError."""
    digest = file_digest(path)
    engine = read_faiss(path, mmap=False)
    try:
        engine.search(np.ones((2, engine.d), np.float32), 10)
    except Exception as e:
        raise RunError(f"{path}: a search fails ({e})") from e
    return digest


def verify_file(path: Path, *, timeout: float = 120.0, function: str = VERIFY_FUNCTION) -> None:
    """Load and search a FAISS file in a child process, unless the same content has passed this before.

    `timeout` in seconds; `function` as "module:name". The address space is limited to 2 GiB and four times the file.
    Raises RunError if that process fails, dies or exceeds a limit, or if the file changes meanwhile.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    digest, memory = read_checked(path, file_digest), (2 << 30) + 4 * path.stat().st_size
    passed = inspections.pass_name(function, Path(__file__).parent, [digest, timeout, faiss().__version__])
    if inspections.has_passed(passed):
        return
    result = limited_process.run_limited(function, [path], timeout=timeout, memory=memory)[path]
    error = result.error or ("" if result.value == digest else "it was changed while it was read")
    if error:
        raise RunError(error if str(path) in error else f"{path}: not a usable FAISS index ({error})")
    inspections.keep_pass(passed)


def find_damage(index: FaissEngine) -> str:
    """Return the part of a loaded index that would make a search read outside its memory, an empty string for none."""
    engine = faiss().downcast_index(index)
    if not engine.is_trained or engine.d < 1 or engine.ntotal < 0:
        return "not trained"
    if isinstance(engine, faiss().IndexFlat):
        return "" if engine.codes.size() == engine.ntotal * engine.d * 4 else "codes do not fit"
    if isinstance(engine, faiss().IndexHNSW):
        graph, storage = engine.hnsw, faiss().downcast_index(engine.storage)
        if not isinstance(storage, faiss().IndexFlat) or (storage.d, storage.ntotal) != (engine.d, engine.ntotal):
            return "storage does not fit"
        if find_damage(storage):
            return find_damage(storage)
        n = engine.ntotal
        levels, offsets = faiss().vector_to_array(graph.levels), faiss().vector_to_array(graph.offsets)
        per_level = faiss().vector_to_array(graph.cum_nneighbor_per_level)
        if len(levels) != n or len(offsets) != n + 1 or not 0 <= graph.entry_point < n:
            return "graph does not fit"
        if levels.min() < 1 or levels.max() >= len(per_level) or graph.max_level != levels[graph.entry_point] - 1:
            return "levels do not fit"
        if per_level[0] != 0 or (np.diff(per_level) < 0).any():
            return "levels do not fit"
        if offsets[0] != 0 or (np.diff(offsets.astype(np.int64)) != per_level[levels]).any():
            return "offsets do not fit"
        neighbours = faiss().vector_to_array(graph.neighbors)
        if len(neighbours) != offsets[-1] or neighbours.min(initial=0) < -1 or neighbours.max(initial=0) >= n:
            return "neighbours do not fit"
        return ""
    if isinstance(engine, faiss().IndexIVF):
        quantizer = faiss().downcast_index(engine.quantizer)
        if not isinstance(quantizer, faiss().IndexFlat) or (quantizer.d, quantizer.ntotal) != (engine.d, engine.nlist):
            return "centroids do not fit"
        if find_damage(quantizer):
            return find_damage(quantizer)
        lists = faiss().downcast_InvertedLists(engine.invlists)
        if lists.nlist != engine.nlist or sum(lists.list_size(i) for i in range(engine.nlist)) != engine.ntotal:
            return "lists do not fit"
        if isinstance(engine, faiss().IndexIVFPQFastScan):
            pq = engine.pq
            fits = 2 * pq.M == pq.d == engine.d and pq.M == engine.M and pq.nbits == engine.nbits == 4
            fits &= pq.centroids.size() == pq.d * 16 and engine.ksub == 16 and engine.code_size == pq.code_size
            fits &= engine.bbs == 32 and engine.M2 == pq.M + pq.M % 2 and engine.qbs == 0
            fits &= isinstance(lists, faiss().BlockInvertedLists)
            return "" if fits and (lists.n_per_block, lists.block_size) == (32, 16 * engine.M2) else "codes do not fit"
        fits = isinstance(engine, faiss().IndexIVFFlat) and isinstance(lists, faiss().ArrayInvertedLists)
        return "" if fits and engine.code_size == lists.code_size == 4 * engine.d else "codes do not fit"
    return f"unexpected class {type(engine).__name__}"
