"""Frames of pandas, and mappings of columns of Python values, as frames of polars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, TypeAlias
from uuid import UUID

import numpy as np
import numpy.typing as npt
import polars as pl

if TYPE_CHECKING:
    import pandas as pd

Cell: TypeAlias = (
    "str | bytes | float | Decimal | date | timedelta | UUID | np.generic"
    " | npt.NDArray[np.generic] | Sequence[Cell] | None"
)
"""Value of a row, of one column."""
_MISSING = ("NAType", "NaTType")
"""Types of pandas' missing values, which this module does not import."""
_FINE = ("ns", "ps", "fs", "as")
"""Units of numpy below the microsecond, the unit of Python."""


def of_pandas(frame: pd.DataFrame) -> pl.DataFrame:
    """Return a frame of pandas, column by column, which needs no pyarrow, and keeps lists and arrays as lists."""
    return pl.DataFrame([_pandas_column(str(c), frame.iloc[:, i]) for i, c in enumerate(frame.columns)])


def of_mapping(columns: Mapping[str, Iterable[Cell]]) -> pl.DataFrame:
    """Return a frame of columns: lists, arrays, series, or anything else that polars takes as a column."""
    return pl.DataFrame({name: _mapped(values) for name, values in columns.items()}, strict=False)


def _mapped(values: Iterable[Cell]) -> Iterable[Cell] | pl.Series:
    is_plain = isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.dtype.kind == "O")
    if not is_plain or len({v.dtype if isinstance(v, np.ndarray) else None for v in values} - {None}) == 1:
        return values  # arrays of one type, such as vectors, are read as they are
    return _series("", values)


def _pandas_column(name: str, column: pd.Series) -> pl.Series:
    """Return a pandas column as a series: NaN, NaT and NA as null; lists, tuples and arrays in cells as lists."""
    kind = column.dtype.kind if isinstance(column.dtype, np.dtype) else "O"
    if kind in "biuf":
        return pl.Series(name, column.to_numpy(), nan_to_null=True)
    if kind == "M":
        return pl.Series(name, column.to_numpy().astype("datetime64[us]"))
    return _series(name, column)


def _series(name: str, values: Iterable[Cell]) -> pl.Series:
    """Return any values as a series. If one is text, all numbers become text, a whole number the text of its integer:
    an id 7 that a missing value made 7.0 stays 7."""
    plain = plain_values(values)
    if any(isinstance(value, str) for value in plain):
        plain = [str(v) if isinstance(v, float | Decimal) and not _is_whole(v) else v for v in plain]
        plain = [int(v) if isinstance(v, float | Decimal) else v for v in plain]
    return pl.Series(name, plain, strict=False)


def _is_whole(value: float | Decimal) -> bool:
    """Return True for a number that is an integer, of floats for one that no other integer rounds to."""
    return (
        value == value.to_integral_value() if isinstance(value, Decimal) else value.is_integer() and abs(value) < 2**53
    )


def plain_values(values: Iterable[Cell]) -> list[Cell]:
    """Return values of Python: numbers and times of numpy as such, of which polars would make all others one type, or
    takes none; a UUID as its text; NaN, also a decimal one, NaT and NA as None."""
    return [_plain(value) for value in values]


def _plain(value: Cell) -> Cell:
    if isinstance(value, np.datetime64 | np.timedelta64):
        value = _time(value)
    elif isinstance(value, np.number | np.bool_):
        value = value.item()
    elif isinstance(value, UUID):
        return str(value)
    elif isinstance(value, np.ndarray):
        cells: Cell = value.tolist()
        return cells
    elif isinstance(value, list | tuple):
        return plain_values(value) if len(value) and isinstance(value[0], np.generic | Decimal) else list(value)
    elif isinstance(value, Decimal) and not value.is_finite():  # no decimal of polars
        return None if value.is_nan() else float(value)
    is_missing = value != value if isinstance(value, float) else type(value).__name__ in _MISSING
    return None if is_missing else value


def _time(value: np.datetime64 | np.timedelta64) -> Cell:
    """Return a time or duration of numpy as one of Python, NaT as None. Raises ValueError for one that Python has
    not."""
    if np.isnat(value):
        return None
    given = np.asarray(value)
    if isinstance(given.item(), int) and np.datetime_data(value.dtype)[0] not in _FINE:
        raise ValueError(f"{value!r} is no time or duration of Python")
    found: Cell = given.astype(f"{given.dtype.kind}8[us]").item()
    return found
