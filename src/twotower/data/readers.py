"""Readers of CSV and Parquet files whose errors name file, line and column."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import polars as pl

from twotower.data.column_types import common_types, with_types
from twotower.data.parts import PART, PartFiles
from twotower.data.python_frames import of_mapping, of_pandas
from twotower.data.split import PART_NAMES
from twotower.data.table_path import CsvOptions, TablePath, table_server
from twotower.data.table_paths import part_paths, table_files
from twotower.data.text_encoding import check_line_ends, check_utf8
from twotower.data.text_format import SEPARATOR_OF, SEPARATORS, SPACE, TextFormat
from twotower.data.user_lines import read_first_values, scan_user_lines, with_places
from twotower.errors import DataError, first_line
from twotower.features.schema import Schema, is_pattern
from twotower.features.side import FeatureSide, SideName
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

MAX_COMMENTS = 1000
"""Lines, the first ones, that are looked at for comments."""


@dataclass(frozen=True)
class Reading:
    """Types of the columns of a CSV, which has none of its own, and the form of text files.

    `numbers` are columns whose type (dates too) polars infers, `text` are columns of text. Any other column is text,
    unless all its values are spelled as whole numbers or booleans are: "007" and "7", or "1.10" and "1.1", stay two
    values. `numbers` None infers every type."""

    numbers: frozenset[str] | None
    text: frozenset[str] = frozenset()
    separator: str = ""
    """Character between the values. Empty: by the file's ending."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a file without a header line. Empty: the first line names them."""
    lines: tuple[str, ...] = ()
    """Names of the columns of the users, the items and, if any, the order, of files with one user a line. Empty: one
    row a line."""
    option: str = "data.format.{}"
    """Name of an option of the form in messages."""
    dates: bool = True
    """False: dates in text files stay text, where `numbers` is None."""
    decimal_comma: bool = False
    """True: numbers have a decimal comma, in files whose separator is none."""
    encoding: str | None = None
    """Encoding of the files, as Python names it. None: UTF-8, and no option names another one."""

    @classmethod
    def of(cls, schema: Schema, side: SideName | None = None, form: TextFormat | None = None) -> Reading:
        """Return the types that a schema requires for the table of a side, or for the interactions, in files of a
        form."""
        form = form or TextFormat()
        comma = form.decimal == ","
        ids = {schema.user_id, schema.item_id, schema.table_id(side or "user")}
        if side is None:
            averaged = {s.column for s in schema.statistics() if s.column}
            of_type = _columns_by_type(schema, "context")
            own = ids | {schema.time}  # `Times` reads the time
            numbers = frozenset({schema.label, schema.weight, *averaged, *of_type["numbers"]} - own)
            text = frozenset(of_type["text"] - numbers - own)
            lines = _columns_of_lines(schema) if form.layout == "sequences" else ()
            return cls(
                numbers | {*lines[2:]},
                text,
                form.separator_of("interactions"),
                form.columns,
                lines,
                decimal_comma=comma,
                encoding=form.encoding,
            )
        of_type = _columns_by_type(schema, side)
        text = frozenset(of_type["text"] - of_type["numbers"] - ids)
        separator = form.separator_of(f"{side}s")
        return cls(frozenset(of_type["numbers"] - ids), text, separator, decimal_comma=comma, encoding=form.encoding)

    def of_table(self, form: TextFormat) -> Reading:
        """Return the types of columns for one table in files of a form, whose options are arguments of a call."""
        return replace(
            self,
            separator=form.separator,
            columns=form.columns,
            option="`{}`",
            decimal_comma=form.decimal == ",",
            encoding=None,
        )


def _columns_of_lines(schema: Schema) -> tuple[str, ...]:
    """Return the columns that files with one user a line give. Raises DataError if the schema wants times."""
    if schema.time and schema.time_unit != "order":
        raise DataError(
            f"data.format.layout = 'sequences' gives '{schema.time}' an order, and schema.time_unit = "
            f"'{schema.time_unit}' wants times; set schema.time_unit = 'order'"
        )
    return (schema.user_id, schema.item_id, *filter(None, [schema.time]))


def _columns_by_type(schema: Schema, side: FeatureSide) -> dict[str, set[str]]:
    """Return the columns of numbers and of text that features of a side, or of the context, read."""
    features = [f for f in schema.columns(side) if not f.reads_time]
    return {t: {f.source for f in features if f.column_type == t} for t in ("numbers", "text")}


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
            return of_pandas(table)
        if isinstance(table, dict):
            return of_mapping(table)
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


CANONICAL_INTEGER, CANONICAL_BOOLEAN = r"^(0|-?[1-9]\d*)$", r"^(?i:true|false)$"
"""Spellings of which a column of text is one of numbers or of truth values."""


