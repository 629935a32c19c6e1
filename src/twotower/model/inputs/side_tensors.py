"""All rows of one side as inputs of its tower, of which batches take some."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import Ragged, offsets_of, stable_order
from twotower.arrays.types import Bools, Ints
from twotower.data.dataset import Side
from twotower.features.field import InputField
from twotower.model.inputs.carriers import AnyBag, Array, Bag, Inputs, Padded
from twotower.model.inputs.gather import ColumnRows, TowerFields, gather, padded
from twotower.model.inputs.histories import history_windows, prefixes
from twotower.model.inputs.timeline import TimelinePositions

_NO_ORDER = np.zeros(0, np.int32)


class SideTensors:
    """All rows of one side, from which batches take some."""

    def __init__(
        self, side: Side, fields: Iterable[InputField], device: torch.device | str = "cpu", timeline: Ragged | None = None,
        by_user: bool = False,
    ) -> None:  # fmt: skip
        """Prepare the columns of `fields`. `timeline` holds the indices of each row's training interactions, oldest first;
        `take_before` needs it. `by_user` states that these indices rise from row to row and in time."""
        self._fields = TowerFields(fields)
        self.fields = self._fields.all
        self.device = torch.device(device)
        self.n = len(side)
        self._columns = side.columns
        self._lookup = ColumnRows(side.columns, slice(None)).lookup(self._fields.lookups)
        columns = ((f.name, side.columns[f.name]) for _, f in self._fields.bags if f.sequence)
        self._sequences = {name: c for name, c in columns if isinstance(c, Ragged) and c.source is not None}
        # Made on first use: only training needs them, and they are as long as all sequences together.
        self._kept: dict[str, Bools] = {}
        self._timeline_positions: dict[str, TimelinePositions] = {}
        self._timeline, self._by_user = timeline, by_user

    @property
    def has_sequences(self) -> bool:
        return bool(self._sequences)

    def _positions(self, name: str) -> TimelinePositions:
        if name not in self._timeline_positions:
            made = TimelinePositions(self._sequences[name], self._timeline, self._by_user)
            self._timeline_positions[name] = made
        return self._timeline_positions[name]

    def take(self, rows: Ints, left_out: Ints | None = None) -> Inputs:
        """Return the features of `rows` (U,). `left_out` are indices of interactions that no sequence may contain."""

        def carry(selected: ColumnRows, f: InputField) -> Bag[Array] | Padded[Array]:
            if f.name not in self._sequences or left_out is None or not len(left_out):
                return _carry(f, selected.ragged(f.name), selected.numbers)
            if f.name not in self._kept:
                self._kept[f.name] = np.ones(len(self._sequences[f.name].values), bool)
            kept, holes = self._kept[f.name], self._positions(f.name).find(left_out)
            kept[holes] = False
            ragged = _without_holes(self._sequences[f.name], selected.numbers, kept)
            kept[holes] = True
            return _carry(f, ragged)

        return self._tensors(rows, carry)

    def take_before(self, rows: Ints, interactions: Ints) -> Inputs:
        """Return the features of `rows` (U,) before the interactions with the indices `interactions` (U,), one of each
        row."""
        distinct, which = np.unique(rows, return_inverse=True)

        def carry(selected: ColumnRows, f: InputField) -> AnyBag[Array]:
            if f.name not in self._sequences:
                return _carry(f, selected.ragged(f.name), selected.numbers)
            length = self._positions(f.name).prefix_lengths(rows, interactions)
            if f.limit:
                return history_windows(self._sequences[f.name], distinct, which, length, f.limit)
            return prefixes(self._sequences[f.name], distinct, which, length)

        return self._tensors(rows, carry)

    def _tensors(self, rows: Ints, carry: Callable[[ColumnRows, InputField], AnyBag[Array]]) -> Inputs:
        return tensors(self._fields, ColumnRows(self._columns, rows, self._lookup), carry, self.device)


def tensors(
    fields: TowerFields,
    rows: ColumnRows,
    carry: Callable[[ColumnRows, InputField], AnyBag[Array]],
    device: torch.device,
) -> Inputs:
    """Return the features of some rows as tensors on a device."""

    def tensor(array: Array) -> Tensor:
        return torch.from_numpy(array).to(device)

    lookup, bags, dense = gather(fields, rows, carry)
    carried = {name: bag.map(tensor) for name, bag in bags.items()}
    return Inputs(rows.n, tensor(lookup), carried, {name: tensor(x) for name, x in dense.items()})


def carry_forward(rows: ColumnRows, f: InputField) -> Bag[Array] | Padded[Array]:
    """Carry the codes of a field for a forward pass that no backward pass follows."""
    if f.limit:
        return Padded(rows.padded(f))
    ragged = rows.ragged(f.name)
    part = ragged.take(rows.numbers) if rows.slice is None else ragged.part(rows.slice)
    return Bag(part.values, part.offsets.astype(np.int32), _NO_ORDER, _NO_ORDER)


def _carry(f: InputField, ragged: Ragged, rows: Ints | None = None) -> Bag[Array] | Padded[Array]:
    """Carry the codes of some rows, None for all; for attention only the last `limit` of each row."""
    if f.limit:
        return Padded(padded(ragged, np.arange(len(ragged)) if rows is None else rows, f.limit))
    return bag_in_both_orders(ragged if rows is None else ragged.take(rows), f.rows)


def _without_holes(ragged: Ragged, rows: Ints, kept: Bools) -> Ragged:
    """Return some rows, without the values that are not `kept`."""
    indices, lengths = ragged.indices(rows)
    keep = kept[indices]
    owners = np.repeat(np.arange(len(rows)), lengths)[keep]
    return Ragged(ragged.values[indices[keep]], offsets_of(np.bincount(owners, minlength=len(rows))))


def bag_in_both_orders(ragged: Ragged, table_rows: int) -> Bag[Array]:
    """Return the bags of all rows, whose codes are below `table_rows`."""
    order = stable_order(ragged.values)
    code_offsets = np.zeros(table_rows + 1, np.int32)
    np.cumsum(np.bincount(ragged.values, minlength=table_rows), out=code_offsets[1:])
    row = np.repeat(np.arange(len(ragged), dtype=np.int32), ragged.lengths)
    return Bag(ragged.values, ragged.offsets.astype(np.int32), row[order], code_offsets)
