"""Inputs of an exported tower, made from the encoded columns of one side; torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Ints
from twotower.features.field import InputField

Feed = dict[str, npt.NDArray[Any]]


def feed(
    fields: tuple[InputField, ...], columns: dict[str, Column], rows: slice | npt.NDArray[np.integer[Any]]
) -> Feed:
    """Return the features of `rows` (U,) by input name. n is the index in `fields`, since names of fields are arbitrary.

    lookup     (U, number of lookup fields) int64, in the fields' order
    bag{n}     (U, T) int64 codes, oldest first, -1 after the end of a row; T is the length of the longest row, at least
               1, and at most the field's `limit` if it has one
    dense{n}   (U, length) float32
    """
    if isinstance(rows, slice):
        rows = np.arange(*rows.indices(len(columns[fields[0].name])))
    lookups = [columns[f.name] for f in fields if f.kind == "lookup"]
    out: Feed = {"lookup": np.empty((len(rows), len(lookups)), np.int64)}
    for place, codes in enumerate(lookups):
        out["lookup"][:, place] = cast(npt.NDArray[Any], codes)[rows]
    for number, f in enumerate(fields):
        if f.kind == "bag":
            out[f"bag{number}"] = padded(cast(Ragged, columns[f.name]), rows, f.limit)
        elif f.kind == "dense":
            out[f"dense{number}"] = cast(npt.NDArray[Any], columns[f.name])[rows].astype(np.float32, copy=False)
    return out


def row_of(column: Column, row: int) -> npt.NDArray[Any]:
    """Return one row of a column: a code (1,), codes (n,) or numbers (length,)."""
    if isinstance(column, Ragged):
        return column.values[column.offsets[row] : column.offsets[row + 1]]
    return np.atleast_1d(column[row])


def feed_row(fields: tuple[InputField, ...], values: Mapping[str, npt.NDArray[Any]]) -> Feed:
    """Return `feed` of one row, given by its values in each column (see `row_of`)."""
    out: Feed = {"lookup": np.array([[values[f.name][0] for f in fields if f.kind == "lookup"]], np.int64)}
    for number, f in enumerate(fields):
        if f.kind == "bag":
            codes = values[f.name][-f.limit :]  # 0: all
            out[f"bag{number}"] = (codes if len(codes) else _NO_CODES).astype(np.int64)[None]
        elif f.kind == "dense":
            out[f"dense{number}"] = values[f.name].astype(np.float32)[None]
    return out


_NO_CODES = np.array([-1])


def padded(ragged: Ragged, rows: npt.NDArray[np.integer[Any]], limit: int = 0) -> Ints:
    """Return the codes (U, T) of `rows` (U,), -1 after the end of a row; T is the length of the longest, at least 1.

    With `limit`, only the last `limit` codes of each row."""
    rows = rows.astype(np.int64, copy=False)  # rows + 1 may overflow a narrow type
    starts = ragged.offsets[rows]
    lengths = ragged.offsets[rows + 1] - starts
    if limit:
        starts, lengths = starts + np.maximum(lengths - limit, 0), np.minimum(lengths, limit)
    out = np.full((len(rows), max(1, int(lengths.max(initial=0)))), -1, np.int64)
    before = np.cumsum(lengths) - lengths
    flat = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    out[np.arange(out.shape[1]) < lengths[:, None]] = ragged.values[flat]
    return out
