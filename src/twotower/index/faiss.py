"""FAISS proposes, the store decides: candidates of a FAISS index, scored again with the stored vectors.

FAISS numbers are positions of the store. Removed positions stay in FAISS and are hidden by a selector; the store's clearing
up builds FAISS anew. What FAISS does not find, because few rows are allowed or probes came back empty, the
exact search does, so an answer is never short.

Inner products suit neither graphs nor centroids: long vectors become everyone's neighbours, and where users do not look
like items a graph finds less than a third of what it should, however hard it tries. So for "dot" every vector x gets one more
number, sqrt(M² - |x|²) with M above all lengths, and every query a zero. The squared distance is then |q|² + M² - 2 q·x: the
nearest is the best. A vector longer than M makes the index anew. A few vectors far longer than the rest squeeze these
into a corner, and then a graph may miss a fifth even with an `ef` of a thousand: the recall gate sees it.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from twotower import limited_process
from twotower.errors import RunError
from twotower.index.exact import MAX_NORM, ExactIndex, SearchScope, is_in_sorted
from twotower.index.faiss_setup import faiss, faiss_settings
from twotower.index.protocol import Metric, Rows, Vectors

FAISS_MIN_VECTORS = 256
"""Fewer vectors are searched exactly: there is nothing to learn centroids from."""
EXACT_MAX_ROWS = 8192
"""So many allowed rows, or a 32nd of all, are searched exactly: few pass a selector, and a graph loses its way."""
FILE_ARRAY_MAX_BYTES = 1 << 40
FILE_LOOP_MAX_ITEMS = 1 << 31
"""Limits of what FAISS reads: bytes of one array, items of one loop."""


class FaissIndex(ExactIndex):
    """A store of vectors with a FAISS index over it. Approximate, but for the promises of `protocol.Index`."""

    default_search_params: ClassVar[dict[str, int]] = {}
    types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, width: int, metric: Metric, params: dict[str, int] | None = None) -> None:
        super().__init__(width, metric, params)
        self.search_params = dict(self.default_search_params)
        self._engine: Any = None
        self._mapped = False
        self._alive_bits: Any = None
        self.exact_max_rows = EXACT_MAX_ROWS
        """Searches among at most this many allowed rows are exact."""
        self._norm_bound = 0.0
        """M."""

    # What an engine is

    @abstractmethod
    def _new_engine(self, vectors: Vectors) -> Any:
        """A trained FAISS index without vectors, for vectors like these."""

    @abstractmethod
    def _faiss_params(self, harder: int, fetch: int, selector: Any) -> Any:
        """Search parameters for `search_params` times `harder`."""

    @property
    def _augmented(self) -> bool:
        """Whether vectors get one more number; see the top of this file."""
        return self.metric == "dot"

    @property
    def _width(self) -> int:
        """Numbers of a vector in the engine."""
        return self.width + self._augmented

    def _engine_vectors(self, vectors: Vectors) -> Vectors:
        """Vectors as the engine takes them."""
        last: Any = 0.0
        if self._augmented:
            squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
            last = np.sqrt(np.maximum(self._norm_bound**2 - squares, 0.0))[:, None]
        return self._widen(vectors, last)

    def _widen(self, vectors: Vectors, last: Any = 0.0) -> Vectors:
        if self._width == self.width:
            return vectors
        wide = np.zeros((len(vectors), self._width), np.float32)
        wide[:, : self.width] = vectors
        wide[:, self.width : self.width + 1] = last
        return wide

    def _is_exhaustive(self) -> bool:
        """Whether the search parameters are so large that looking at every vector is less work."""
        return False

    # Changing

    def _changed(self, kept: int) -> None:
        self._alive_bits = None
        size = len(self._rows)
        if size < FAISS_MIN_VECTORS:
            self._engine = None
            return
        vectors = self._vectors[:size]
        with faiss_settings(self.threads, self._width):
            if self._engine is None or kept == 0 or (self._augmented and self._max_norm > self._norm_bound):
                self._norm_bound = 1.05 * self._max_norm
                self._engine, kept = self._new_engine(vectors), 0
                self._mapped = False
            elif self._mapped and kept < size:
                # FAISS aborts the process where a mapped index is added to.
                self._engine, self._mapped = faiss.deserialize_index(faiss.serialize_index(self._engine)), False
            for start in range(kept, size, 1 << 18):
                self._engine.add(self._engine_vectors(vectors[start : start + (1 << 18)]))

    # Searching

    def _search(self, queries: Vectors, k: int, scope: SearchScope, exact: bool) -> tuple[list[Rows], list[Vectors]]:
        size = len(self._rows)
        few = scope.only is not None and len(scope.only) <= max(self.exact_max_rows, size // 32)
        if exact or few or self._engine is None or self._is_exhaustive() or 4 * k > scope.remaining.max(initial=0):
            return self._scan(queries, k, scope)
        rows: list[Rows] = [np.empty(0, np.int64)] * len(queries)
        scores: list[Vectors] = [np.empty(0, np.float32)] * len(queries)
        todo = np.arange(len(queries))
        for harder in (1, 4, 16):
            todo = self._search_candidates(queries, k, scope, harder, todo, rows, scores)
            if not len(todo):
                return rows, scores
        banned = None if scope.banned is None else [scope.banned[i] for i in todo]
        rest = self._scan(queries[todo], k, SearchScope(scope.only, banned, scope.remaining[todo]))
        for number, found, score in zip(todo, *rest, strict=True):
            rows[number], scores[number] = found, score
        return rows, scores

    def _search_candidates(
        self,
        queries: Vectors,
        k: int,
        scope: SearchScope,
        harder: int,
        todo: Rows,
        rows: list[Rows],
        scores: list[Vectors],
    ) -> Rows:
        """Fill in `rows` and `scores` of the queries `todo`; returns those that have too few."""
        size, short = len(self._rows), []
        banned = None if scope.banned is None else [scope.banned[i] for i in todo]
        alone = banned[0] if banned is not None and len(todo) == 1 else None
        selector, _alive_bits = self._selector(scope.only, alone)
        extra = 0 if banned is None or alone is not None else max(map(len, banned))
        # An eighth more: FAISS rounds in float32, which matters between the last and the next.
        fetch = min(size, (k + max(8, k // 8) + extra) * self.search_params.get("refine", 1) * harder)
        params = self._faiss_params(harder, fetch, selector)
        step = max(1, (1 << 22) // (fetch * self.width))  # float64 products of at most 32 MiB
        for start in range(0, len(todo), step):
            some = todo[start : start + step]
            with faiss_settings(self.threads, self._width):
                _, at = self._engine.search(self._widen(queries[some]), fetch, params=params)
            good = (at >= 0) & (at < size)
            at[~good] = 0
            good &= self._rows[at] >= 0
            if extra and banned is not None:
                for line, ban in enumerate(banned[start : start + step]):
                    good[line] &= ~is_in_sorted(ban, at[line])
            found = np.where(good, self._rows[at], np.iinfo(np.int64).max)
            exact = (self._vectors[at] * queries[some, None].astype(np.float64)).sum(axis=2).astype(np.float32)
            exact[~good] = -np.inf
            order = np.lexsort((found, -exact))[:, :k]
            found, exact = np.take_along_axis(found, order, 1), np.take_along_axis(exact, order, 1)
            counts = np.minimum(good.sum(axis=1), k)
            for line, number in enumerate(some):
                rows[number], scores[number] = found[line, : counts[line]], exact[line, : counts[line]]
                if counts[line] < min(k, scope.remaining[number]):
                    short.append(number)
        return np.asarray(short, np.int64)

    def _selector(self, only: Rows | None, banned: Rows | None) -> tuple[Any, Any]:
        """A FAISS selector, or None for everything, and the memory that it reads."""
        if self._alive_bits is None:
            self._alive_bits = np.packbits(self._rows >= 0, bitorder="little")
        if only is not None:
            good = np.zeros(len(self._rows), bool)
            good[only] = True
            bits = np.packbits(good, bitorder="little")
        elif banned is not None and len(banned):
            bits = self._alive_bits.copy()
        elif len(self) == len(self._rows):
            return None, None
        else:
            bits = self._alive_bits
        if banned is not None and len(banned):
            np.bitwise_and.at(bits, banned >> 3, ~np.left_shift(1, banned & 7).astype(np.uint8))
        return faiss.IDSelectorBitmap(bits), bits

    # Files

    def _save_engine(self, folder: Path) -> None:
        if self._engine is not None:
            try:
                faiss.write_index(self._engine, str(folder / "index.faiss"))
            except RuntimeError as e:
                raise RunError(f"{folder}: cannot be written ({str(e).splitlines()[-1]})") from e

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"norm_bound": self._norm_bound}

    @classmethod
    def restore(cls, folder: Path, said: dict[str, Any], mmap: bool, verify: bool) -> Self:
        index = super().restore(folder, said, mmap, verify)
        try:
            index._norm_bound = float(said["norm_bound"])
            if not 0 <= index._norm_bound <= 2 * MAX_NORM:
                raise ValueError(f"norm_bound: {index._norm_bound}")
        except (KeyError, TypeError, ValueError) as e:
            raise RunError(f"{folder}: not a usable index ({e})") from e
        return index

    def _load_engine(self, folder: Path, mmap: bool, verify: bool) -> None:
        if len(self._rows) < FAISS_MIN_VECTORS:
            return
        path = folder / "index.faiss"
        if verify:
            verify_file(path)
        engine = read_faiss(path, mmap)
        if type(engine).__name__ not in self.types or (engine.ntotal, engine.d) != (len(self._rows), self._width):
            raise RunError(f"{path}: not the {self.kind} index of this folder ({type(engine).__name__})")
        self._engine, self._mapped = engine, mmap


class FlatIndex(FaissIndex):
    """FAISS's own exact search."""

    kind = "flat"
    types = ("IndexFlatIP",)
    _augmented = False

    def _new_engine(self, vectors: Vectors) -> Any:
        return faiss.IndexFlatIP(self.width)

    def _faiss_params(self, harder: int, fetch: int, selector: Any) -> Any:
        return faiss.SearchParameters(sel=selector) if selector else None


