"""Vectors under rows: the base of all index classes, and the checks of their input."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from twotower.arrays.sets import find_in_sorted, sorted_unique
from twotower.arrays.types import F32, F64, I64, Doubles, Rows, Shaped, Vectors
from twotower.errors import DataError
from twotower.files.readers import read_array, read_checked

Similarity = Literal["cosine", "dot"]
MAX_NORM = 1e18
"""Largest norm. Vectors above it are rejected: an inner product of two could overflow float32."""
MIN_NORM = 1e-6
"""Smallest norm with metric "cosine". Vectors below it are rejected: their direction is undefined."""


class VectorStore:
    """Vectors of dimension `width`, each at a position under a row.

    Removed vectors keep their position, under row -1, until they are more than half of all.
    """

    def __init__(self, width: int, metric: Similarity) -> None:
        """Create an empty store. Raises DataError."""
        if metric not in ("cosine", "dot"):
            raise DataError(f"metric is {metric!r} (allowed: cosine, dot)")
        if width < 1:
            raise DataError(f"vectors have {width} columns, expected at least 1")
        self.width, self._min_norm = width, MIN_NORM if metric == "cosine" else 0.0
        self._capacity: Shaped[Vectors, "C D"] = np.empty((0, width), np.float32)
        self.rejected: Shaped[Rows, "_"] = np.empty(0, np.int64)
        """Rows of rejected vectors, ascending."""
        self.max_norm = 0.0
        """Norm that no vector exceeds."""
        self._set_rows(np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.sorted_rows)

    @property
    def vectors(self) -> Shaped[Vectors, "P D"]:
        """Vectors at the positions 0..P-1."""
        return self._capacity[: len(self.rows)]

    @vectors.setter
    def vectors(self, vectors: Shaped[Vectors, "P D"]) -> None:
        self._capacity = vectors

    def _set_rows(self, rows: Shaped[Rows, "P"]) -> None:
        """Set the rows of all positions. Raises ValueError for repeated rows."""
        order = np.argsort(rows, kind="stable")[np.count_nonzero(rows < 0) :]
        if (np.diff(rows[order]) == 0).any():
            raise ValueError("rows are repeated")
        self.rows: Shaped[Rows, "P"] = rows
        """Row of each position, -1 for a removed one."""
        self.sorted_rows: Shaped[Rows, "N"] = rows[order]
        """Rows of the store, ascending."""
        self.sorted_positions: Shaped[Rows, "N"] = order
        """Position of each of `sorted_rows`."""
        self.identity = _is_identity(rows)
        """True if row r is at position r for all positions."""

    # Changes

    def checked(
        self, rows: Shaped[Rows, "*_"], vectors: Shaped[Vectors, "*_"]
    ) -> tuple[Shaped[Rows, "n"], Shaped[Vectors, "n D"]]:
        """Return distinct rows as int64 and their vectors as float32. Raises DataError."""
        rows, vectors = checked_rows(rows), checked_vectors(vectors, self.width, "vectors")
        if len(rows) != len(vectors):
            raise DataError(f"{len(rows)} rows for {len(vectors)} vectors")
        return rows, vectors

    def append(self, rows: Shaped[Rows, "n"], vectors: Shaped[Vectors, "n D"]) -> int | None:
        """Add the usable vectors under rows that are not in the store, and reject the others.

        Returns the position of the first added vector. None: no vector is usable.
        """
        length = norms(vectors)
        good = (length <= MAX_NORM) & (length >= self._min_norm)  # false for nan
        self.rejected = np.union1d(np.setdiff1d(self.rejected, rows), rows[~good])
        if not good.all():
            rows, vectors, length = rows[good], vectors[good], length[good]
        if not len(rows):
            return None
        self.max_norm = max(self.max_norm, float(length.max()))
        size = len(self.rows)
        self._capacity = _append_vectors(self._capacity, size, vectors) if size else vectors.copy()
        self.rows = np.concatenate([self.rows, rows])
        order = np.argsort(rows)
        at = np.searchsorted(self.sorted_rows, rows[order])
        self.sorted_rows = np.insert(self.sorted_rows, at, rows[order])
        self.sorted_positions = np.insert(self.sorted_positions, at, size + order)
        self.identity = _is_identity(self.rows)
        return size

    def delete(self, positions: Shaped[Rows, "_"]) -> int | None:
        """Remove the rows at positions. Returns the number of unchanged positions, None if no position changes."""
        if not len(positions):
            return None
        removed = np.searchsorted(self.sorted_rows, self.rows[positions])
        self.rows[positions] = -1
        self.sorted_rows = np.delete(self.sorted_rows, removed)
        self.sorted_positions = np.delete(self.sorted_positions, removed)
        self.identity = False
        if 2 * len(self.sorted_rows) >= len(self.rows):
            return len(self.rows)
        alive = np.flatnonzero(self.rows >= 0)
        self._capacity, self.rows = self._capacity[alive], self.rows[alive]
        self.sorted_positions = np.searchsorted(alive, self.sorted_positions)
        return 0

    # Rows

    def find(self, rows: Shaped[Rows, "n"]) -> Shaped[Rows, "n"]:
        """Return the position of each row, -1 for rows that are not in the store."""
        if self.identity:
            return np.where(rows < len(self.rows), rows, -1)
        if not len(self.sorted_rows):
            return np.full(len(rows), -1, np.int64)
        at, found = find_in_sorted(self.sorted_rows, rows)
        return np.where(found, self.sorted_positions[at], -1)

    def known(self, rows: Shaped[Rows, "_"]) -> Shaped[Rows, "_"]:
        """Return the positions of rows without rejected ones. Raises DataError for other rows outside the store."""
        found = self.find(rows)
        if (found >= 0).all():
            return found
        missing = rows[found < 0]
        unknown = missing[~np.isin(missing, self.rejected)]
        if len(unknown):
            raise DataError(f"row {unknown[0]} is not in the index")
        return found[found >= 0]

    def positions(self, rows: Shaped[Rows, "_"]) -> Shaped[Rows, "_"]:
        """Return the ascending positions of the rows that are in the store."""
        found = sorted_unique(self.find(checked_rows(rows, unique=False)))
        return found[np.searchsorted(found, 0) :]

    # Files

    def save(self, folder: Path) -> None:
        """Write vectors and rows into a folder."""
        np.save(folder / "vectors.npy", self.vectors)
        np.save(folder / "rows.npy", self.rows)

    def load_rows(self, folder: Path) -> None:
        """Read the rows of a folder. Raises RunError, ValueError."""
        rows = read_checked(folder / "rows.npy", read_array)
        if rows.dtype != np.int64 or rows.ndim != 1:
            raise ValueError(f"rows of {rows.dtype} and shape {rows.shape}, expected int64 and (N,)")
        self._set_rows(rows)

    def load(self, folder: Path, mmap: bool) -> None:
        """Read rows and vectors of a folder, the vectors memory-mapped if `mmap`. Raises RunError, ValueError."""
        self.load_rows(folder)
        # A plain array over the map: slices of a memmap are slow to make.
        vectors = np.asarray(read_checked(folder / "vectors.npy", lambda path: read_array(path, "r" if mmap else None)))
        if (
            vectors.dtype != np.float32
            or vectors.shape != (len(self.rows), self.width)
            or not vectors.flags.c_contiguous
        ):
            raise ValueError(
                f"vectors of {vectors.dtype} and shape {vectors.shape} for {len(self.rows)} rows of width {self.width}"
            )
        self._capacity = vectors


def norms(vectors: Shaped[Vectors, "n D"]) -> F64[Doubles, "n"]:
    """Return the norms of vectors, summed in float64."""
    length: Doubles = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    return length


def checked_rows(rows: Shaped[Rows, "*_"], unique: bool = True) -> I64[Rows, "n"]:
    """Return rows as int64. Raises DataError if they are negative, not whole numbers, or, with `unique`, repeated."""
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


def checked_vectors(values: Shaped[Vectors, "*_"], width: int, name: str) -> F32[Vectors, "n D"]:
    """Return values of dimension `width` as contiguous float32. Raises DataError for another shape or type."""
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] != width:
        raise DataError(f"{name} have shape {array.shape}, expected (n, {width})")
    if array.dtype.kind not in "fiu":
        raise DataError(f"{name} are {array.dtype}, expected numbers")
    with np.errstate(over="ignore"):  # an overflow becomes infinite, and infinite vectors are rejected
        return np.ascontiguousarray(array, np.float32)


def _append_vectors(vectors: Shaped[Vectors, "C D"], size: int, more: Shaped[Vectors, "n D"]) -> Shaped[Vectors, "_ D"]:
    """Return `vectors[:size]` and `more` in one array; spare capacity at its end makes small additions cheap."""
    total = size + len(more)
    if total > len(vectors) or not vectors.flags.writeable:
        wider = np.empty((max(total, size + size // 4), vectors.shape[1]), np.float32)
        wider[:size] = vectors[:size]
        vectors = wider
    vectors[size:total] = more
    return vectors


def _is_identity(rows: Shaped[Rows, "P"]) -> bool:
    return bool((rows == np.arange(len(rows))).all())
