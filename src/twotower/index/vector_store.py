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
    """Vectors of dimension `width` under their rows, which ascend. The position of a vector is its place among them."""

    def __init__(self, width: int, metric: Similarity) -> None:
        """Create an empty store. Raises DataError."""
        if metric not in ("cosine", "dot"):
            raise DataError(f"metric is {metric!r} (allowed: cosine, dot)")
        if width < 1:
            raise DataError(f"vectors have {width} columns, expected at least 1")
        self.width, self._min_norm = width, MIN_NORM if metric == "cosine" else 0.0
        self.vectors: Shaped[Vectors, "N D"] = np.empty((0, width), np.float32)
        self.rows: Shaped[Rows, "N"] = np.empty(0, np.int64)
        """Row of each position, ascending."""
        self.rejected: Shaped[Rows, "_"] = np.empty(0, np.int64)
        """Rows of rejected vectors, ascending."""
        self.max_norm = 0.0
        """Norm that no vector exceeds."""

    def __len__(self) -> int:
        return len(self.rows)

    def fill(self, rows: Shaped[Rows, "*_"], vectors: Shaped[Vectors, "*_"]) -> None:
        """Take the usable vectors under distinct rows, and reject the others. Raises DataError."""
        rows, vectors = checked_rows(rows), checked_vectors(vectors, self.width, "vectors")
        if len(rows) != len(vectors):
            raise DataError(f"{len(rows)} rows for {len(vectors)} vectors")
        length = norms(vectors)
        good = (length <= MAX_NORM) & (length >= self._min_norm)  # false for nan
        self.rejected = np.sort(rows[~good])
        order = np.argsort(rows)
        order = order[good[order]]
        self.rows, self.vectors = rows[order], vectors[order]
        self.max_norm = float(length[good].max(initial=0.0))

    # Rows

    def find(self, rows: Shaped[Rows, "n"]) -> Shaped[Rows, "n"]:
        """Return the position of each row, -1 for rows that are not in the store."""
        n = len(self.rows)
        if not n or self.rows[-1] == n - 1:  # row r is at position r
            return np.where(rows < n, rows, -1)
        at, found = find_in_sorted(self.rows, rows)
        return np.where(found, at, -1)

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

    def load_rows(self, folder: Path) -> None:
        """Read the rows of a folder. Raises RunError, ValueError."""
        rows = read_checked(folder / "rows.npy", read_array)
        if rows.dtype != np.int64 or rows.ndim != 1:
            raise ValueError(f"rows of {rows.dtype} and shape {rows.shape}, expected int64 and (N,)")
        if (np.diff(rows) <= 0).any() or (len(rows) and rows[0] < 0):
            raise ValueError("rows are repeated, negative or in no order")
        self.rows = rows

    def load(self, folder: Path) -> None:
        """Read rows and memory-mapped vectors of a folder. Raises RunError, ValueError."""
        self.load_rows(folder)
        # A plain array over the map: slices of a memmap are slow to make.
        vectors = np.asarray(read_checked(folder / "vectors.npy", lambda path: read_array(path, "r")))
        if (
            vectors.dtype != np.float32
            or vectors.shape != (len(self.rows), self.width)
            or not vectors.flags.c_contiguous
        ):
            raise ValueError(
                f"vectors of {vectors.dtype} and shape {vectors.shape} for {len(self.rows)} rows of width {self.width}"
            )
        self.vectors = vectors


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
