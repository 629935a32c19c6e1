"""All rows of one side as inputs of its tower, of which batches take some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Codes, Ints
from twotower.data.dataset import Side
from twotower.features.field import InputField
from twotower.model.inputs.carriers import CONTEXT_DIVISOR, SCAN_CHUNK, Bag, HistoryWindows, Inputs, Padded, Prefixes
from twotower.model.inputs.feed import padded


class SideTensors:
    """All rows of one side, from which batches take some."""

    def __init__(
        self, side: Side, fields: Iterable[InputField], device: torch.device | str = "cpu", timeline: Ragged | None = None,
        by_user: bool = False,
    ) -> None:  # fmt: skip
        """Prepare the columns of `fields`. `timeline` holds the indices of each row's training interactions, oldest first;
        `take_before` needs it. `by_user` states that these indices rise from row to row and in time."""
        self.fields = tuple(fields)
        self.device = torch.device(device)
        self.n = len(side)
        lookups: list[Any] = [side.columns[f.name] for f in self.fields if f.kind == "lookup"]
        self._lookup = np.stack(lookups, 1).astype(np.int64) if lookups else np.zeros((self.n, 0), np.int64)
        self._dense: dict[str, npt.NDArray[Any]] = {
            f.name: side.columns[f.name] for f in self.fields if f.kind == "dense"  # type: ignore[misc]
        }  # fmt: skip
        self._bags: dict[str, tuple[InputField, Ragged]] = {
            f.name: (f, side.columns[f.name]) for f in self.fields if f.kind == "bag"  # type: ignore[misc]
        }  # fmt: skip
        self._sequences = {f.name: r for f, r in self._bags.values() if f.sequence and r.source is not None}
        # Made on first use: only training needs them, and they are as long as all sequences together.
        self._kept: dict[str, npt.NDArray[np.bool_]] = {}
        self._timeline_positions: dict[str, _TimelinePositions] = {}
        self._timeline, self._by_user = timeline, by_user

    @property
    def has_sequences(self) -> bool:
        return bool(self._sequences)

    def _positions(self, name: str) -> _TimelinePositions:
        if name not in self._timeline_positions:
            made = _TimelinePositions(self._sequences[name], self._timeline, self._by_user)
            self._timeline_positions[name] = made
        return self._timeline_positions[name]

    def take(self, rows: Ints, left_out: Ints | None = None) -> Inputs:
        """Return the features of `rows` (U,). `left_out` are indices of interactions that no sequence may contain."""
        bags: dict[str, Bag | Prefixes | HistoryWindows | Padded] = {}
        for name, (f, ragged) in self._bags.items():
            if name not in self._sequences or left_out is None or not len(left_out):
                bags[name] = self._whole(f, ragged, rows, None)
                continue
            if name not in self._kept:
                self._kept[name] = np.ones(len(ragged.values), bool)
            kept, holes = self._kept[name], self._positions(name).find(left_out)
            kept[holes] = False
            bags[name] = self._whole(f, ragged, rows, kept)
            kept[holes] = True
        return self._inputs(rows, bags)

    def take_before(self, rows: Ints, interactions: Ints) -> Inputs:
        """Return the features of `rows` (U,) before the interactions with the indices `interactions` (U,), one of each
        row."""
        distinct, which = np.unique(rows, return_inverse=True)
        bags: dict[str, Bag | Prefixes | HistoryWindows | Padded] = {}
        for name, (f, ragged) in self._bags.items():
            if name not in self._sequences:
                bags[name] = self._whole(f, ragged, rows, None)
                continue
            length = self._positions(name).prefix_lengths(rows, interactions)
            if f.limit:
                bags[name] = self._windows(f, ragged, distinct, which, length)
            else:
                bags[name] = self._prefixes(ragged, distinct, which, length)
        return self._inputs(rows, bags)

    def _inputs(self, rows: Ints, bags: dict[str, Bag | Prefixes | HistoryWindows | Padded]) -> Inputs:
        return Inputs(
            len(rows),
            torch.from_numpy(np.take(self._lookup, rows, 0)).to(self.device),
            bags,
            {name: torch.from_numpy(x[rows]).to(self.device) for name, x in self._dense.items()},
        )

    def _prefixes(self, ragged: Ragged, rows: Ints, which: Ints, length: Ints) -> Prefixes:
        """Return U prefixes: of the sequence `rows[which]` (U,), each of `length` (U,). `rows` (S,) are distinct."""
        used = np.zeros(len(rows), np.int64)
        np.maximum.at(used, which, length)
        chunks = -(-used // SCAN_CHUNK)
        first = np.cumsum(chunks) - chunks
        sequence = np.repeat(np.arange(len(rows)), chunks)
        ends = np.cumsum(used)
        inside = np.arange(int(ends[-1])) - np.repeat(ends - used, used)
        codes = np.zeros(max(1, int(chunks.sum())) * SCAN_CHUNK, np.int64)
        codes[np.repeat(first * SCAN_CHUNK, used) + inside] = ragged.values[
            np.repeat(ragged.offsets[rows], used) + inside
        ]
        if not len(sequence):
            sequence = np.zeros(1, np.int64)
        arrays = (
            codes.reshape(-1, SCAN_CHUNK),
            np.arange(len(sequence)) - first[sequence],
            np.where(length > 0, first[which] * SCAN_CHUNK + length - 1, 0),
            length.astype(np.float32),
        )
        return Prefixes(*(torch.from_numpy(a).to(self.device) for a in arrays))

    def _windows(self, f: InputField, ragged: Ragged, rows: Ints, which: Ints, length: Ints) -> HistoryWindows:
        """Return the prefixes of `_prefixes` as windows, cut to the items that attention can reach from their ends."""
        past = max(1, f.limit // CONTEXT_DIVISOR)
        ends = np.zeros(len(rows), np.int64)
        np.maximum.at(ends, which, length)
        starts = ends.copy()
        np.minimum.at(starts, which, np.where(length > 0, length - 1, ends[which]))
        starts = np.maximum(starts - past, 0)
        used = ends - starts
        first = np.cumsum(used) - used
        n = int(used.sum())
        codes = ragged.values[np.repeat(ragged.offsets[rows] + starts - first, used) + np.arange(n)]
        sequence = np.repeat(np.arange(len(rows)), used)
        at = first[which] + length - 1 - starts[which]  # end of each prefix, in the concatenated sequences
        n_rows = max(1, -(-(n - past) // (f.limit - past)))
        wide = max(1, -(-(n + (n_rows - 1) * past) // n_rows))  # rows of equal width
        step = wide - past if n_rows > 1 else wide
        row = np.clip((at - past) // step, 0, n_rows - 1)
        grid = np.arange(n_rows)[:, None] * step + np.arange(wide)
        filled = grid < n
        grid = np.where(filled, grid, 0)
        arrays = (
            codes[grid].astype(np.int64) if n else np.zeros(grid.shape, np.int64),
            np.where(filled, sequence[grid], -1) if n else np.full(grid.shape, -1),
            np.where(length > 0, row * (wide - step) + at, 0),
            length.astype(np.float32),
        )
        return HistoryWindows(*(torch.from_numpy(a).to(self.device) for a in arrays))

    def _whole(self, f: InputField, ragged: Ragged, rows: Ints, kept: npt.NDArray[np.bool_] | None) -> Bag | Padded:
        """Return all codes of the rows that are `kept`; for attention only the last `limit` of each row."""
        if not f.limit:
            return self._bag(f, ragged, rows, kept)
        if kept is not None:
            lengths = ragged.offsets[rows + 1] - ragged.offsets[rows]
            offsets = np.zeros(len(rows) + 1, np.int64)
            np.cumsum(lengths, out=offsets[1:])
            flat = np.arange(offsets[-1]) + np.repeat(ragged.offsets[rows] - offsets[:-1], lengths)
            row = np.repeat(np.arange(len(rows)), lengths)[kept[flat]]
            ragged = Ragged.from_pairs(row, ragged.values[flat][kept[flat]], len(rows))
            rows = np.arange(len(rows))
        return Padded(torch.from_numpy(padded(ragged, rows, f.limit)).to(self.device))

    def _bag(self, f: InputField, ragged: Ragged, rows: Ints, kept: npt.NDArray[np.bool_] | None) -> Bag:
        lengths = ragged.offsets[rows + 1] - ragged.offsets[rows]
        ends = np.cumsum(lengths)
        flat = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(ragged.offsets[rows] - ends + lengths, lengths)
        row = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
        if kept is not None:
            keep = kept[flat]
            flat, row = flat[keep], row[keep]
            ends = np.cumsum(np.bincount(row, minlength=len(rows)))
        values = ragged.values[flat]
        order = _stable_order(values)
        code_offsets = np.zeros(f.rows + 1, np.int32)
        np.cumsum(np.bincount(values, minlength=f.rows), out=code_offsets[1:])
        offsets = np.zeros(len(rows) + 1, np.int32)
        offsets[1:] = ends
        arrays = (values, offsets, row[order], code_offsets)
        return Bag(*(torch.from_numpy(a).to(self.device) for a in arrays))


class _TimelinePositions:
    """Positions of interactions in a sequence column, and lengths of the prefixes before them."""

    def __init__(self, ragged: Ragged, timeline: Ragged | None, by_user: bool) -> None:
        assert ragged.source is not None
        self._ragged, self._source = ragged, ragged.source
        self._place: Ints | None = None
        self._known: Ints | None = None
        if by_user:  # the sources rise, so a binary search replaces the array of positions
            return
        self._place = np.full(int(self._source.max(initial=-1)) + 1, -1, np.int64)
        self._place[self._source] = np.arange(len(self._source))
        if timeline is not None:
            self._known = _counts_before(timeline, self._place)

    def find(self, interactions: Ints) -> Ints:
        """Return the positions of those interactions that are in the column."""
        if self._place is None:
            if not len(self._source):
                return np.zeros(0, np.int64)
            # With two types numpy would convert all sources.
            at = np.searchsorted(self._source, interactions.astype(self._source.dtype))
            at = np.minimum(at, len(self._source) - 1)
            found: Ints = at[self._source[at] == interactions]
            return found
        found = self._place[interactions[interactions < len(self._place)]]
        return found[found >= 0]

    def prefix_lengths(self, rows: Ints, interactions: Ints) -> Ints:
        """Return the number (U,) of values of each row that are older than the interaction (U,) of that row."""
        if self._place is None:
            wanted = interactions.astype(self._source.dtype)
            return np.searchsorted(self._source, wanted) - self._ragged.offsets[rows]
        assert self._known is not None, "created without a timeline"
        return self._known[interactions]


def _counts_before(timeline: Ragged, position: Ints) -> Ints:
    """Return for each interaction, by index (n,), the number of earlier interactions of its row's timeline that have a
    `position`."""
    numbers = timeline.values
    known = np.zeros(len(numbers), bool)
    inside = numbers < len(position)
    known[inside] = position[numbers[inside]] >= 0
    before = np.cumsum(known) - known
    starts = timeline.offsets[:-1]
    before -= np.repeat(np.append(before, known.sum())[starts], timeline.lengths)
    out = np.zeros(int(numbers.max(initial=-1)) + 1, np.int64)
    out[numbers] = before
    return out


def _stable_order(codes: Codes) -> Ints:
    """Return the stable argsort of codes >= 0, by two passes over 16 bits each, which numpy sorts by radix."""
    order = np.argsort(codes.astype(np.uint16), kind="stable")
    high = codes >> 16
    if not high.any():
        return order
    return order[np.argsort(high[order].astype(np.uint16), kind="stable")]
