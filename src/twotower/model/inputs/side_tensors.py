"""Rows of one side as inputs of its tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.sets import find_in_sorted
from twotower.arrays.types import Array, Bools, Ints, Shaped
from twotower.data.side import Side
from twotower.features.field import InputField
from twotower.model.inputs.bag import Bag, bag_in_both_orders, bag_without_order, without_holes
from twotower.model.inputs.code_layout import Arrays, CodeLayout, Inputs, Padded, pad, take_prefixes, take_windows
from twotower.model.inputs.gather import NO_ROWS, ColumnRows, TowerFields, gather

Carry = Callable[[ColumnRows, InputField], CodeLayout[Arrays]]
"""Maker of the codes of a field of some rows."""


class SideTensors:
    """All rows of one side, from which batches take some."""

    def __init__(
        self, side: Side, fields: Iterable[InputField], device: torch.device | str = "cpu",
        timeline: Ragged | None = None, by_user: bool = False, context: Mapping[str, Column] = {},
    ) -> None:  # fmt: skip
        """Prepare the columns of `fields`.

        `timeline` has the indices of each row's training interactions, oldest first, for `take_before`. `by_user`
        states that the indices rise from row to row and in time. `context` are the columns of the interactions."""
        self._fields = TowerFields(fields)
        self.fields = self._fields.all
        self.device = torch.device(device)
        self.n = len(side)
        self._columns, self._owners = side.columns, side.owners
        self._context = context
        # One array of all codes is faster to take from; with a context there are two tables.
        self._lookup = None if context else ColumnRows(side.columns, slice(None)).lookup(self._fields.lookups)
        columns = ((f.name, side.columns[f.name]) for f in self._fields.bags if f.sequence)
        self._sequences = {name: c for name, c in columns if isinstance(c, Ragged) and c.source is not None}
        # Made on first use: only training needs them, and they are as long as all sequences.
        self._kept: dict[str, Bools] = {}
        self._timeline_positions: dict[str, TimelinePositions] = {}
        self._timeline, self._by_user = timeline, by_user

    @property
    def has_sequences(self) -> bool:
        return bool(self._sequences)

    @property
    def has_context(self) -> bool:
        """True if the tower reads features of the context."""
        return bool(self._context)

    def _positions(self, name: str) -> TimelinePositions:
        if name not in self._timeline_positions:
            made = TimelinePositions(self._sequences[name], self._timeline, self._by_user)
            self._timeline_positions[name] = made
        return self._timeline_positions[name]

    def blocks(self, rows: int, codes: int) -> Iterator[Shaped[Ints, "_"]]:
        """Return all rows in blocks of at most `rows` rows and `codes` codes of bags, at least one row each."""
        every = np.arange(self.n)
        return (every[part] for part in self.parts(every, rows, codes))

    def parts(self, rows: Shaped[Ints, "n"], most: int, codes: int) -> Iterator[slice]:
        """Yield parts of `rows` of at most `most` rows and `codes` codes of bags, at least one row each."""
        total = np.zeros(len(rows), np.int64)
        for f, bag in self._bags:
            at = self._history_rows(rows) if f.sequence else rows
            total += np.cumsum(bag.offsets[at + 1] - bag.offsets[at])
        start = 0
        while start < len(rows):
            before = int(total[start - 1]) if start else 0
            stop = max(start + 1, min(start + most, int(np.searchsorted(total, before + codes, side="right"))))
            yield slice(start, min(stop, len(rows)))
            start = stop

    @property
    def _bags(self) -> Iterator[tuple[InputField, Ragged]]:
        """Fields of many codes that are read whole, and their columns."""
        for f in self._fields.bags:
            if not f.limit and isinstance(bag := self._columns.get(f.name), Ragged):
                yield f, bag

    def _history_rows(self, rows: Shaped[Ints, "U"]) -> Shaped[Ints, "U"]:
        """Return the rows of the sequences of some rows."""
        return rows if self._owners is None else self._owners[rows]

    def take(
        self, rows: Shaped[Ints, "U"], left_out: Shaped[Ints, "_"] | None = None,
        interactions: Shaped[Ints, "_"] = NO_ROWS,
    ) -> Inputs:  # fmt: skip
        """Return the features of `rows` in the context of these `interactions`, by index, if the tower reads one.

        `left_out` are the indices of interactions that no sequence may hold."""

        def carry(joined: ColumnRows, f: InputField) -> Bag[Arrays] | Padded[Arrays]:
            if f.name not in self._sequences or left_out is None or not len(left_out):
                return self._whole(joined.of(f.name), f)
            if f.name not in self._kept:
                self._kept[f.name] = np.ones(len(self._sequences[f.name].values), bool)
            kept, holes = self._kept[f.name], self._positions(f.name).find(left_out)
            kept[holes] = False
            ragged = without_holes(self._sequences[f.name], self._history_rows(joined.numbers), kept)
            kept[holes] = True
            return _carry(f, ragged)

        return self._tensors(rows, interactions, carry)

    def take_before(self, rows: Shaped[Ints, "U"], interactions: Shaped[Ints, "U"]) -> Inputs:
        """Return the features of `rows` before these `interactions`, by index, one a row, with their context."""
        owners = self._history_rows(rows)
        distinct, which = np.unique(owners, return_inverse=True)

        def carry(joined: ColumnRows, f: InputField) -> CodeLayout[Arrays]:
            if f.name not in self._sequences:
                return self._whole(joined.of(f.name), f)
            length = self._positions(f.name).prefix_lengths(owners, interactions)
            if f.limit:
                return take_windows(self._sequences[f.name], distinct, which, length, f.limit)
            return take_prefixes(self._sequences[f.name], distinct, which, length)

        return self._tensors(rows, interactions, carry)

    def _whole(self, rows: ColumnRows, f: InputField) -> Bag[Arrays] | Padded[Arrays]:
        """Return all codes of a field."""
        return _carry(f, rows.ragged(f.name), self._history_rows(rows.numbers) if f.sequence else rows.numbers)

    def _tensors(self, rows: Shaped[Ints, "U"], interactions: Shaped[Ints, "_"], carry: Carry) -> Inputs:
        joined = ColumnRows(self._columns, rows, self._context, interactions, self._lookup)
        return tensors(self._fields, joined, carry, self.device)


def tensors(fields: TowerFields, rows: ColumnRows, carry: Carry, device: torch.device) -> Inputs:
    """Return the features of some rows as tensors on a device."""

    def tensor(array: Shaped[Array, "*n"]) -> Shaped[Tensor, "*n"]:
        return torch.from_numpy(array).to(device)

    lookup, bags, dense = gather(fields, rows, carry)
    carried = {name: bag.map(tensor) for name, bag in bags.items()}
    return Inputs(rows.n, tensor(lookup), carried, {name: tensor(x) for name, x in dense.items()})


def carry_forward(joined: ColumnRows, f: InputField) -> Bag[Arrays] | Padded[Arrays]:
    """Return the codes of a field for a forward pass only."""
    rows = joined.of(f.name)
    if f.limit:
        return Padded(rows.padded(f))
    ragged = rows.ragged(f.name)
    part = ragged.take(rows.numbers) if rows.slice is None else ragged.part(rows.slice)
    return bag_without_order(part)


def _carry(f: InputField, ragged: Ragged, rows: Shaped[Ints, "U"] | None = None) -> Bag[Arrays] | Padded[Arrays]:
    """Return the codes of some rows, None: all; for attention the last `limit` of each row."""
    if f.limit:
        return Padded(pad(ragged, np.arange(len(ragged)) if rows is None else rows, f.limit))
    return bag_in_both_orders(ragged if rows is None else ragged.take(rows), f.rows)


class TimelinePositions:
    """Positions of interactions in a sequence column, and lengths of the prefixes before them."""

    def __init__(self, ragged: Ragged, timeline: Ragged | None, by_user: bool) -> None:
        assert ragged.source is not None
        self._ragged, self._source = ragged, ragged.source
        self._place: Ints | None = None
        self._known: Ints | None = None
        if by_user:  # the sources rise: binary search replaces the array of positions
            return
        self._place = np.full(int(self._source.max(initial=-1)) + 1, -1, np.int64)
        self._place[self._source] = np.arange(len(self._source))
        if timeline is not None:
            self._known = _counts_before(timeline, self._place)

    def find(self, interactions: Shaped[Ints, "n"]) -> Shaped[Ints, "found"]:
        """Return the positions of the interactions that are in the column."""
        if self._place is None:
            # With two types numpy would convert all sources.
            places, known = find_in_sorted(self._source, interactions.astype(self._source.dtype))
            return places[known]
        found = self._place[interactions[interactions < len(self._place)]]
        return found[found >= 0]

    def prefix_lengths(self, rows: Shaped[Ints, "U"], interactions: Shaped[Ints, "U"]) -> Shaped[Ints, "U"]:
        """Return for each row the number of values older than its interaction."""
        if self._place is None:
            wanted = interactions.astype(self._source.dtype)
            return np.searchsorted(self._source, wanted) - self._ragged.offsets[rows]
        assert self._known is not None, "created without a timeline"
        return self._known[interactions]


def _counts_before(timeline: Ragged, position: Shaped[Ints, "_"]) -> Shaped[Ints, "n"]:
    """Return for each interaction, by index, the number of earlier ones of its row's timeline with a `position`."""
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
