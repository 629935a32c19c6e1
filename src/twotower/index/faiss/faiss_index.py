"""Approximate search with FAISS. ANN candidates are re-scored exactly with the vectors of the vector store.

FAISS ids are positions of the vector store. Removed positions stay in FAISS and are hidden by a selector; when the store
is compacted, the FAISS index is rebuilt. If FAISS returns too few candidates, because few rows are allowed or the probed
lists are empty, exact search completes the answer, so no answer is short.

Metric "dot": graphs and centroids serve inner products badly, because long vectors are neighbours of all others; where
users do not resemble items a graph finds less than a third of the true answer. So each vector x is augmented by one
dimension, sqrt(M² - |x|²) with M above all norms, and each query by a zero (Bachrach et al. 2014). The squared
distance is then |q|² + M² - 2 q·x, so nearest means highest score. A vector with a norm above M rebuilds the index.
If a few norms are far above the rest, all other vectors lie close together in the augmented space, and a graph may miss a
fifth of the answer even with `ef` = 1000; the recall check at publishing refuses such an index.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from twotower import limited_process
from twotower.arrays.sets import is_in_sorted
from twotower.arrays.types import Rows, Vectors
from twotower.errors import RunError
from twotower.index.exact import MAX_NORM, ExactIndex, SearchScope
from twotower.index.faiss.setup import faiss, faiss_settings
from twotower.index.protocol import Metric

FAISS_MIN_VECTORS = 256
"""Smallest index that FAISS searches; with fewer vectors search is exact, since centroids cannot be learned."""
EXACT_MAX_ROWS = 8192
"""Default of `exact_max_rows`: few rows pass a selector, and a graph search loses its connections."""
FILE_ARRAY_MAX_BYTES = 1 << 40
FILE_LOOP_MAX_ITEMS = 1 << 31
"""Limits for reading a FAISS file: bytes of one array, items of one loop."""


class FaissIndex(ExactIndex):
    """A vector store with a FAISS index over it; implements `protocol.Index` approximately."""

    default_search_params: ClassVar[dict[str, int]] = {}
    """Search parameters of a new index."""
    types: ClassVar[tuple[str, ...]] = ()
    """FAISS classes of the engine."""

    def __init__(self, width: int, metric: Metric, params: dict[str, int] | None = None) -> None:
        super().__init__(width, metric, params)
        self.search_params = dict(self.default_search_params)
        self._engine: Any = None
        self._mapped = False
        self._alive_bits: Any = None
        self.exact_max_rows = EXACT_MAX_ROWS
        """Number of allowed rows up to which a search is exact; at least a 32nd of all rows."""
        self._norm_bound = 0.0
        """M, the norm of every augmented vector."""

    # The FAISS engine of a subclass

    @abstractmethod
    def _new_engine(self, vectors: Vectors) -> Any:
        """Return an empty FAISS index trained on a sample of vectors (N, D)."""

    @abstractmethod
    def _faiss_params(self, factor: int, fetch: int, selector: Any) -> Any:
        """Return FAISS search parameters: `search_params` times `factor`, for `fetch` candidates that pass `selector`."""

    @property
    def _augmented(self) -> bool:
        """True if vectors have one more dimension; see the module's docstring."""
        return self.metric == "dot"

    @property
    def _width(self) -> int:
        """Dimension of the vectors in the engine."""
        return self.width + self._augmented

    def _engine_vectors(self, vectors: Vectors) -> Vectors:
        """Return vectors (n, D) as the engine stores them, (n, `_width`)."""
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
        """Return True if the search parameters are so large that exact search is less work."""
        return False

    # Changes

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

    # Search

    def _search(self, queries: Vectors, k: int, scope: SearchScope, exact: bool) -> tuple[list[Rows], list[Vectors]]:
        size = len(self._rows)
        few = scope.only is not None and len(scope.only) <= max(self.exact_max_rows, size // 32)
        if exact or few or self._engine is None or self._is_exhaustive() or 4 * k > scope.remaining.max(initial=0):
            return self._scan(queries, k, scope)
        rows: list[Rows] = [np.empty(0, np.int64)] * len(queries)
        scores: list[Vectors] = [np.empty(0, np.float32)] * len(queries)
        todo = np.arange(len(queries))
        for factor in (1, 4, 16):
            todo = self._search_candidates(queries, k, scope, factor, todo, rows, scores)
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
        factor: int,
        todo: Rows,
        rows: list[Rows],
        scores: list[Vectors],
    ) -> Rows:
        """Fill `rows` and `scores` of the queries `todo` from re-scored candidates; return the queries with too few."""
        size, short = len(self._rows), []
        banned = None if scope.banned is None else [scope.banned[i] for i in todo]
        only_ban = banned[0] if banned is not None and len(todo) == 1 else None
        selector, _alive_bits = self._selector(scope.only, only_ban)
        extra = 0 if banned is None or only_ban is not None else max(map(len, banned))
        # An eighth more: float32 rounding in FAISS may exchange candidates near the k-th.
        fetch = min(size, (k + max(8, k // 8) + extra) * self.search_params.get("refine", 1) * factor)
        params = self._faiss_params(factor, fetch, selector)
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
        """Return a FAISS selector, None for all positions, and the bit array that it reads, which must stay alive."""
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
    def restore(cls, folder: Path, facts: dict[str, Any], mmap: bool, verify: bool) -> Self:
        index = super().restore(folder, facts, mmap, verify)
        try:
            index._norm_bound = float(facts["norm_bound"])
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
    """FAISS's brute-force search."""

    kind = "flat"
    types = ("IndexFlatIP",)
    _augmented = False

    def _new_engine(self, vectors: Vectors) -> Any:
        return faiss.IndexFlatIP(self.width)

    def _faiss_params(self, factor: int, fetch: int, selector: Any) -> Any:
        return faiss.SearchParameters(sel=selector) if selector else None


class IvfIndex(FaissIndex):
    """Inverted lists of `nlist` centroids (0: 4 sqrt(N)), of which a search visits the `nprobe` nearest."""

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

    def _faiss_params(self, factor: int, fetch: int, selector: Any) -> Any:
        nprobe = min(self._engine.nlist, self.search_params["nprobe"] * factor)
        return faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)


class IvfPqIndex(IvfIndex):
    """Inverted lists as in `ivf`, of vectors product-quantised to 4 bits for two dimensions; `refine` times k candidates
    are re-scored exactly."""

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
    """HNSW graph: `m` neighbours a node, beam width `ef_construction` to build it and `ef` to search it."""

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

    def _faiss_params(self, factor: int, fetch: int, selector: Any) -> Any:
        return faiss.SearchParametersHNSW(sel=selector, efSearch=max(self.search_params["ef"] * factor, fetch))


def read_faiss(path: Path, mmap: bool = True) -> Any:
    """Read a FAISS index from a file within size limits, memory-mapped if `mmap`, and check its structure.

    Raises RunError. A damaged file can still crash the process: `verify_file` reads untrusted files in a child process.
    """
    try:
        size = path.stat().st_size
        faiss.set_deserialization_vector_byte_limit(min(FILE_ARRAY_MAX_BYTES, 2 * size + (1 << 20)))
        faiss.set_deserialization_loop_limit(min(FILE_LOOP_MAX_ITEMS, size + (1 << 20)))
        engine = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
        damage = find_damage(engine)
    except (OSError, RuntimeError, ValueError, MemoryError, AttributeError, OverflowError) as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise RunError(f"{path}: not a usable FAISS index ({lines[-1][:200]})") from e
    if damage:
        raise RunError(f"{path}: not a usable FAISS index ({damage})")
    return engine


def find_damage(engine: Any) -> str:
    """Name the part of a loaded index that would make a search read outside its memory; an empty string if none."""
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
            fits = 2 * pq.M == pq.d == engine.d and pq.M == engine.M and pq.nbits == engine.nbits == 4
            fits &= pq.centroids.size() == pq.d * 16 and engine.ksub == 16 and engine.code_size == pq.code_size
            fits &= engine.bbs == 32 and engine.M2 == pq.M + pq.M % 2 and engine.qbs == 0
            fits &= isinstance(lists, faiss.BlockInvertedLists)
            return "" if fits and (lists.n_per_block, lists.block_size) == (32, 16 * engine.M2) else "codes do not fit"
        fits = isinstance(engine, faiss.IndexIVFFlat) and isinstance(lists, faiss.ArrayInvertedLists)
        return "" if fits and engine.code_size == lists.code_size == 4 * engine.d else "codes do not fit"
    return f"unexpected class {type(engine).__name__}"


VERIFY_FUNCTION = "twotower.index.faiss.faiss_index:load_and_search"
"""Function that a child process runs to verify a file."""


def load_and_search(path: Path) -> str:
    """Load a FAISS file and search it. Returns an empty string; raises RunError."""
    engine = read_faiss(path, mmap=False)
    try:
        engine.search(np.ones((2, engine.d), np.float32), 10)
    except Exception as e:
        raise RunError(f"{path}: a search fails ({e})") from e
    return ""


def verify_file(
    path: Path, *, timeout: float = 120.0, memory: int | None = None, function: str = VERIFY_FUNCTION
) -> None:
    """Load and search a FAISS file in a child process. Raises RunError if that process fails, dies or exceeds a limit.

    `timeout` in seconds; `memory` in bytes of address space, by default 2 GiB and four times the file; `function` as
    "module:name".
    """
    error = verify_files([path], timeout=timeout, memory=memory, function=function)[path]
    if error:
        raise RunError(error)


def verify_files(
    paths: list[Path], *, timeout: float = 120.0, memory: int | None = None, function: str = VERIFY_FUNCTION
) -> dict[Path, str]:
    """Return the error of each file, an empty string for a sound one."""
    errors = {path: f"{path}: no such file" for path in paths if not path.is_file()}
    rest = [path for path in paths if path not in errors]
    largest = max((path.stat().st_size for path in rest), default=0)
    for path, seen in limited_process.run_limited(
        function, rest, timeout=timeout, memory=memory or (2 << 30) + 4 * largest
    ).items():
        ours = not seen.error or str(path) in seen.error
        errors[path] = seen.error if ours else f"{path}: not a usable FAISS index ({seen.error})"
    return errors


def _sample(vectors: Vectors, n: int) -> Vectors:
    """Return at most `n` of the vectors, a deterministic sample."""
    if len(vectors) <= n:
        return vectors
    return vectors[np.sort(np.random.default_rng(0).choice(len(vectors), n, replace=False))]
