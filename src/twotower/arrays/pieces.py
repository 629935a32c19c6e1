"""Long arrays in pieces: temporary arrays on disk, and passes of bounded memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Bools, Doubles, Floats
from twotower.errors import RunError

Scalar = TypeVar("Scalar", bound=np.generic)

PIECE_ROWS = 2**19
"""Values that a pass over a long array reads at a time."""
MEMORY_BYTES = 2**22
"""Largest temporary array in memory. Bytes."""


def pieces(n: int, size: int = PIECE_ROWS) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` that cover 0..n-1."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def temporary_array(
    n: int, dtype: type[Scalar], memory_bytes: int = MEMORY_BYTES, folder: Path | None = None
) -> npt.NDArray[Scalar]:
    """Return an array (n,) of unset values, in memory up to `memory_bytes`, above it mapped from an unnamed file.

    The file is in `folder`, by default the folder for temporary files (TMPDIR). Raises RunError if the disk is full."""
    size = n * np.dtype(dtype).itemsize
    if size <= memory_bytes:
        return np.empty(n, dtype)
    try:
        with tempfile.TemporaryFile(prefix="twotower-", dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a page that the disk has no room for ends the process
                os.posix_fallocate(file.fileno(), 0, size)
            return np.asarray(np.memmap(file, dtype, "r+", shape=(n,)))
    except OSError as e:
        other = "" if folder else ", or set the variable TMPDIR to another folder"
        raise RunError(
            f"{folder or tempfile.gettempdir()}: no room for {size / 1e6:,.0f} MB of temporary arrays "
            f"({e.strerror or e}); free some{other}"
        ) from e


def ones(n: int) -> Floats:
    """Return (n,) ones that take no memory: each is the same number."""
    return np.broadcast_to(np.float32(1), n)


def is_constant(values: npt.NDArray[np.generic]) -> bool:
    """Return True for an array of n times the same number in memory, as `ones` returns it, and maybe for an empty
    one."""
    return values.strides == (0,)


def gathered(
    values: npt.NDArray[Scalar], rows: npt.NDArray[np.integer], memory_bytes: int = MEMORY_BYTES
) -> npt.NDArray[Scalar]:
    """Return the values at `rows` (n,) as a temporary array."""
    out: npt.NDArray[Scalar] = temporary_array(len(rows), values.dtype.type, memory_bytes)
    for part in pieces(len(rows)):
        out[part] = values[rows[part]]
    return out


def selected(values: npt.NDArray[Scalar], keep: Bools, memory_bytes: int = MEMORY_BYTES) -> npt.NDArray[Scalar]:
    """Return the values (n,) in the mask `keep` as a temporary array; those of `is_constant` stay such."""
    if is_constant(values):
        return values[: np.count_nonzero(keep)]
    out: npt.NDArray[Scalar] = temporary_array(int(np.count_nonzero(keep)), values.dtype.type, memory_bytes)
    end = 0
    for part in pieces(len(values)):
        found = values[part][keep[part]]
        out[end : end + len(found)] = found
        end += len(found)
    return out


def mean_of(n: int, values: Callable[[slice], Doubles], size: int = PIECE_ROWS) -> float:
    """Return the mean of n values, read by slices with `values(part)`; NaN for n = 0.

    The result equals `numpy.mean` of all values to the bit: it adds by halves too."""

    def total(start: int, count: int) -> float:
        if count <= size:
            return float(np.add.reduce(values(slice(start, start + count))))
        half = count // 2 - count // 2 % 8
        return total(start, half) + total(start + half, count - half)

    return total(0, n) / n if n else float("nan")
