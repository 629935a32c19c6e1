"""Maker of tower inputs: rows of encoded columns as numpy arrays, through the carrier of each field.

Training, bulk embedding and requests differ in the source of the rows (`RowSource`) and in the layout of many codes.
`side_tensors` makes tensors of the arrays, `feed` inputs of an exported tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from twotower.arrays.ragged import Column, Ragged, Values
from twotower.arrays.types import Array, Codes, Floats, Ints, Shaped
from twotower.features.field import InputField
from twotower.model.inputs import carrier, stacked
from twotower.model.inputs.code_layout import pad


class TowerFields:
    """Fields of a tower by kind, in order."""

    def __init__(self, fields: Iterable[InputField]) -> None:
        self.all = tuple(fields)
        self.lookups = tuple(f.name for f in stacked(self.all))
        others = [f for f in self.all if not carrier(f.kind).is_stacked]
        self.bags = tuple(f for f in others if carrier(f.kind).has_table)
        self.dense = tuple(f for f in others if not carrier(f.kind).has_table)


class RowSource(Protocol):
    """U rows of one side."""

    n: int

    def lookup(self, names: tuple[str, ...]) -> Shaped[Ints, "U F"]:
        """Return the codes of fields of one code, one name each."""

    def dense(self, name: str) -> Shaped[Floats, "U n"]:
        """Return the numbers of a field."""

    def padded(self, field: InputField) -> Shaped[Ints, "U T"]:
        """Return the codes of a field of many codes, as `pad` does."""


NO_ROWS = np.zeros(0, np.int64)
R = TypeVar("R", bound=RowSource)
C = TypeVar("C")


def gather(
    fields: TowerFields, rows: R, carry: Callable[[R, InputField], C]
) -> tuple[Shaped[Ints, "U F"], dict[str, C], dict[str, Shaped[Array, "U *_"]]]:
    """Return the codes of lookup fields, and by name what `carry` makes of many codes, and numbers (U, length)."""
    dense = {f.name: carrier(f.kind).feed(rows, f) for f in fields.dense}
    return rows.lookup(fields.lookups), {f.name: carry(rows, f) for f in fields.bags}, dense


class ColumnRows:
    """Some rows of encoded columns, by their numbers (U,) or as a slice, each with a row of the context, if there is
    one."""

    def __init__(
        self, columns: Mapping[str, Column], rows: Shaped[Array, "U"] | slice, context: Mapping[str, Column] = {},
        interactions: Shaped[Array, "_"] = NO_ROWS, stacked: Shaped[Ints, "n F"] | None = None,
    ) -> None:  # fmt: skip
        """Select `rows`, and `interactions` (U,) of the context. `stacked` are the codes of all lookup fields as one
        array, which is faster."""
        self.columns, self.stacked = columns, stacked
        self.slice = rows if isinstance(rows, slice) else None
        length = len(next(iter(columns.values()))) if isinstance(rows, slice) else 0
        self.numbers: Ints = (
            np.arange(*rows.indices(length)) if isinstance(rows, slice) else rows.astype(np.int64, copy=False)
        )
        self.n = len(self.numbers)
        self._context = ColumnRows(context, interactions) if context else None

    def lookup(self, names: tuple[str, ...]) -> Shaped[Ints, "U F"]:
        if self.stacked is not None:
            return np.take(self.stacked, self.numbers, 0)
        out = np.empty((self.n, len(names)), np.int64)
        for place, name in enumerate(names):
            out[:, place] = self.of(name).flat(name)
        return out

    def dense(self, name: str) -> Shaped[Floats, "U n"]:
        return self.of(name).flat(name).astype(np.float32, copy=False)

    def padded(self, field: InputField) -> Shaped[Ints, "U T"]:
        rows = self.of(field.name)
        return pad(rows.ragged(field.name), rows.numbers, field.limit)

    def of(self, name: str) -> ColumnRows:
        """Return the rows that have the column of a field."""
        return self._context if self._context is not None and name in self._context.columns else self

    def ragged(self, name: str) -> Ragged:
        """Return a whole column of many codes."""
        column = self.columns[name]
        assert isinstance(column, Ragged)
        return column

    def flat(self, name: str) -> Shaped[Codes, "U"] | Shaped[Floats, "U n"]:
        """Return the values of a column of one code, or of numbers."""
        column = self.columns[name]
        assert not isinstance(column, Ragged)
        return column[self.numbers if self.slice is None else self.slice]


class OneRow:
    """One row, by its values in each column."""

    n = 1

    def __init__(self, values: Mapping[str, Values]) -> None:
        self.values = values

    def lookup(self, names: tuple[str, ...]) -> Shaped[Ints, "U F"]:
        return np.array([[self.values[name][0] for name in names]], np.int64)

    def dense(self, name: str) -> Shaped[Floats, "U n"]:
        return self.values[name].astype(np.float32)[None]

    def padded(self, field: InputField) -> Shaped[Ints, "U T"]:
        codes = self.values[field.name][-field.limit :]  # 0: all
        return (codes if len(codes) else _NO_CODES).astype(np.int64)[None]


_NO_CODES = np.array([-1], np.int32)


Feed = dict[str, Shaped[Array, "U *_"]]


class FeedFields:
    """Fields of an exported tower, and the names of its inputs.

    lookup     (U, number of lookup fields) int64, in the fields' order
    bag{n}     (U, T) int64 codes, oldest first, -1 after the end of a row; T is the length of the longest row, at least
               1, and at most the field's `limit` if it has one
    dense{n}   (U, length) float32

    n is the index in the fields, as names of fields are arbitrary.
    """

    def __init__(self, fields: tuple[InputField, ...]) -> None:
        self._lookups = tuple(f.name for f in stacked(fields))
        of_fields = [(number, f, carrier(f.kind)) for number, f in enumerate(fields)]
        self._others = [(f"{of.label}{number}", f, of) for number, f, of in of_fields if not of.is_stacked]

    def __call__(self, rows: RowSource) -> Feed:
        """Return the features of U rows by input name, in the fields' order."""
        others = {name: of.feed(rows, field) for name, field, of in self._others}
        return {"lookup": rows.lookup(self._lookups), **others}


def feed(
    fields: tuple[InputField, ...], columns: dict[str, Column], rows: slice | Shaped[Array, "U"],
    context: Mapping[str, Column] = {}, interactions: Shaped[Array, "_"] = NO_ROWS,
) -> Feed:  # fmt: skip
    """Return the features of some rows of encoded columns, in the `context` of some interactions (U,) if fields read
    it, by input name."""
    return FeedFields(fields)(ColumnRows(columns, rows, context, interactions))


def stack_feeds(feeds: Sequence[Feed]) -> Feed:
    """Return one feed of the rows of several. Codes are padded with -1 to the longest row."""
    stacked: Feed = {}
    for name in feeds[0]:
        parts = [one[name] for one in feeds]
        out = np.full((sum(map(len, parts)), max(part.shape[1] for part in parts)), -1, parts[0].dtype)
        start = 0
        for part in parts:
            out[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        stacked[name] = out
    return stacked
