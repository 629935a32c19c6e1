"""Inputs of an exported tower, from gathered rows; torch is not needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.arrays.ragged import Column
from twotower.arrays.types import Array, Shaped
from twotower.features.field import InputField
from twotower.model.inputs import carrier
from twotower.model.inputs.gather import ColumnRows, JoinedRows, R, TowerFields, gather

Feed = dict[str, Shaped[Array, "U *_"]]


class FeedFields:
    """The fields of an exported tower, and the names of its inputs.

    lookup     (U, number of lookup fields) int64, in the fields' order
    bag{n}     (U, T) int64 codes, oldest first, -1 after the end of a row; T is the length of the longest row, at least
               1, and at most the field's `limit` if it has one
    dense{n}   (U, length) float32

    n is the index in the fields, since names of fields are arbitrary.
    """

    def __init__(self, fields: tuple[InputField, ...]) -> None:
        self._fields = TowerFields(fields, [f"{carrier(f.kind).label}{n}" for n, f in enumerate(fields)])
        self._empty: Feed = dict.fromkeys(("lookup", *self._fields.keys), np.zeros(0, np.int64))

    def __call__(self, rows: R) -> Feed:
        """Return the features of U rows by input name, in the fields' order."""
        feed = self._empty.copy()
        feed["lookup"], bags, dense = gather(self._fields, rows, lambda rows, f: carrier(f.kind).feed(rows, f))
        feed.update(bags)
        feed.update(dense)
        return feed


def feed(fields: tuple[InputField, ...], columns: dict[str, Column], rows: slice | Shaped[Array, "U"]) -> Feed:
    """Return the features of some rows of encoded columns by input name."""
    return FeedFields(fields)(ColumnRows(columns, rows))


def context_feed(
    fields: tuple[InputField, ...],
    columns: dict[str, Column],
    rows: Shaped[Array, "U"],
    context: dict[str, Column],
    interactions: Shaped[Array, "U"],
) -> Feed:
    """Return the features of some users in the context of some interactions by input name."""
    return FeedFields(fields)(JoinedRows(ColumnRows(columns, rows), ColumnRows(context, interactions)))


def stack_feeds(feeds: Sequence[Feed]) -> Feed:
    """Return one feed of the rows of several, at least one; codes are padded with -1 to the longest row."""
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
