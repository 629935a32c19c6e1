"""Inputs of towers, and the layouts of their codes: tensors, or the numpy arrays (`Arrays`) that become tensors.

Padded           whole rows of one length, for exported towers and attention
Prefixes         beginnings of sequences in chunks, for means of all of them in one pass
HistoryWindows   beginnings of sequences in rows of one width, for attention over all of them in one pass
Bag              whole rows, flat (module `bag`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Generic

import numpy as np

from twotower.arrays.ragged import Ragged, run_indices
from twotower.arrays.types import Array, Float, Ints, Rows, Shaped

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeVar

    from twotower.model.pooling.pooling import PoolingLayer

    A = TypeVar("A", default=Tensor)
    B = TypeVar("B", default=Tensor)
else:
    from typing import TypeVar

    A, B = TypeVar("A"), TypeVar("B")

Arrays = Shaped[Array, "*_"]
"""A numpy array of a layout."""
Recode = Callable[["Tensor"], "Tensor"]
"""Map from codes (…) of one table to codes (…) of another."""


class CodeLayout(ABC, Generic[A]):
    """Layout of the codes of U rows: a frozen dataclass of arrays. `pooled` calls its method of `PoolingLayer`."""

    def map(self, f: Callable[[A], B]) -> CodeLayout[B]:
        """Apply `f` to each array."""
        arrays = {field.name: f(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]
        return type(self)(**arrays)  # type: ignore[return-value]

    @abstractmethod
    def flat(self: CodeLayout) -> Shaped[Tensor, "L"]:
        """Return all codes, int64; padding becomes 0."""

    @abstractmethod
    def recoded(self: CodeLayout, recode: Recode, rows: int) -> CodeLayout:
        """Return the layout in the codes of a table of `rows` rows. `recode` keeps the order of the codes."""

    @abstractmethod
    def numbered(self: CodeLayout) -> CodeLayout:
        """Return the layout with the places in `flat` as codes, of a table with a row a place."""

    @abstractmethod
    def pooled(self: CodeLayout, layer: PoolingLayer, table: Float[Tensor, "rows E"]) -> Float[Tensor, "U O"]:
        """Return the pooled rows of a table."""

    @abstractmethod
    def padded(self: CodeLayout) -> Padded:
        """Return the codes padded to one length, for poolings without a faster way."""


@dataclass(frozen=True)
class Grid(CodeLayout[A]):
    """Codes in an array of two axes."""

    codes: A  # (…) int64, -1 in padding that is no code

    def flat(self: Grid) -> Shaped[Tensor, "L"]:
        return self.codes.flatten().clamp(min=0).long()

    def recoded(self: Grid, recode: Recode, rows: int) -> Grid:
        return replace(self, codes=recode(self.codes.clamp(min=0)).where(self.codes >= 0, -1))

    def numbered(self: Grid) -> Grid:
        places = (self.codes.new_ones(self.codes.numel()).cumsum(0) - 1).view_as(self.codes)
        return replace(self, codes=places.where(self.codes >= 0, -1))


@dataclass(frozen=True)
class Padded(Grid[A]):
    """U rows of codes, oldest first, padded to one length."""

    codes: A  # (U, T) int64; -1 after the end of a row

    def pooled(self: Padded, layer: PoolingLayer, table: Float[Tensor, "rows E"]) -> Float[Tensor, "U O"]:
        return layer.pool_padded(table, self)

    def padded(self: Padded) -> Padded:
        return self


def pad(ragged: Ragged, rows: Shaped[Rows, "U"], limit: int = 0) -> Shaped[Ints, "U T"]:
    """Return the codes of `rows`, with a `limit` the last ones of each; -1 after the end of a row. T is at least 1."""
    rows = rows.astype(np.int64, copy=False)  # rows + 1 may overflow a narrow type
    starts = ragged.offsets[rows]
    lengths = ragged.offsets[rows + 1] - starts
    if limit:
        starts, lengths = starts + np.maximum(lengths - limit, 0), np.minimum(lengths, limit)
    out = np.full((len(rows), max(1, int(lengths.max(initial=0)))), -1, np.int64)
    out[np.arange(out.shape[1]) < lengths[:, None]] = ragged.values[run_indices(starts, lengths)]
    return out


SCAN_CHUNK = 32
"""Number of interactions in a row of `Prefixes.codes`."""


@dataclass(frozen=True)
class Prefixes(Grid[A]):
    """U prefixes of S sequences, the interactions before U time steps.

    Sequences are cut into K chunks of SCAN_CHUNK codes; the last chunk of a sequence is padded with zeros.
    """

    codes: A  # (K, SCAN_CHUNK) int64
    number: A  # (K,) int64, index of a chunk in its sequence; the chunks of a sequence are consecutive
    last: A  # (U,) int64, position of a prefix's last interaction in the flat codes; undefined if the length is 0
    length: A  # (U,) float32, number of interactions of a prefix

    def pooled(self: Prefixes, layer: PoolingLayer, table: Float[Tensor, "rows E"]) -> Float[Tensor, "U O"]:
        return layer.pool_prefixes(table, self)

    def padded(self: Prefixes) -> Padded:
        n = self.length.long()[:, None]
        position = n.new_ones(max(1, int(n.max()) if len(n) else 1)).cumsum(0) - 1
        place = (self.last[:, None] - n + 1 + position).clamp(0, self.codes.numel() - 1)
        return Padded(self.codes.flatten()[place].where(position < n, -1))


def take_prefixes(
    ragged: Ragged, rows: Shaped[Ints, "S"], which: Shaped[Ints, "U"], length: Shaped[Ints, "U"]
) -> Prefixes[Arrays]:
    """Return U prefixes of the sequences `rows[which]` with these lengths. `rows` are distinct."""
    used = np.zeros(len(rows), np.int64)
    np.maximum.at(used, which, length)
    chunks = -(-used // SCAN_CHUNK)
    first = np.cumsum(chunks) - chunks
    sequence = np.repeat(np.arange(len(rows)), chunks)
    codes = np.zeros(max(1, int(chunks.sum())) * SCAN_CHUNK, np.int64)
    codes[run_indices(first * SCAN_CHUNK, used)] = ragged.values[run_indices(ragged.offsets[rows], used)]
    if not len(sequence):
        sequence = np.zeros(1, np.int64)
    return Prefixes(
        codes.reshape(-1, SCAN_CHUNK),
        np.arange(len(sequence)) - first[sequence],
        np.where(length > 0, first[which] * SCAN_CHUNK + length - 1, 0),
        length.astype(np.float32),
    )


CONTEXT_DIVISOR = 8
"""A row of `HistoryWindows` begins with the last 1 / CONTEXT_DIVISOR of the row before, as context."""


@dataclass(frozen=True)
class HistoryWindows(Grid[A]):
    """U prefixes of S sequences for attention. The sequences are concatenated and cut into R rows of W codes.

    Every row but the first begins with the last codes of the row before, so that every time step has context. The cuts
    depend on the order of the epoch.
    """

    codes: A  # (R, W) int64
    sequence: A  # (R, W) int64, index of the sequence of a code; -1 after the end of the last sequence
    place: A  # (U,) int64, position of a prefix's last interaction in the flat codes; undefined if the length is 0
    length: A  # (U,) float32, number of interactions of a prefix

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
    """Return the prefixes of `take_prefixes` as windows, cut to the codes that attention reaches from their ends."""
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


@dataclass(frozen=True)
class Inputs:
    """The features of U rows of one side, by field name."""

    rows: int
    lookup: Tensor  # (U, number of lookup fields) int64, in the fields' order
    bags: dict[str, CodeLayout]
    dense: dict[str, Tensor]  # (U, length) float32
