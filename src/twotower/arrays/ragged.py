"""Rows of different lengths in two flat arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Codes, Floats, Ints, WholeNumbers


def run_indices(starts: Ints, lengths: Ints) -> Ints:
    """Return the concatenated indices of R runs: `lengths[r]` indices from `starts[r]` on."""
    ends = np.cumsum(lengths)
    indices: Ints = np.repeat(starts - ends + lengths, lengths)
    indices += np.arange(len(indices))
    return indices


def offsets_of(lengths: Ints) -> Ints:
    """Return the offsets (R + 1,) of rows of `lengths` (R,)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row r is `values[offsets[r]:offsets[r + 1]]`.

    `source[i]` is the index of the interaction of `values[i]`; None if it is not stored.
    """

    values: Codes
    offsets: Ints
    source: Ints | None = None

    @classmethod
    def from_pairs(
        cls, rows: npt.NDArray[np.integer], values: npt.NDArray[np.integer], n_rows: int, source: Ints | None = None
    ) -> Ragged:
        """Group `values` by `rows` (0..n_rows-1) and keep their order within a row."""
        order = stable_order(rows)
        offsets = offsets_of(np.bincount(rows, minlength=n_rows))
        return cls(values[order].astype(np.int32), offsets, None if source is None else source[order])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)

    def row(self, row: int) -> Codes:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def owners(self) -> Ints:
        """(L,) row of each value."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def indices(self, rows: npt.NDArray[np.integer]) -> tuple[Ints, Ints]:
        """Return the places in `values` of some rows, row after row, and the lengths of the rows."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        return run_indices(starts, lengths), lengths

    def part(self, rows: slice) -> Ragged:
        """Return consecutive rows, without a copy of their values."""
        start, stop, _ = rows.indices(len(self))
        offsets = self.offsets[start : max(start, stop) + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, rows: npt.NDArray[np.integer]) -> Ragged:
        """Return some rows, concatenated."""
        indices, lengths = self.indices(rows)
        return Ragged(self.values[indices], offsets_of(lengths))

    def draw_neighbours(self, rows: npt.NDArray[np.integer], n: int, rng: np.random.Generator) -> Ints:
        """Draw `n` distinct neighbouring values of each of some rows (R,), from a random place on: (R, n), padded with
        -1."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        first = (rng.random(len(rows)) * lengths).astype(np.int64)
        place = (first[:, None] + np.arange(n)) % np.maximum(lengths, 1)[:, None]
        if not len(self.values):
            return np.full((len(rows), n), -1, np.int64)
        at = np.minimum(starts[:, None] + place, len(self.values) - 1)
        return np.where(np.arange(n) < lengths[:, None], self.values[at], -1).astype(np.int64)

    def keep_last(self, n: int) -> Ragged:
        """Return the last `n` values of every row; 0: all values."""
        if n == 0 or not len(self.values):
            return self
        from_end = np.repeat(self.offsets[1:], self.lengths) - np.arange(len(self.values))
        offsets, keep = offsets_of(np.minimum(self.lengths, n)), from_end <= n
        return Ragged(self.values[keep], offsets, None if self.source is None else self.source[keep])


Column = Codes | Floats | Ragged

Values = npt.NDArray[np.int32 | np.float32]
"""One row of a column: a code (1,), codes (n,) or numbers (length,)."""


def rows_of(column: Column, rows: WholeNumbers) -> Column:
    """Return some rows (n,) of a column."""
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


def row_of(column: Column, row: int) -> Values:
    """Return one row of a column."""
    return column.row(row) if isinstance(column, Ragged) else np.atleast_1d(column[row])


def stable_order(codes: npt.NDArray[np.integer]) -> Ints:
    """Return the stable argsort of codes (n,) of 0 to 2**32 - 1, by radix sorts of 16 bits."""
    order = np.argsort(codes.astype(np.uint16), kind="stable")
    high = codes >> 16
    if not high.any():
        return order
    return order[np.argsort(high[order].astype(np.uint16), kind="stable")]
