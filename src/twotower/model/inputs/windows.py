"""Windows: many beginnings of few sequences, for attention over all of them in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from twotower.arrays.ragged import Ragged, run_indices
from twotower.arrays.types import Float, Ints, Shaped
from twotower.model.inputs.code_layout import A, Arrays, CodeLayout, Recode
from twotower.model.inputs.padded import Padded

if TYPE_CHECKING:
    from torch import Tensor

    from twotower.model.pooling.pooling import PoolingLayer

CONTEXT_DIVISOR = 8
"""A row of `HistoryWindows` begins with the last 1 / CONTEXT_DIVISOR of the preceding row, as context."""


@dataclass(frozen=True)
class HistoryWindows(CodeLayout[A]):
    """U prefixes of S sequences for attention: the sequences are concatenated and cut into R rows of W codes.

    Every row but the first begins with the last codes of the preceding row, so that every time step has context. The
    places of the cuts depend on the preceding sequences, and so on the order of the epoch.
    """

    codes: A  # (R, W) int64
    sequence: A  # (R, W) int64, index of the sequence of a code; -1 after the end of the last sequence
    place: A  # (U,) int64, position of a prefix's last interaction in the flat codes; undefined if the length is 0
    length: A  # (U,) float32, number of interactions of a prefix

    def flat(self: HistoryWindows) -> Shaped[Tensor, "L"]:
        return self.codes.flatten().clamp(min=0).long()

    def recoded(self: HistoryWindows, recode: Recode, rows: int) -> HistoryWindows:
        codes = recode(self.codes.clamp(min=0)).where(self.codes >= 0, -1)
        return HistoryWindows(codes, self.sequence, self.place, self.length)

    def numbered(self: HistoryWindows) -> HistoryWindows:
        places = (self.codes.new_ones(self.codes.numel()).cumsum(0) - 1).view_as(self.codes)
        return HistoryWindows(places.where(self.codes >= 0, -1), self.sequence, self.place, self.length)

    def pooled(self: HistoryWindows, layer: PoolingLayer, table: Float[Tensor, "rows E"]) -> Float[Tensor, "U O"]:
        return layer.pool_windows(table, self)

    def padded(self: HistoryWindows) -> Padded:
        """Return for each prefix the codes of its sequence in the row of its last interaction."""
        wide = self.codes.shape[1]
        row, end = self.place // wide, (self.place % wide)[:, None]
        position = self.place.new_ones(wide).cumsum(0) - 1
        own = (self.sequence[row] == self.sequence[row].gather(1, end)) & (position <= end)
        n = own.sum(1, keepdim=True) * (self.length > 0)[:, None]
        codes = self.codes[row].gather(1, (end - n + 1 + position).clamp(0, wide - 1))
        return Padded(codes.where(position < n, -1))


def take_windows(
    ragged: Ragged, rows: Shaped[Ints, "S"], which: Shaped[Ints, "U"], length: Shaped[Ints, "U"], limit: int
) -> HistoryWindows[Arrays]:
    """Return the prefixes of `take_prefixes` as windows, cut to the items that attention can reach from their ends."""
    past = max(1, limit // CONTEXT_DIVISOR)
    ends = np.zeros(len(rows), np.int64)
    np.maximum.at(ends, which, length)
    starts = ends.copy()
    np.minimum.at(starts, which, np.where(length > 0, length - 1, ends[which]))
    starts = np.maximum(starts - past, 0)
    used = ends - starts
    first = np.cumsum(used) - used
    codes = ragged.values[run_indices(ragged.offsets[rows] + starts, used)]
    n = len(codes)
    sequence = np.repeat(np.arange(len(rows)), used)
    at = first[which] + length - 1 - starts[which]  # end of each prefix, in the concatenated sequences
    n_rows = max(1, -(-(n - past) // (limit - past)))
    wide = max(1, -(-(n + (n_rows - 1) * past) // n_rows))  # rows of equal width
    step = wide - past if n_rows > 1 else wide
    row = np.clip((at - past) // step, 0, n_rows - 1)
    grid = np.arange(n_rows)[:, None] * step + np.arange(wide)
    filled = grid < n
    grid = np.where(filled, grid, 0)
    return HistoryWindows(
        codes[grid].astype(np.int64) if n else np.zeros(grid.shape, np.int64),
        np.where(filled, sequence[grid], -1) if n else np.full(grid.shape, -1),
        np.where(length > 0, row * (wide - step) + at, 0),
        length.astype(np.float32),
    )
