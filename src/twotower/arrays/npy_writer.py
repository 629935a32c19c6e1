"""Writers of .npy files whose number of rows is not known in advance."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Codes, Ints


class ArrayWriter:
    """Writer of .npy arrays that are appended to, and of the offsets of ragged columns whose rows come in order."""

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
        """Append rows (n, …) to an array."""
        if name not in self._files:
            file = (self.folder / f"{name}.npy").open("w+b")
            like = np.zeros(values.shape[1:], values.dtype)
            write_npy_header(file, like, 0)
            self._files[name] = (file, like)
        self._files[name][0].write(np.ascontiguousarray(values).data)

    def count(self, name: str, rows: npt.NDArray[Any]) -> None:
        """Count one more value for each of `rows`, which rise from call to call, in the offsets of `name`."""
        lengths = self._lengths.setdefault(name, np.zeros(self.rows, np.int64))
        if len(rows):
            first = int(rows[0])
            n = np.bincount(rows - first)
            lengths[first : first + len(n)] += n

    def ragged(
        self,
        name: str,
        rows: npt.NDArray[Any],
        values: Codes,
        source: npt.NDArray[Any] | None = None,
        max_values: int = 0,
    ) -> None:
        """Append values (n,) of the rows (n,), which rise, to a ragged column: the last `max_values` of each row, 0 for all."""
        if max_values and len(rows):
            n = np.bincount(rows - rows[0])
            from_end = np.repeat(np.cumsum(n), n) - np.arange(len(rows))
            keep = from_end <= max_values
            rows, values, source = rows[keep], values[keep], None if source is None else source[keep]
        self.append(f"{name}.values", values)
        if source is not None:
            self.append(f"{name}.source", source)
        self.count(name, rows)


def write_npy_header(file: BinaryIO, like: npt.NDArray[Any], n: int) -> None:
    """Write the header of a .npy file of `n` rows shaped like `like`: 128 bytes for any `n`."""
    file.seek(0)
    about = {"descr": like.dtype.str, "fortran_order": False, "shape": (n, *like.shape)}
    np.lib.format.write_array_header_1_0(file, about)
    assert file.tell() == 128, "the header grew"
    file.seek(0, 2)
