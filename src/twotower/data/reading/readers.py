"""Readers of CSV and Parquet files whose errors name file, line and column."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.data.parts import PART, PartFiles
from twotower.data.reading.column_types import common_types, with_types
from twotower.data.reading.table_path import TablePath, table_server
from twotower.data.reading.table_paths import check_one_kind, part_paths, table_files
from twotower.data.reading.text_files import Reading, as_types, check_utf8, scan_text, text_types, with_places
from twotower.data.split import PART_NAMES
from twotower.errors import DataError, did_you_mean, first_line
from twotower.files.object_stores import explain
from twotower.files.urls import Url

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

TableLike: TypeAlias = (
    "pl.DataFrame | pl.LazyFrame | pd.DataFrame | pa.Table | Mapping[str, Sequence[Any]] | str | Path | PartFiles"
)
"""A table: a frame, an Arrow table (or any other producer of an Arrow stream), columns, the path or URL of a file, or
interactions in files by part."""


Cell: TypeAlias = (
    "str | bytes | float | Decimal | date | timedelta | UUID | np.generic"
    " | npt.NDArray[np.generic] | Sequence[Cell] | None"
)
"""Value of a row, of one column."""


def has_text(*tables: TableLike | None) -> bool:
    """Return True if one of some tables is a text file. Raises DataError for a file that is missing."""
    return any(path is not None and path.is_text for path in map(first_file, tables))


def first_file(table: TableLike | None) -> TablePath | None:
    """Return the first file of a table, None for one that is in memory. Raises DataError for a file that is missing."""
    if isinstance(table, PartFiles):
        return part_paths(table)["train"][0]
    return table_files(table)[0] if isinstance(table, str | Path) else None


def as_frame(table: TableLike, what: str, reading: Reading | None = None) -> pl.DataFrame:
    """Return a polars frame of a polars or pandas frame, any Arrow producer, a mapping of columns, or a path or URL of
    CSV or Parquet."""
    if isinstance(table, pl.DataFrame):
        return table
    if isinstance(table, str | Path):
        return read_file(table, reading)
    if isinstance(table, PartFiles):
        return _read_parts(table, reading)
    try:
        if isinstance(table, pl.LazyFrame):
            return table.collect()
        if type(table).__module__.split(".")[0] == "pandas" and hasattr(table, "columns"):
            return _of_pandas(table)
        if isinstance(table, dict):
            return pl.DataFrame({name: _mapped(values) for name, values in table.items()}, strict=False)
        if hasattr(table, "__arrow_c_stream__") and not isinstance(table, pl.Series):
            return pl.DataFrame(table)
    except (pl.exceptions.PolarsError, TypeError, ValueError) as e:
        raise DataError(
            f"{what}: cannot be read as columns of equal length with one name each ({first_line(e)})"
        ) from None
    raise DataError(
        f"{what}: found {type(table).__name__}, expected a polars or pandas frame, an Arrow table, a mapping of "
        "columns, or a path or URL of a CSV or Parquet file"
    )


def _of_pandas(frame: pd.DataFrame) -> pl.DataFrame:
    """Return a frame of pandas, column by column, which needs no pyarrow, and keeps lists and arrays as lists."""
    return pl.DataFrame([_pandas_column(str(name), frame.iloc[:, i]) for i, name in enumerate(frame.columns)])


def _pandas_column(name: str, column: pd.Series) -> pl.Series:
    kind = column.dtype.kind if isinstance(column.dtype, np.dtype) else "O"
    if kind in "biuf":
        return pl.Series(name, column.to_numpy(), nan_to_null=True)
    return pl.Series(name, column.to_numpy().astype("datetime64[us]")) if kind == "M" else _series(name, column)


def _mapped(values: Iterable[Cell]) -> Iterable[Cell] | pl.Series:
    is_plain = isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.dtype.kind == "O")
    if not is_plain or len({v.dtype if isinstance(v, np.ndarray) else None for v in values} - {None}) == 1:
        return values  # arrays of one type, such as vectors, are read as they are
    return _series("", values)


def _series(name: str, values: Iterable[Cell]) -> pl.Series:
    """Return any values as a series. If one is text, all numbers become text, a whole number the text of its integer:
    an id 7 that a missing value made 7.0 stays 7."""
    plain = [_plain(value) for value in values]
    if any(isinstance(value, str) for value in plain):
        plain = [int(v) if isinstance(v, float | Decimal) and _is_whole(v) else v for v in plain]
        plain = [str(v) if isinstance(v, float | Decimal) else v for v in plain]
    return pl.Series(name, plain, strict=False)


def _is_whole(value: float | Decimal) -> bool:
    """Return True for a number that is an integer, of floats for one that no other integer rounds to."""
    return value == value // 1 and (isinstance(value, Decimal) or abs(value) < 2**53)


def _plain(value: Cell) -> Cell:
    """Return a value as one of Python: one of numpy, of which polars would make all others one type, or takes none; a
    UUID as its text; NaN, also a decimal one, NaT and NA as None. Raises ValueError for a time that Python has not."""
    if isinstance(value, np.datetime64 | np.timedelta64) and not np.isnat(value):
        if isinstance(value.item(), int) and np.datetime_data(value.dtype)[0] not in ("ns", "ps", "fs", "as"):
            raise ValueError(f"{value!r} is no time or duration of Python")
        time: Cell = value.astype(f"{value.dtype.kind}8[us]").item()
        return time
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    elif isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    elif isinstance(value, Decimal) and not value.is_finite():  # no decimal of polars
        value = math.nan if value.is_nan() else float(value)
    is_missing = value != value if isinstance(value, float) else type(value).__name__ in ("NAType", "NaTType")
    return None if is_missing else value


def read_file(
    source: Path | str, reading: Reading | None = None, wanted: Collection[str] | None = None
) -> pl.DataFrame:
    """Read a text (UTF-8, header line) or Parquet file, by its ending, or all files of a folder or pattern as one
    table. Folders named `name=value` are columns, unless the files have them.

    Text files are read as `reading` says, without one as if its `numbers` were None. Of a Parquet file only the
    `wanted` columns are read, or all columns if one of them is missing.
    """
    return _read_paths(table_files(source), reading, wanted)


def _read_parts(files: PartFiles, reading: Reading | None) -> pl.DataFrame:
    """Read the files of all parts as one table, and add the column PART."""
    found = [(path, PART_NAMES.index(name)) for name, paths in part_paths(files).items() for path in paths]
    return _read_paths([path for path, _ in found], reading, None, [code for _, code in found])


def _read_paths(
    paths: list[TablePath], reading: Reading | None, wanted: Collection[str] | None, parts: Sequence[int] = ()
) -> pl.DataFrame:
    """Read files as one table. `parts` are their part codes, if a column PART is wanted."""
    reading = reading or Reading(None)
    check_one_kind(paths)
    paths = [replace(path, encoding=reading.encoding) for path in paths]
    frames = [_read_one(path, reading, wanted) for path in paths]
    if parts:
        codes = (pl.lit(part, pl.Int8).alias(PART) for part in parts)
        frames = [f.with_columns(code) for f, code in zip(frames, codes, strict=True)]
    if not paths[0].is_text:
        types = common_types(paths, [f.schema for f in frames])
        return pl.concat([with_types(path, f, types) for path, f in zip(paths, frames, strict=True)])
    for path, frame in zip(paths, frames, strict=True):
        one, other = frames[0].columns, frame.columns
        if odd := next((name for name in [*one, *other] if not (name in one and name in other)), ""):
            raise DataError(f"{path}: column '{odd}' is not as in {paths[0].name}; give all files the same columns")
    frame = pl.concat([f[frames[0].columns] for f in frames])
    of_file = reading.of_file(paths[0])
    frame = frame.with_columns(as_types(text_types(frame.lazy(), of_file), of_file))
    return with_places(frame.lazy(), reading.lines[2]).collect() if reading.lines[2:] else frame


def _read_one(path: TablePath, reading: Reading, wanted: Collection[str] | None = None) -> pl.DataFrame:
    """Read a file. Columns of a text file are text."""
    with table_errors(path):
        table = scan_text(path, reading) if path.is_text else path.scan()
        if wanted is not None and not path.is_text and set(wanted) <= set(table.collect_schema().names()):
            table = table.select(wanted)
        frame = table.collect()
    if path.is_text and any("\ufffd" in name for name in frame.columns):
        check_utf8(path)
    return frame


def need(frame: pl.DataFrame, columns: list[str], what: str, or_else: str = "") -> None:
    """Raise DataError if the table `what` lacks one of the columns."""
    for name in columns:
        if name not in frame.columns:
            raise DataError(
                f"{what}: no column '{name}'{did_you_mean(name, frame.columns)} "
                f"(found: {', '.join(frame.columns[:12])}{', …' if frame.width > 12 else ''}); "
                f"name it in [schema]{or_else}"
            )


@contextmanager
def table_errors(path: TablePath) -> Iterator[None]:
    """Turn errors of polars about a file into DataErrors of one line, or ObjectErrors if its server does not answer."""
    try:
        with table_server():
            yield
    except pl.exceptions.NoDataError:
        raise DataError(f"{path}: the file is empty; it needs a header line and at least one row") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as e:
        if isinstance(path.place, Url) and isinstance(e, OSError):
            with table_server():
                raise explain(e, path.place) from None
        if path.is_text and (isinstance(path.place, Url) or path.place.is_file()):
            check_utf8(path)
        if path.is_text and "more fields" in str(e):
            raise DataError(
                f"{path}: a line has more values than the first line; put a value that holds the separator between "
                "double quotes, and remove lines above the header and separators at the ends of lines"
            ) from None
        kind = path.ending[1:] if path.is_text else "parquet"
        raise DataError(f"{path}: cannot be read as {kind} ({first_line(e)}); is the file complete?") from None


def columns_and_rows(path: TablePath, reading: Reading) -> tuple[pl.Schema, int]:
    """Return the columns of a file, of a text file without their types, and its number of rows. Call it within
    `table_errors`."""
    if path.is_text:
        table = scan_text(path, reading, first=0)
    else:
        table = path.scan()
    rows = int(table.select(pl.len()).collect(engine="streaming").item())
    return table.collect_schema(), rows or table.collect().height  # a quote in the first row hides all from a count
