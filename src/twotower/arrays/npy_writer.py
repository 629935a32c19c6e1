"""Writers of .npy files in pieces, and the reader of a piece."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 128
"""Bytes before the values of a file."""
_ONE_HEADER = Lock()
"""Held while a header is parsed: two threads at once may fail (github.com/python/cpython/issues/106905)."""


def read_piece(path: Path) -> npt.NDArray[Any]:
    """Return the array of a file, in any thread."""
    with _ONE_HEADER:
        found: npt.NDArray[Any] = np.load(path)
    return found


def write_npy_header(file: BinaryIO, like: npt.NDArray[Any], n: int) -> None:
    """Write the header of a .npy file of `n` rows shaped like `like`: 128 bytes for any `n`."""
    file.seek(0)
    about = {"descr": like.dtype.str, "fortran_order": False, "shape": (n, *like.shape)}
    np.lib.format.write_array_header_1_0(file, about)
    assert file.tell() == HEADER_BYTES, "the header grew"
    file.seek(0, 2)


def write_blocks(path: Path, blocks: Iterable[npt.NDArray[Any]]) -> None:
    """Write a file of at least one block (n, …), block by block."""
    n, like = 0, np.zeros(())
    with path.open("w+b") as file:
        for block in blocks:
            if not file.tell():
                like = np.zeros(block.shape[1:], block.dtype)
                write_npy_header(file, like, 0)
            file.write(np.ascontiguousarray(block).data)
            n += len(block)
        write_npy_header(file, like, n)
