"""Rows of different lengths in two flat arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Codes, Floats, Ints


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row r is `values[offsets[r]:offsets[r + 1]]`.

    `source[i]` is the index of the interaction that `values[i]` comes from; None if it is not kept.
    """

    values: Codes
    offsets: Ints
    source: Ints | None = None

    @classmethod
    def from_pairs(
        cls, rows: npt.NDArray[Any], values: npt.NDArray[Any], n_rows: int, source: Ints | None = None
    ) -> Ragged:
        """Group `values` by `rows` (each 0..n_rows-1), keeping the order within a row."""
        order = np.argsort(rows, kind="stable")
        offsets = np.zeros(n_rows + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=n_rows), out=offsets[1:])
        return cls(values[order].astype(np.int32), offsets, None if source is None else source[order])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)

    def take(self, rows: npt.NDArray[np.integer[Any]]) -> Ragged:
        """Return some rows, concatenated."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Ragged(self.values[np.repeat(self.offsets[rows], lengths) + inside], offsets)

    def keep_last(self, n: int) -> Ragged:
        """Return every row cut to its last `n` values; 0 keeps all."""
        if n == 0 or not len(self.values):
            return self
        from_end = np.repeat(self.offsets[1:], self.lengths) - np.arange(len(self.values))
        offsets = np.zeros_like(self.offsets)
        np.cumsum(np.minimum(self.lengths, n), out=offsets[1:])
        keep = from_end <= n
        return Ragged(self.values[keep], offsets, None if self.source is None else self.source[keep])


Column = Codes | Floats | Ragged