class IvfIndex(FaissIndex):
    """Lists around `nlist` centroids (0: four times the root of N), of which the `nprobe` best are looked at."""

    kind = "ivf"
    defaults = {"nlist": 0}
    default_search_params = {"nprobe": 16}
    types = ("IndexIVFFlat",)

    def search_limits(self) -> dict[str, int]:
        return {"nprobe": self._engine.nlist if self._engine is not None else 1}

    def _new_engine(self, vectors: Vectors) -> Any:
        engine = faiss.IndexIVFFlat(faiss.IndexFlatL2(self._width), self._width, self._lists(vectors))
        self._train(engine, vectors)
        return engine

    def _lists(self, vectors: Vectors) -> int:
        nlist = self.params["nlist"] or round(4 * len(vectors) ** 0.5)
        return max(1, min(nlist, len(vectors) // 8))

    def _train(self, engine: Any, vectors: Vectors) -> None:
        engine.cp.min_points_per_centroid = 1
        engine.cp.max_points_per_centroid = 64
        engine.cp.niter = 10
        engine.train(self._engine_vectors(_sample(vectors, 64 * engine.nlist)))

    def _faiss_params(self, harder: int, fetch: int, selector: Any) -> Any:
        nprobe = min(self._engine.nlist, self.search_params["nprobe"] * harder)
        return faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)


class IvfPqIndex(IvfIndex):
    """Lists as in `ivf`, of vectors cut to half a byte for two numbers; `refine` times k of them are scored exactly."""

    kind = "ivfpq"
    default_search_params = {"nprobe": 16, "refine": 8}
    types = ("IndexIVFPQFastScan",)

    def search_limits(self) -> dict[str, int]:
        return super().search_limits() | {"refine": 64}

    @property
    def _width(self) -> int:
        return super()._width + super()._width % 2

    def _new_engine(self, vectors: Vectors) -> Any:
        quantizer, nlist = faiss.IndexFlatL2(self._width), self._lists(vectors)
        engine = faiss.IndexIVFPQFastScan(quantizer, self._width, nlist, self._width // 2, 4, faiss.METRIC_L2)
        engine.pq.cp.min_points_per_centroid = 1
        self._train(engine, vectors)
        return engine


class HnswIndex(FaissIndex):
    """A graph with `m` neighbours, made with `ef_construction`, searched with `ef` open ends."""

    kind = "hnsw"
    defaults = {"m": 16, "ef_construction": 100}
    default_search_params = {"ef": 64}
    types = ("IndexHNSWFlat",)

    def search_limits(self) -> dict[str, int]:
        return {"ef": max(64, min(len(self), 4096))}

    def _is_exhaustive(self) -> bool:
        return self.search_params["ef"] >= len(self)

    def _new_engine(self, vectors: Vectors) -> Any:
        engine = faiss.IndexHNSWFlat(self._width, max(2, self.params["m"]), faiss.METRIC_L2)
        engine.hnsw.efConstruction = max(1, self.params["ef_construction"])
        return engine

    def _faiss_params(self, harder: int, fetch: int, selector: Any) -> Any:
        return faiss.SearchParametersHNSW(sel=selector, efSearch=max(self.search_params["ef"] * harder, fetch))


def read_faiss(path: Path, mmap: bool = True) -> Any:
    """A FAISS index from its file, mapped where FAISS can, within limits, and looked through. Raises RunError.

    A damaged file can still end the process: files of others go through `verify_file` first.
    """
    try:
        size = path.stat().st_size
        faiss.set_deserialization_vector_byte_limit(min(FILE_ARRAY_MAX_BYTES, 2 * size + (1 << 20)))
        faiss.set_deserialization_loop_limit(min(FILE_LOOP_MAX_ITEMS, size + (1 << 20)))
        engine = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
        wrong = find_damage(engine)
    except (OSError, RuntimeError, ValueError, MemoryError, AttributeError, OverflowError) as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise RunError(f"{path}: not a usable FAISS index ({lines[-1][:200]})") from e
    if wrong:
        raise RunError(f"{path}: not a usable FAISS index ({wrong})")
    return engine


def find_damage(engine: Any) -> str:
    """What in a loaded index would make a search read outside its memory, or an empty string."""
    if not engine.is_trained or engine.d < 1 or engine.ntotal < 0:
        return "not trained"
    if isinstance(engine, faiss.IndexFlat):
        return "" if engine.codes.size() == engine.ntotal * engine.d * 4 else "codes do not fit"
    if isinstance(engine, faiss.IndexHNSW):
        graph, storage = engine.hnsw, faiss.downcast_index(engine.storage)
        if not isinstance(storage, faiss.IndexFlat) or (storage.d, storage.ntotal) != (engine.d, engine.ntotal):
            return "storage does not fit"
        if find_damage(storage):
            return find_damage(storage)
        n = engine.ntotal
        levels, offsets = faiss.vector_to_array(graph.levels), faiss.vector_to_array(graph.offsets)
        per_level = faiss.vector_to_array(graph.cum_nneighbor_per_level)
        if len(levels) != n or len(offsets) != n + 1 or not 0 <= graph.entry_point < n:
            return "graph does not fit"
        if levels.min() < 1 or levels.max() >= len(per_level) or graph.max_level != levels[graph.entry_point] - 1:
            return "levels do not fit"
        if per_level[0] != 0 or (np.diff(per_level) < 0).any():
            return "levels do not fit"
        if offsets[0] != 0 or (np.diff(offsets.astype(np.int64)) != per_level[levels]).any():
            return "offsets do not fit"
        neighbours = faiss.vector_to_array(graph.neighbors)
        if len(neighbours) != offsets[-1] or neighbours.min(initial=0) < -1 or neighbours.max(initial=0) >= n:
            return "neighbours do not fit"
        return ""
    if isinstance(engine, faiss.IndexIVF):
        quantizer = faiss.downcast_index(engine.quantizer)
        if not isinstance(quantizer, faiss.IndexFlat) or (quantizer.d, quantizer.ntotal) != (engine.d, engine.nlist):
            return "centroids do not fit"
        if find_damage(quantizer):
            return find_damage(quantizer)
        lists = faiss.downcast_InvertedLists(engine.invlists)
        if lists.nlist != engine.nlist or sum(lists.list_size(i) for i in range(engine.nlist)) != engine.ntotal:
            return "lists do not fit"
        if isinstance(engine, faiss.IndexIVFPQFastScan):
            pq = engine.pq
            right = 2 * pq.M == pq.d == engine.d and pq.M == engine.M and pq.nbits == engine.nbits == 4
            right &= pq.centroids.size() == pq.d * 16 and engine.ksub == 16 and engine.code_size == pq.code_size
            right &= engine.bbs == 32 and engine.M2 == pq.M + pq.M % 2 and engine.qbs == 0
            right &= isinstance(lists, faiss.BlockInvertedLists)
            return "" if right and (lists.n_per_block, lists.block_size) == (32, 16 * engine.M2) else "codes do not fit"
        right = isinstance(engine, faiss.IndexIVFFlat) and isinstance(lists, faiss.ArrayInvertedLists)
        return "" if right and engine.code_size == lists.code_size == 4 * engine.d else "codes do not fit"
    return f"a {type(engine).__name__} is none of ours"


VERIFY_FUNCTION = "twotower.index.faiss:load_and_search"
"""The work of a process that looks at a file."""


def load_and_search(path: Path) -> str:
    """Load the file and search it."""
    engine = read_faiss(path, mmap=False)
    try:
        engine.search(np.ones((2, engine.d), np.float32), 10)
    except Exception as e:
        raise RunError(f"{path}: a search fails ({e})") from e
    return ""


def verify_file(
    path: Path, *, timeout: float = 120.0, memory: int | None = None, function: str = VERIFY_FUNCTION
) -> None:
    """Load and search the file in a process of its own first. Raises RunError if that fails, dies or takes too long.

    `timeout` in seconds; `memory` in bytes of address space, by default 2 GiB and four times the file.
    """
    said = verify_files([path], timeout=timeout, memory=memory, function=function)[path]
    if said:
        raise RunError(said)


def verify_files(
    paths: list[Path], *, timeout: float = 120.0, memory: int | None = None, function: str = VERIFY_FUNCTION
) -> dict[Path, str]:
    """Say what is wrong with each file; an empty string for a sound one."""
    said = {path: f"{path}: no such file" for path in paths if not path.is_file()}
    rest = [path for path in paths if path not in said]
    largest = max((path.stat().st_size for path in rest), default=0)
    for path, seen in limited_process.run_limited(
        function, rest, timeout=timeout, memory=memory or (2 << 30) + 4 * largest
    ).items():
        ours = not seen.error or str(path) in seen.error
        said[path] = seen.error if ours else f"{path}: not a usable FAISS index ({seen.error})"
    return said


def _sample(vectors: Vectors, n: int) -> Vectors:
    """At most `n` of the vectors, the same ones every time."""
    if len(vectors) <= n:
        return vectors
    return vectors[np.sort(np.random.default_rng(0).choice(len(vectors), n, replace=False))]