def read_file(
    source: Path | str, reading: Reading | None = None, wanted: Collection[str] | None = None
) -> pl.DataFrame:
    """Read a text (UTF-8, header line) or Parquet file, by its ending, or all files of a folder or pattern as one
    table. Folders named `name=value` are columns, unless the files have them.

    Without a `reading`, or with its `numbers` None, polars infers the types of a CSV, but a column stays text if its
    spelling is not that of whole numbers. Of a Parquet file only the `wanted` columns are read, or all columns if one
    of them is missing.
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
    paths = [replace(path, encoding=reading.encoding) for path in paths]
    frame = _read_all(paths, reading, wanted, parts)
    if not paths[0].is_text:
        return frame
    if reading.lines[2:]:
        frame = with_places(frame.lazy(), reading.lines[2]).collect()
    if reading.numbers is None:
        whole = [name for name, dtype in frame.schema.items() if dtype == pl.Int64]
        spelling = _read_all(paths, replace(reading, numbers=frozenset()), None)
        return frame.with_columns(parse_canonical_text(spelling[name]) for name in whole)
    left = [name for name in frame.columns if name not in reading.numbers | reading.text and name != PART]
    return frame.with_columns(parse_canonical_text(frame[name]) for name in left)


def _read_all(
    paths: list[TablePath], reading: Reading, wanted: Collection[str] | None, parts: Sequence[int] = ()
) -> pl.DataFrame:
    frames = [_read_one(path, reading, wanted) for path in paths]
    if parts:
        codes = (pl.lit(part, pl.Int8).alias(PART) for part in parts)
        frames = [f.with_columns(code) for f, code in zip(frames, codes, strict=True)]
    if not paths[0].is_text:
        types = common_types(paths, [f.schema for f in frames])
        return pl.concat([with_types(path, f, types) for path, f in zip(paths, frames, strict=True)])
    for path, other in zip(paths[1:], frames[1:], strict=True):
        for name in [*frames[0].columns, *other.columns]:
            found = {frames[0].schema.get(name), other.schema.get(name)}
            # 3 in one CSV and 3.5 in the next are numbers of one column.
            if len(found) > 1 and not found <= {pl.Int64, pl.Float64}:
                raise DataError(
                    f"{path}: column '{name}' is not as in {paths[0].name}; give all files the same columns"
                )
    return pl.concat([f[frames[0].columns] for f in frames], how="vertical_relaxed")


def _read_one(path: TablePath, reading: Reading, wanted: Collection[str] | None = None) -> pl.DataFrame:
    """Read a file. Columns of a CSV outside `reading.numbers` are text, unless that is None."""
    with table_errors(path):
        if not path.is_text:
            table = path.scan()
            if wanted is not None and set(wanted) <= set(table.collect_schema().names()):
                table = table.select(wanted)
            return table.collect()
        if reading.lines:
            return scan_text(path, reading).collect()
        frame = path.read_csv(**csv_options(path, reading))
    if any("\ufffd" in name for name in frame.columns):
        check_utf8(path)
    return path.with_folder_columns(frame.lazy(), _texts(path, reading)).collect()


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
            _check_comments(path)
            raise DataError(
                f"{path}: a line has more values than the first line; put a value that holds the separator between "
                "double quotes, and remove lines above the header and separators at the ends of lines"
            ) from None
        kind = path.ending[1:] if path.is_text else "parquet"
        raise DataError(f"{path}: cannot be read as {kind} ({first_line(e)}); is the file complete?") from None


def scan_text(path: TablePath, reading: Reading, first: int | None = None) -> pl.LazyFrame:
    """Scan a text file. Of files with one user a line, the column of the order begins at `first`; None leaves it out.
    Call it within `table_errors`. Raises DataError as `column_names` does."""
    if not reading.lines:
        return path.with_folder_columns(path.scan_csv(**csv_options(path, reading)), _texts(path, reading))
    column_names(path, reading)
    user, item, *order = reading.lines
    table = scan_user_lines(path, user, item, _separator(path, reading))
    return with_places(table, order[0], first) if order and first is not None else table


def csv_options(path: TablePath, reading: Reading) -> CsvOptions:
    """Return the options of polars for a text file. Raises DataError as `column_names` does."""
    names = _own_names(path, reading)
    text = [] if reading.numbers is None else [name for name in names if name not in reading.numbers]
    unnamed, separator = bool(reading.columns), _separator(path, reading)
    return {
        "separator": separator, "decimal_comma": reading.decimal_comma and separator != ",", "has_header": not unnamed,
        "new_columns": names if unnamed else None, "infer_schema_length": None, "try_parse_dates": reading.dates,
        "schema_overrides": dict.fromkeys(text, pl.String),
    }  # fmt: skip


def _texts(path: TablePath, reading: Reading) -> frozenset[str] | None:
    """Return the columns of the folders of a text file that are read as text, None for all."""
    if reading.numbers is None:
        return frozenset() if reading.dates else frozenset(c.name for c in path.folder_columns if c.type is pl.Date)
    return frozenset(c.name for c in path.folder_columns) - reading.numbers


def column_names(path: TablePath, reading: Reading) -> list[str]:
    """Return the columns of a text file, and those of its folders that it lacks. Raises as `_own_names` does."""
    own = _own_names(path, reading)
    return [*own, *(c.name for c in path.folder_columns if c.name not in own and not reading.lines)]


def _own_names(path: TablePath, reading: Reading) -> list[str]:
    """Return the columns within a text file. Raises DataError if its header names one twice, if the file has another
    number of columns than `reading` names, or a header line of these names, or if it looks separated by another
    character."""
    separator = _separator(path, reading)
    if reading.lines:
        values = read_first_values(path, separator)
        _check_separator(path, values, separator, reading)
        _check_values(path, values, separator)
        return [*reading.lines]
    read = partial(path.read_csv, separator=separator, infer_schema=False)
    header = read(n_rows=1, has_header=False, truncate_ragged_lines=True).row(0)
    check_line_ends(path, header)
    _check_separator(path, header, separator, reading)
    if reading.columns:
        option = reading.option.format("columns")
        if len(header) != len(reading.columns):
            raise DataError(
                f"{path}: has {len(header)} columns, and {option} names {len(reading.columns)}; name each once"
            )
        if [(name or "").strip().casefold() for name in header] == [name.casefold() for name in reading.columns]:
            raise DataError(
                f"{path}: its first line holds the names of {option}, which are for files without a header line; leave "
                f"{option} out, or remove the line"
            )
        return [*reading.columns]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: the header names column '{twice}' twice; rename or remove one of them")
    return read(n_rows=0).columns


def _check_separator(path: TablePath, header: Sequence[str | None], separator: str, reading: Reading) -> None:
    """Raise DataError if a file's first line is one value that holds another separator."""
    first = (header[0] if header else "") or ""
    known = _others(separator) if reading.lines else [other for other in SEPARATORS if other != separator]
    found = {other: first.count(other) for other in known if first.count(other)}
    if len(header) > 1 or not found:
        return
    _check_comments(path)
    other = max(found, key=lambda s: found[s])
    what = (
        f"set {reading.option.format('separator')} = "
        f"{json.dumps(other)}{'' if '`' in reading.option else ', for one table alone in separators'}"
        if len(other) == 1
        else "replace it in the file by a tab"
    )
    raise DataError(f"{path}: found one column, and its first line holds {other!r} {found[other]} times; {what}")


