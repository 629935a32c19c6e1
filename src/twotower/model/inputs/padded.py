"""Padded codes: the input of an exported tower, and of whole histories that are read in windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from twotower.arrays.ragged import Ragged, run_indices
from twotower.arrays.types import Float, Ints, Rows, Shaped
from twotower.model.inputs.code_layout import A, CodeLayout, Recode

if TYPE_CHECKING:
    from torch import Tensor

    from twotower.model.pooling.pooling import PoolingLayer


@dataclass(frozen=True)
class Padded(CodeLayout[A]):
    """U rows of codes, oldest first, padded to one length."""

    codes: A  # (U, T) int64; -1 after the end of a row

    def flat(self: Padded) -> Shaped[Tensor, "L"]:
        return self.codes.flatten().clamp(min=0).long()

    def recoded(self: Padded, recode: Recode, rows: int) -> Padded:
        return Padded(recode(self.codes.clamp(min=0)).where(self.codes >= 0, -1))

    def numbered(self: Padded) -> Padded:
        places = (self.codes.new_ones(self.codes.numel()).cumsum(0) - 1).view_as(self.codes)
        return Padded(places.where(self.codes >= 0, -1))

    def pooled(self: Padded, layer: PoolingLayer, table: Float[Tensor, "rows E"]) -> Float[Tensor, "U O"]:
        return layer.pool_padded(table, self)

    def padded(self: Padded) -> Padded:
        return self


def pad(ragged: Ragged, rows: Shaped[Rows, "U"], limit: int = 0) -> Shaped[Ints, "U T"]:
    """Return the codes of `rows`, -1 after the end of a row; T is the length of the longest, at least 1.

    With `limit`, only the last `limit` codes of each row."""
    rows = rows.astype(np.int64, copy=False)  # rows + 1 may overflow a narrow type
    starts = ragged.offsets[rows]
    lengths = ragged.offsets[rows + 1] - starts
    if limit:
        starts, lengths = starts + np.maximum(lengths - limit, 0), np.minimum(lengths, limit)
    out = np.full((len(rows), max(1, int(lengths.max(initial=0)))), -1, np.int64)
    out[np.arange(out.shape[1]) < lengths[:, None]] = ragged.values[run_indices(starts, lengths)]
    return out
