"""Exact search, and the vector store that is the base of all index classes.

Speed: FAISS's brute-force search selects somewhat more than k candidates by float32 sums, directly from the vector
store; each thread searches its share of the items. Few items, or a large share of them, are scored by numpy.

Exactness: float32 sums depend on the order of addition, so candidates are scored again, with products and sums in float64
rounded to float32. That is the score, for all kinds of index, batch sizes and thread counts; equal scores are ordered by
row. If the k-th score exceeds the float32 sum of the last candidate by no more than the rounding error, an item outside
the candidates may belong to the answer, and numpy scores all items.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from twotower.arrays.sets import is_in_sorted, sorted_unique
from twotower.arrays.types import Rows, Vectors
from twotower.errors import ConfigError, DataError, RunError, TwoTowerError, did_you_mean
from twotower.files import new_folder, write_json
from twotower.files.readers import read_array
from twotower.index.protocol import Metric
from twotower.machine import default_threads

INDEX_FORMAT = 2
INDEX_FILES = ("index.json", "vectors.npy", "rows.npy", "index.faiss")
MAX_NORM = 1e18
"""Largest norm; vectors above it are rejected, because an inner product of two could overflow float32."""
MIN_NORM = 1e-6
"""Smallest norm with metric "cosine"; vectors below it are rejected, because their direction is undefined."""
NUMPY_MAX_SCORES = 1 << 13
"""Number of scores (items x queries) up to which numpy computes them all."""
GATHER_NUMBERS = 1 << 22
"""Numbers copied at a time when only allowed items are searched."""


class SearchScope(NamedTuple):
    """Positions of the vector store that one search covers."""

    only: Rows | None
    """Allowed positions, ascending; None for all that hold a row."""
    banned: list[Rows] | None
    """Banned positions of each query, ascending, within `only`."""
    remaining: Rows
    """Number of allowed positions of each query (B,)."""


class ExactIndex:
    """Vectors under rows, and exact search over them; implements `protocol.Index`.

    Removed vectors stay in the vector store under row -1 until they are more than half of it.
    """

    kind: ClassVar[str] = "exact"
    remote: ClassVar[bool] = False
    defaults: ClassVar[dict[str, int]] = {}
    """Build parameters and their defaults."""
    params: dict[str, int]
    search_params: dict[str, int]

    def __init__(self, width: int, metric: Metric, params: dict[str, int] | None = None) -> None:
        """Create an empty index of vectors of dimension `width`. Raises ConfigError, DataError."""
        if metric not in ("cosine", "dot"):
            raise DataError(f"metric is {metric!r} (allowed: cosine, dot)")
        if width < 1:
            raise DataError(f"vectors have {width} columns, expected at least 1")
        self.metric: Metric = metric
        self.params = complete_params(self.kind, self.defaults, params)
        self.search_params = {}
        self.threads = default_threads()
        self._vectors: Vectors = np.empty((0, width), np.float32)
        self._rows: Rows = np.empty(0, np.int64)
        self._sorted: Rows = self._rows
        self._position: Rows = self._rows
        self._identity = False
        """True if row r is at position r for all positions."""
        self._rejected: Rows = self._rows
        self._max_norm = 0.0

    @classmethod
    def build(cls, vectors: Vectors, rows: Rows, metric: Metric, params: dict[str, int] | None = None) -> Self:
        """Build an index of vectors (N, D) under rows (N,); rows of unusable vectors are in `rejected`. Raises DataError."""
        if np.ndim(vectors) != 2:
            raise DataError(f"vectors have shape {np.shape(vectors)}, expected (N, D)")
        index = cls(np.shape(vectors)[1], metric, params)
        index.add(rows, vectors)
        return index

    @property
    def rows(self) -> Rows:
        return self._sorted.copy()

    @property
    def rejected(self) -> Rows:
        return self._rejected.copy()

    @property
    def width(self) -> int:
        return int(self._vectors.shape[1])

    def __len__(self) -> int:
        return len(self._sorted)

    def vectors(self, rows: Rows) -> Vectors:
        """Return the vectors (n, D) of rows (n,). Raises DataError for unknown rows."""
        found: Vectors = self._vectors[self._known(rows)]
        return found

    def scores(self, query: Vectors) -> Vectors:
        query = self._queries(query, 1)[0]
        with one_blas_thread():
            found: Vectors = self._vectors[: len(self._rows)] @ query
        return found if self._identity else found[self._position]

    def search_limits(self) -> dict[str, int]:
        return {}

    # Changes

    def add(self, rows: Rows, vectors: Vectors) -> None:
        rows, vectors = self._checked(rows, vectors)
        present = rows[self._find(rows) >= 0]
        if len(present):
            raise DataError(f"row {present[0]} is in the index already; use update")
        self._append(rows, vectors)

    def update(self, rows: Rows, vectors: Vectors) -> None:
        rows, vectors = self._checked(rows, vectors)
        self._delete(self._known(rows))
        self._append(rows, vectors)

    def remove(self, rows: Rows) -> None:
        rows = _row_array(rows)
        self._delete(self._known(rows))
        self._rejected = np.setdiff1d(self._rejected, rows)

    def _append(self, rows: Rows, vectors: Vectors) -> None:
        length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
        good = length <= MAX_NORM  # false for nan
        if self.metric == "cosine":
            good &= length >= MIN_NORM
        self._rejected = np.union1d(np.setdiff1d(self._rejected, rows), rows[~good])
        if not good.all():
            rows, vectors, length = rows[good], vectors[good], length[good]
        if not len(rows):
            return
        self._max_norm = max(self._max_norm, float(length.max()))
        size = len(self._rows)
        if size:
            self._vectors = _append_vectors(self._vectors, size, vectors)
        else:
            self._vectors = vectors.copy()
        self._rows = np.concatenate([self._rows, rows])
        order = np.argsort(rows)
        at = np.searchsorted(self._sorted, rows[order])
        self._sorted = np.insert(self._sorted, at, rows[order])
        self._position = np.insert(self._position, at, size + order)
        self._identity = _is_identity(self._rows)
        self._changed(size)

    def _delete(self, positions: Rows) -> None:
        if not len(positions):
            return
        removed = np.searchsorted(self._sorted, self._rows[positions])
        self._rows[positions] = -1
        self._sorted, self._position = np.delete(self._sorted, removed), np.delete(self._position, removed)
        self._identity = False
        if 2 * len(self._sorted) < len(self._rows):
            alive = np.flatnonzero(self._rows >= 0)
            self._vectors, self._rows = self._vectors[alive], self._rows[alive]
            self._position = np.searchsorted(alive, self._position)
            self._changed(0)
        else:
            self._changed(len(self._rows))

    def _changed(self, kept: int) -> None:
        """Update the engine after a change; positions below `kept` hold the same vectors as before, or were removed."""

    # Search

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        allowed: Rows | None = None,
        banned: Sequence[Rows] | None = None,
        exact: bool = False,
    ) -> tuple[Rows, Vectors]:
        queries = self._queries(queries, k)
        scope = self._scope(len(queries), allowed, banned)
        return self._pad(k, *self._search(queries, k, scope, exact))

    def _search(self, queries: Vectors, k: int, scope: SearchScope, exact: bool) -> tuple[list[Rows], list[Vectors]]:
        return self._scan(queries, k, scope)

    def _queries(self, queries: Vectors, k: int) -> Vectors:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise DataError(f"k is {k!r}, expected a whole number from 1")
        queries = _matrix(queries, self.width, "queries")
        length = np.sqrt(np.einsum("nd,nd->n", queries, queries, dtype=np.float64))
        if not (length <= MAX_NORM).all():
            raise DataError(
                f"query {int(np.argmin(length <= MAX_NORM))} is not finite, or its norm is above {MAX_NORM:g}"
            )
        return queries

    def _scope(self, n_queries: int, allowed: Rows | None, banned: Sequence[Rows] | None) -> SearchScope:
        only = None
        if allowed is not None:
            only = self._positions(allowed)
        remaining = np.full(n_queries, len(self) if only is None else len(only))
        if banned is None:
            return SearchScope(only, None, remaining)
        if len(banned) != n_queries:
            raise DataError(
                f"banned has {len(banned)} arrays of rows for {n_queries} queries, expected one array of rows for each"
            )
        positions = []
        for number, rows in enumerate(banned):
            found = self._positions(rows)
            if only is not None:
                found = found[is_in_sorted(only, found)]
            remaining[number] -= len(found)
            positions.append(found)
        return SearchScope(only, positions, remaining)

    def _pad(self, k: int, rows: list[Rows], scores: list[Vectors]) -> tuple[Rows, Vectors]:
        all_rows = np.full((len(rows), k), -1, np.int64)
        all_scores = np.full((len(rows), k), -np.inf, np.float32)
        for number, (found, score) in enumerate(zip(rows, scores, strict=True)):
            all_rows[number, : len(found)], all_scores[number, : len(found)] = found, score
        return all_rows, all_scores

    def _scan(self, queries: Vectors, k: int, scope: SearchScope) -> tuple[list[Rows], list[Vectors]]:
        """Return the rows and scores of each query by exact search, in descending order of score."""
        only = scope.only
        if only is None and len(self) < len(self._rows):
            only = np.flatnonzero(self._rows >= 0)
        n = len(self._rows) if only is None else len(only)
        # The error of a float32 sum of D products is below D / 2^24 of the product of the norms; twice for two sums.
        lengths = np.sqrt(np.einsum("nd,nd->n", queries, queries, dtype=np.float64))
        slack = lengths * self._max_norm * self.width * 2.0**-22 + 1e-30
        rows: list[Rows] = [_EMPTY_RESULT[0]] * len(queries)
        scores: list[Vectors] = [_EMPTY_RESULT[1]] * len(queries)
        todo = np.arange(len(queries))
        banned = scope.banned or [_EMPTY_RESULT[0]] * len(queries)
        keep = k + max(8, k // 8)
        fetch = keep + max(map(len, banned), default=0)
        if n * len(queries) > NUMPY_MAX_SCORES and 4 * fetch < n:
            certain = np.zeros(len(queries), np.bool_)
            step = max(1, (1 << 22) // (fetch + keep * self.width))
            for start in range(0, len(queries), step):
                part = slice(start, start + step)
                at, rough = self._nominate(queries[part], fetch, only, banned[part], keep)
                found, score = self._rescore(queries[part], at, k)
                rows[part], scores[part] = list(found), list(score)
                certain[part] = score[:, -1] > rough[:, -1] + slack[part]
            todo = todo[~certain]
        with one_blas_thread():
            for number in todo:
                rows[number], scores[number] = self._score_all(queries[number], k, only, banned[number], slack[number])
        return rows, scores

    def _rescore(self, queries: Vectors, at: Rows, k: int) -> tuple[Rows, Vectors]:
        """Return the `k` best of the positions (B, n): rows (B, k) and scores (B, k) as computed by `exact_scores`."""
        scores = (self._vectors[at] * queries[:, None].astype(np.float64)).sum(axis=2).astype(np.float32)
        rows = self._rows[at]
        order = np.lexsort((rows, -scores))[:, :k]
        return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)

    def _nominate(
        self, queries: Vectors, n: int, only: Rows | None, banned: list[Rows], keep: int
    ) -> tuple[Rows, Vectors]:
        """Return the positions (B, keep) with the largest float32 sums, and the sums (B, keep), in descending order.

        They are taken from the `n` largest, without banned positions.
        """
        from twotower.index.faiss.setup import faiss, faiss_settings

        total = len(self._rows) if only is None else len(only)
        threads = min(self.threads, total // n) if total * len(queries) * self.width > 1 << 22 else 1
        bounds = [total * t // threads for t in range(threads + 1)]

        def search_block(start: int, stop: int) -> tuple[Rows, Vectors]:
            items = self._vectors[start:stop] if only is None else self._vectors[only[start:stop]]
            found, at = faiss.knn(queries, items, min(n, stop - start), metric=faiss.METRIC_INNER_PRODUCT)
            return (at + start if only is None else only[at + start]), found

        def search_share(start: int, stop: int) -> tuple[Rows, Vectors]:
            with faiss_settings(1, self.width):
                step = stop - start if only is None else max(1, GATHER_NUMBERS // self.width)
                return _merge_largest([search_block(low, min(low + step, stop)) for low in range(start, stop, step)], n)

        if threads == 1:
            at, rough = search_share(0, total)
        else:
            with ThreadPoolExecutor(threads) as pool:
                at, rough = _merge_largest(list(pool.map(search_share, bounds[:-1], bounds[1:])), n)
        if n > keep:
            bad = np.array([is_in_sorted(ban, line) for ban, line in zip(banned, at, strict=True)])
            order = np.argsort(bad, axis=1, kind="stable")[:, :keep]
            at, rough = np.take_along_axis(at, order, 1), np.take_along_axis(rough, order, 1)
        return at, rough

    def _score_all(self, query: Vectors, k: int, only: Rows | None, banned: Rows, slack: float) -> tuple[Rows, Vectors]:
        """Return the rows and scores of one query from the float32 sums of all items, in descending order of score."""
        if only is None:
            rough = self._vectors[: len(self._rows)] @ query
            rough[banned] = -np.inf
            positions = np.flatnonzero((rough >= _kth_largest(rough, k) - slack) & (rough > -np.inf))
        else:
            positions = only[~is_in_sorted(banned, only)]
            rough = _gathered_scores(self._vectors, positions, query)
            positions = positions[rough >= _kth_largest(rough, k) - slack]
        rows, scores = self._rows[positions], exact_scores(self._vectors, positions, query)
        order = np.lexsort((rows, -scores))[:k]
        return rows[order], scores[order]

    # Files

    def describe(self) -> dict[str, Any]:
        return {
            "format": INDEX_FORMAT,
            "kind": self.kind,
            "metric": self.metric,
            "n": len(self),
            "width": self.width,
            "params": self.params,
            "search_params": self.search_params,
            "max_norm": self._max_norm,
            "rejected": self._rejected.tolist(),
        }

    def save(self, folder: Path) -> None:
        foreign = sorted(f.name for f in folder.iterdir() if f.name not in INDEX_FILES) if folder.is_dir() else []
        if foreign:
            raise RunError(f"{folder}: holds {foreign[0]}, which is no file of an index; choose an empty folder")
        with new_folder(folder) as temporary:
            self._save_vectors(temporary)
            self._save_engine(temporary)
            write_json(temporary / "index.json", self.describe())

    def _save_vectors(self, folder: Path) -> None:
        np.save(folder / "vectors.npy", self._vectors[: len(self._rows)])
        np.save(folder / "rows.npy", self._rows)

    def _save_engine(self, folder: Path) -> None: ...

    @classmethod
    def restore(cls, folder: Path, facts: dict[str, Any], mmap: bool, verify: bool) -> Self:
        """Load the index of a folder; `facts` is the content of its `index.json`. Raises RunError."""
        try:
            index = cls(int(facts["width"]), facts["metric"], {str(n): int(v) for n, v in facts["params"].items()})
            index.search_params = {name: max(1, int(facts["search_params"][name])) for name in index.search_params}
            index._max_norm = float(facts["max_norm"])
            if not 0 <= index._max_norm <= MAX_NORM:
                raise ValueError(f"max_norm: {index._max_norm}")
            index._rejected = np.asarray(facts["rejected"], np.int64).reshape(-1)
            rows = read_array(folder / "rows.npy")
            # A plain array over the map: slices of a memmap are slow to make.
            vectors = np.asarray(read_array(folder / "vectors.npy", "r" if mmap else None))
            if rows.dtype != np.int64 or rows.ndim != 1 or vectors.dtype != np.float32:
                raise ValueError(f"rows of {rows.dtype} and vectors of {vectors.dtype}, expected int64 and float32")
            if vectors.shape != (len(rows), index.width) or not vectors.flags.c_contiguous:
                raise ValueError(f"vectors of shape {vectors.shape} for {len(rows)} rows of width {index.width}")
            order = np.argsort(rows, kind="stable")[np.count_nonzero(rows < 0) :]
            if len(order) != facts["n"] or (np.diff(rows[order]) == 0).any():
                raise ValueError("rows are repeated or missing")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, OverflowError, TwoTowerError) as e:
            raise RunError(f"{folder}: not a usable index ({e})") from e
        index._vectors, index._rows, index._sorted, index._position = vectors, rows, rows[order], order
        index._identity = _is_identity(rows)
        index._load_engine(folder, mmap, verify)
        return index

    def _load_engine(self, folder: Path, mmap: bool, verify: bool) -> None: ...

    # Rows

    def _positions(self, rows: Rows) -> Rows:
        """Return the positions, ascending, of those rows that are in the index."""
        found = sorted_unique(self._find(_row_array(rows, unique=False)))
        return found[np.searchsorted(found, 0) :]

    def _find(self, rows: Rows) -> Rows:
        """Return the position of each row, -1 for rows that are not in the index."""
        if self._identity:
            return np.where(rows < len(self._rows), rows, -1)
        if not len(self._sorted):
            return np.full(len(rows), -1, np.int64)
        at = np.minimum(np.searchsorted(self._sorted, rows), len(self._sorted) - 1)
        return np.where(self._sorted[at] == rows, self._position[at], -1)

    def _known(self, rows: Rows) -> Rows:
        """Return the positions of rows. Rejected rows are skipped; raises DataError for other rows outside the index."""
        found = self._find(rows)
        if (found >= 0).all():
            return found
        missing = rows[found < 0]
        unknown = missing[~np.isin(missing, self._rejected)]
        if len(unknown):
            raise DataError(f"row {unknown[0]} is not in the index")
        return found[found >= 0]

    def _checked(self, rows: Rows, vectors: Vectors) -> tuple[Rows, Vectors]:
        rows, vectors = _row_array(rows), _matrix(vectors, self.width, "vectors")
        if len(rows) != len(vectors):
            raise DataError(f"{len(rows)} rows for {len(vectors)} vectors")
        return rows, vectors


def complete_params(kind: str, defaults: dict[str, int], params: dict[str, int] | None) -> dict[str, int]:
    """Return `params` completed with `defaults`. Raises ConfigError for an unknown parameter or value."""
    for name, value in (params or {}).items():
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            raise ConfigError(f"{name}: no parameter of {kind} (allowed: {known}){did_you_mean(name, defaults)}")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 24:
            raise ConfigError(f"{name} is {value!r}, expected a whole number from 0 to {(1 << 24) - 1:,}")
    return defaults | (params or {})


def exact_scores(vectors: Vectors, positions: Rows, query: Vectors) -> Vectors:
    """Return the scores (n,) of a query (D,) at positions (n,), summed in float64 and rounded to float32."""
    wide = query.astype(np.float64)
    scores = np.empty(len(positions), np.float32)
    for start in range(0, len(positions), 4096):
        part = slice(start, start + 4096)
        scores[part] = (vectors[positions[part]] * wide).sum(axis=1)
    return scores


def _is_identity(rows: Rows) -> bool:
    return bool((rows == np.arange(len(rows))).all())


_EMPTY_RESULT: tuple[Rows, Vectors] = (np.empty(0, np.int64), np.empty(0, np.float32))


def _kth_largest(values: npt.NDArray[np.float32], k: int) -> float:
    """Return the k-th largest value, -inf if there are no more than k."""
    return float(np.partition(values, len(values) - k)[len(values) - k]) if len(values) > k else -np.inf


def _merge_largest(parts: list[tuple[Rows, Vectors]], n: int) -> tuple[Rows, Vectors]:
    """Merge positions and sums (B, ...) of several parts into the `n` largest, in descending order."""
    if len(parts) == 1:
        return parts[0]
    at, found = (np.concatenate(side, axis=1) for side in zip(*parts, strict=True))
    order = np.argsort(-found, axis=1)[:, :n]
    return np.take_along_axis(at, order, 1), np.take_along_axis(found, order, 1)


def _gathered_scores(vectors: Vectors, positions: Rows, query: Vectors) -> Vectors:
    """Return float32 scores (n,) at positions (n,), gathered in blocks to bound memory."""
    scores = np.empty(len(positions), np.float32)
    for start in range(0, len(positions), 1 << 14):
        part = slice(start, start + (1 << 14))
        scores[part] = vectors[positions[part]] @ query
    return scores


def _row_array(rows: Rows, unique: bool = True) -> Rows:
    array = np.asarray(rows)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(f"rows are {array.dtype} of shape {array.shape}, expected whole numbers of shape (N,)")
    array = array.astype(np.int64, copy=False)
    if array.size and array.min() < 0:
        raise DataError(f"row {array.min()} is negative; rows start at 0")
    if unique and len(array) > 1:
        ordered = np.sort(array)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            raise DataError(f"row {repeated[0]} is named twice")
    return array


def _matrix(values: Vectors, width: int, what: str) -> Vectors:
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] != width:
        raise DataError(f"{what} have shape {array.shape}, expected (n, {width})")
    if array.dtype.kind not in "fiu":
        raise DataError(f"{what} are {array.dtype}, expected numbers")
    with np.errstate(over="ignore"):  # overflows become infinite, and infinite vectors are rejected
        return np.ascontiguousarray(array, np.float32)


def _append_vectors(vectors: Vectors, size: int, more: Vectors) -> Vectors:
    """Return `vectors[:size]` and `more` in one array; spare capacity at its end makes small additions cheap."""
    total = size + len(more)
    if total > len(vectors) or not vectors.flags.writeable:
        wider = np.empty((max(total, size + size // 4), vectors.shape[1]), np.float32)
        wider[:size] = vectors[:size]
        vectors = wider
    vectors[size:total] = more
    return vectors


class _NumpyBlas:
    """Thread control of numpy's bundled OpenBLAS, if numpy uses one.

    OpenBLAS's own threads spin while they wait, and several calling threads would queue for them.
    """

    def __init__(self) -> None:
        self.lock, self.users, self.before = threading.Lock(), 0, 1
        self.get: Callable[[], int] | None = None
        self.set: Callable[[int], None] | None = None
        for file in (Path(np.__file__).parent.parent / "numpy.libs").glob("*openblas*"):
            for end in ("64_", ""):
                with contextlib.suppress(AttributeError, OSError):
                    library = ctypes.CDLL(str(file))
                    self.get = getattr(library, f"scipy_openblas_get_num_threads{end}")
                    self.set = getattr(library, f"scipy_openblas_set_num_threads{end}")
                    return


_blas = _NumpyBlas()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run numpy's matrix products on the calling thread only; the last user restores the number of threads."""
    if _blas.get is None or _blas.set is None:
        yield
        return
    with _blas.lock:
        if not _blas.users:
            _blas.before = _blas.get()
            _blas.set(1)
        _blas.users += 1
    try:
        yield
    finally:
        with _blas.lock:
            _blas.users -= 1
            if not _blas.users:
                _blas.set(_blas.before)