def _check_comments(path: TablePath) -> None:
    """Raise DataError if a file begins with lines of comments: they begin with '#', and a separator stands more often
    in the line after them than in the first."""
    with path.open() as f:
        lines = [line.decode(errors="replace") for line in islice(f, MAX_COMMENTS)]
    n = next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)
    if n and any(lines[n].count(s) > lines[0].count(s) for s in SEPARATORS):
        others = f"tail -n +{n + 1} OLD > NEW"
        if str(path).endswith(".gz"):
            others = f"gzip -dc OLD | tail -n +{n + 1} | gzip > NEW"
        raise DataError(
            f"{path}: the lines above line {n + 1} begin with '#', as comments do, and are no rows; remove such lines "
            f"above the header (`{others}` writes the others)"
        )


def _check_values(path: TablePath, values: Sequence[str], separator: str) -> None:
    """Raise DataError if another character separates the user of a file's first line from the items, or its items: the
    user alone holds it, or the only item does."""
    for place in (0, 1) if len(values) == 2 else (0,) if values[1:] else ():
        value, rest = values[place], [*values[:place], *values[place + 1 :]]
        for other in () if value.startswith('"') else _others(separator):
            if other in value and not any(other in v for v in rest):
                raise DataError(
                    f"{path}: {separator!r} separates the values, and in the first line '{value[:40]}' holds "
                    f"{other!r}; separate all values by one character, or put this one between double quotes"
                )


def _others(separator: str) -> list[str]:
    """Return the characters that may separate the values of files with one user a line in place of `separator`."""
    own = (separator, "\t") if separator == SPACE else (separator,)
    return [s for s in (*SEPARATORS, SPACE) if s not in own]


def _separator(path: TablePath, reading: Reading) -> str:
    return reading.separator or SEPARATOR_OF[path.ending]


def columns_and_rows(path: TablePath, reading: Reading) -> tuple[pl.Schema, int]:
    """Return the columns of a file, of a text file without their types, and its number of rows. Call it within
    `table_errors`."""
    if path.is_text:
        table = scan_text(path, replace(reading, numbers=frozenset()), first=0)
    else:
        table = path.scan()
    rows = int(table.select(pl.len()).collect(engine="streaming").item())
    return table.collect_schema(), rows or table.collect().height  # a quote in the first row hides all from a count


def parse_canonical_text(series: pl.Series) -> pl.Series:
    """Return a text column as Int64 or UInt64 if every value is a canonical integer (no leading zeros or plus sign), as
    Boolean if every value is true or false, else unchanged."""
    if is_pattern(series.name):  # which methods of a series search for
        return parse_canonical_text(series.alias("")).alias(series.name)
    if series.is_null().all():
        return series
    if series.str.contains(CANONICAL_INTEGER).all():
        read = (series.cast(kind, strict=False) for kind in (pl.Int64, pl.UInt64))
        return next((whole for whole in read if whole.null_count() == series.null_count()), series)
    if series.str.contains(CANONICAL_BOOLEAN).all():
        return series.str.to_lowercase() == "true"
    return series
