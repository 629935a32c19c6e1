"""Arrays on a disk that grow at their end, as .npy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from twotower.encoders import Codes, Ints


class ArrayWriter:
    """Arrays that grow at their end, and offsets of rows that come in order."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self._files: dict[str, tuple[BinaryIO, npt.NDArray[Any]]] = {}
        self._lengths: dict[str, Ints] = {}

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for name, lengths in self._lengths.items():
            self.append(f"{name}.offsets", np.r_[0, np.cumsum(lengths)])
        for file, like in self._files.values():
            write_npy_header(file, like, (file.tell() - 128) // like.nbytes if like.nbytes else 0)
            file.close()

    def append(self, name: str, values: npt.NDArray[Any]) -> None:
        """Rows (n, …) at the end of an array."""
        if name not in self._files:
            file = (self.folder / f"{name}.npy").open("w+b")
            like = np.zeros(values.shape[1:], values.dtype)
            write_npy_header(file, like, 0)
            self._files[name] = (file, like)
        self._files[name][0].write(np.ascontiguousarray(values).data)

    def count(self, name: str, rows: npt.NDArray[Any]) -> None:
        """One more value for each of `rows`, which rise from call to call: what the offsets of `name` count."""
        lengths = self._lengths.setdefault(name, np.zeros(self.rows, np.int64))
        if len(rows):
            first = int(rows[0])
            n = np.bincount(rows - first)
            lengths[first : first + len(n)] += n

    def ragged(
        self, name: str, rows: npt.NDArray[Any], values: Codes, source: npt.NDArray[Any] | None = None, most: int = 0
    ) -> None:
        """Values of rows that rise; of each row the last `most`, or all."""
        if most and len(rows):
            n = np.bincount(rows - rows[0])
            from_end = np.repeat(np.cumsum(n), n) - np.arange(len(rows))
            keep = from_end <= most
            rows, values, source = rows[keep], values[keep], None if source is None else source[keep]
        self.append(f"{name}.values", values)
        if source is not None:
            self.append(f"{name}.source", source)
        self.count(name, rows)


def write_npy_header(file: BinaryIO, like: npt.NDArray[Any], n: int) -> None:
    """The header of a .npy file of n rows as `like`: 128 bytes, whatever n."""
    file.seek(0)
    about = {"descr": like.dtype.str, "fortran_order": False, "shape": (n, *like.shape)}
    np.lib.format.write_array_header_1_0(file, about)
    assert file.tell() == 128, "the header grew"
    file.seek(0, 2)
