"""Reading and checking of the tables of users, items and interactions.

A table comes from a CSV or Parquet file, a polars or pandas frame, or anything with an Arrow stream. An error is one
line: what was found, what is allowed and what to do.
"""

from __future__ import annotations

import glob
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from twotower.data.times import TIME, Times
from twotower.errors import DataError, did_you_mean
from twotower.features.encoders import canonical_ids, missing_count
from twotower.features.schema import MultiHot, Numeric, Schema, Sequence, SideName, Text, Vector

POSITIVE = "__positive"
"""The column of labels that checking adds to the interactions, beside TIME. Names that begin with '__' are reserved."""
_ROW_COLUMN = "__row"  # temporary


@dataclass(frozen=True)
class Tables:
    """The three checked tables, with external ids. `notes` are messages about changes and counts of the checks."""

    users: pl.DataFrame
    items: pl.DataFrame
    interactions: pl.DataFrame
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """Types of the columns of a CSV, which has none of its own.

    `numbers` are columns whose type (dates too) polars infers, `text` are columns of text. Any other column is text, unless
    all its values are spelled as whole numbers or booleans are: "007" and "7", or "1.10" and "1.1", stay two values."""

    numbers: frozenset[str]
    text: frozenset[str] = frozenset()

    @classmethod
    def of(cls, schema: Schema, side: SideName | None = None) -> Reading:
        """Return the types that a schema requires for the table of a side, or for the interactions."""
        ids = {schema.user_id, schema.item_id}
        if side is None:
            averaged = {f.statistic_column for f in schema.features if isinstance(f, Numeric)}
            return cls(frozenset({schema.label, *averaged} - ids - {schema.time}))  # `Times` reads the time
        numbers = {f.source for f in schema.side(side) if isinstance(f, Numeric | Vector)}
        words = {f.source for f in schema.side(side) if isinstance(f, MultiHot | Text)}
        return cls(frozenset(numbers - ids), frozenset(words - numbers - ids))


def as_frame(table: Any, what: str, reading: Reading | None = None) -> pl.DataFrame:
    """Return a polars frame of a polars or pandas frame, any Arrow producer, a mapping of columns, or a path to CSV or
    Parquet."""
    if isinstance(table, pl.DataFrame):
        return table
    if isinstance(table, str | Path):
        return read_file(Path(table), reading)
    try:
        if isinstance(table, pl.LazyFrame):
            return table.collect()
        if type(table).__module__.split(".")[0] == "pandas" and hasattr(table, "columns"):
            # Conversion by column needs no pyarrow, and keeps lists and arrays as lists.
            return pl.DataFrame([_pandas_column(str(c), table.iloc[:, i]) for i, c in enumerate(table.columns)])
        if isinstance(table, dict):
            return pl.DataFrame(table, strict=False)
        if hasattr(table, "__arrow_c_stream__") and not isinstance(table, pl.Series):
            return pl.DataFrame(table)
    except (pl.exceptions.PolarsError, TypeError, ValueError) as e:
        raise DataError(f"{what}: cannot be read as columns of equal length with one name each ({_line(e)})") from None
    raise DataError(
        f"{what}: found {type(table).__name__}, expected a polars or pandas frame, an Arrow table, a mapping of "
        "columns, or a path to a CSV or Parquet file"
    )


def _pandas_column(name: str, column: Any) -> pl.Series:
    """Return a pandas column as a series: NaN, NaT and NA as null; lists, tuples and arrays in cells as lists."""
    kind = column.dtype.kind if isinstance(column.dtype, np.dtype) else "O"
    if kind in "biuf":
        return pl.Series(name, column.to_numpy(), nan_to_null=True)
    if kind == "M":
        return pl.Series(name, column.to_numpy().astype("datetime64[us]"))
    missing = column.isna().to_numpy()
    values = [None if is_missing else _cell(v) for v, is_missing in zip(column, missing, strict=True)]
    return pl.Series(name, values, strict=False)


def _cell(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")


def table_files(source: Path | str, endings: tuple[str, ...] = TABLE_SUFFIXES) -> list[Path]:
    """Return the files of a table (a file, a folder of files or a pattern) in the order of their names.

    Raises DataError if there is none, or one with another ending."""
    source = Path(source)
    if source.is_dir():
        paths = [p for p in source.iterdir() if not p.name.startswith((".", "_"))]  # Spark puts _SUCCESS and .crc there
    elif not source.exists() and glob.has_magic(str(source)):
        paths = [Path(p) for p in glob.glob(str(source), recursive=True)]  # noqa: PTH207 - Path.glob wants no root
        paths = [p for p in paths if not p.is_dir()]
    else:
        paths = [source]
    if not paths:
        raise DataError(f"{source}: no file found; name a table, a folder of tables or a pattern")
    for path in paths:
        if path.is_dir():
            raise DataError(
                f"{source}: found the folder {path.name} in it; name all files, as in '{source}/*/*.parquet'"
            )
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if path.suffix.lower() not in endings:
            shown = ".csv, .tsv or .parquet" if ".csv" in endings else ".parquet"
            raise DataError(f"{path}: found a '{path.suffix.lower()}' file, expected {shown}; convert or rename it")
    return sorted(paths)


def read_file(
    source: Path | str, reading: Reading | None = None, wanted: Collection[str] | None = None
) -> pl.DataFrame:
    """Read a CSV (UTF-8, header line) or Parquet file, by its ending, or all files of a folder or pattern as one table.

    Without a `reading`, polars infers the types of a CSV, but a column stays text if its spelling is not that of whole
    numbers. Of a Parquet file only the `wanted` columns are read, or all columns if one of them is missing.
    """
    paths = table_files(source)
    frame = _read_all(paths, reading, wanted)
    if not is_text(paths[0]):
        return frame
    if reading is None:
        whole = [name for name, dtype in frame.schema.items() if dtype == pl.Int64]
        spelling = _read_all(paths, Reading(frozenset()), None)
        return frame.with_columns(parse_canonical_text(spelling[name]) for name in whole)
    left = [name for name in frame.columns if name not in reading.numbers | reading.text]
    return frame.with_columns(parse_canonical_text(frame[name]) for name in left)


def _read_all(paths: list[Path], reading: Reading | None, wanted: Collection[str] | None) -> pl.DataFrame:
    frames = [_read_one(path, reading, wanted) for path in paths]
    inferred = is_text(paths[0])
    for path, other in zip(paths[1:], frames[1:], strict=True):
        for name in [*frames[0].columns, *other.columns]:
            types = {frames[0].schema.get(name), other.schema.get(name)}
            # 3 in one CSV and 3.5 in the next are numbers of one column.
            if len(types) > 1 and not (inferred and types <= {pl.Int64, pl.Float64}):
                raise DataError(
                    f"{path}: column '{name}' is not as in {paths[0].name}; give all files the same columns"
                )
    return pl.concat([f[frames[0].columns] for f in frames], how="vertical_relaxed" if inferred else "vertical")


def _read_one(path: Path, reading: Reading | None, wanted: Collection[str] | None = None) -> pl.DataFrame:
    """Read a file. With a `reading`, columns of a CSV outside `reading.numbers` are text."""
    ending = path.suffix.lower()
    try:
        if not is_text(path):
            table = pl.scan_parquet(path, glob=False)
            if wanted is not None and set(wanted) <= set(table.collect_schema().names()):
                table = table.select(wanted)
            return table.collect()
        frame = pl.read_csv(path, **csv_options(path, reading))
    except pl.exceptions.NoDataError:
        raise DataError(f"{path}: the file is empty; it needs a header line and at least one row") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as e:
        if is_text(path):
            check_utf8(path)
        raise DataError(f"{path}: cannot be read as {ending[1:]} ({_line(e)}); is the file complete?") from None
    if any("\ufffd" in name for name in frame.columns):
        check_utf8(path)
    return frame


def is_text(path: Path) -> bool:
    """Return True for a CSV or TSV, by the file's ending."""
    return path.suffix.lower() in (".csv", ".tsv")


def csv_options(path: Path, reading: Reading | None) -> dict[str, Any]:
    """Return the options of polars for a CSV or TSV. Raises DataError if the header names a column twice."""
    names = column_names(path)
    text = [] if reading is None else [name for name in names if name not in reading.numbers]
    return {
        "separator": _separator(path), "infer_schema_length": None, "try_parse_dates": True, "glob": False,
        "schema_overrides": dict.fromkeys(text, pl.String),
    }  # fmt: skip


def column_names(path: Path) -> list[str]:
    """Return the columns of a CSV or TSV. Raises DataError if its header names one twice."""
    options: dict[str, Any] = {"separator": _separator(path), "infer_schema": False, "glob": False}
    header = pl.read_csv(path, n_rows=1, has_header=False, truncate_ragged_lines=True, **options).row(0)
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: the header names column '{twice}' twice; rename or remove one of them")
    return pl.read_csv(path, n_rows=0, **options).columns


def _separator(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def parse_canonical_text(series: pl.Series) -> pl.Series:
    """Return a text column as Int64 or UInt64 if every value is a canonical integer (no leading zeros or plus sign), as
    Boolean if every value is true or false, else unchanged."""
    if series.is_null().all():
        return series
    if series.str.contains(r"^(0|-?[1-9]\d*)$").all():
        read = (series.cast(kind, strict=False) for kind in (pl.Int64, pl.UInt64))
        return next((whole for whole in read if whole.null_count() == series.null_count()), series)
    if series.str.contains(r"^(?i:true|false)$").all():
        return series.str.to_lowercase() == "true"
    return series


def check_utf8(path: Path) -> None:
    """Raise DataError with the number of the first line that is not UTF-8."""
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                raise DataError(
                    f"{path}: line {number} is not UTF-8; convert the file, for example with iconv"
                ) from None


def check(users: Any, items: Any, interactions: Any, schema: Schema) -> Tables:
    """Read the three tables and check them against the schema and each other. Raises DataError.

    If `users` or `items` is None, that side consists of the distinct ids of the interactions.
    """
    notes: list[str] = []
    actions = as_frame(interactions, "interactions", Reading.of(schema)).drop(POSITIVE, TIME, _ROW_COLUMN, strict=False)
    need(actions, [schema.user_id, schema.item_id], "interactions", schema)
    need(actions, [c for c in (schema.label, schema.time) if c], "interactions", schema)
    _not_empty(actions, "interactions")
    actions = with_ids(with_ids(actions, schema.user_id, "interactions"), schema.item_id, "interactions")
    actions = timed(actions, schema)

    sides: dict[SideName, pl.DataFrame] = {}
    for side, given in (("user", users), ("item", items)):
        what, key = side + "s", schema.id_column(side)  # type: ignore[arg-type]
        if given is None:
            frame = actions.select(pl.col(key).unique().sort())
        else:
            reading = Reading.of(schema, side)  # type: ignore[arg-type]
            frame = _side(as_frame(given, what, reading), what, key, schema, notes)
        if frame.height < 2:
            raise DataError(f"{what}: found only one id of '{key}' ({frame[key][0]}), expected at least two; add rows")
        _features(frame, side, what, schema, actions, notes)  # type: ignore[arg-type]
        if {frame[key].dtype, actions[key].dtype} == {pl.Int64, pl.UInt64} and not (
            (frame[key] < 0).any() or (actions[key] < 0).any()
        ):
            # Only one of the two tables holds ids from 2**63 on.
            frame, actions = (t.with_columns(pl.col(key).cast(pl.UInt64)) for t in (frame, actions))
        if {frame[key].dtype, actions[key].dtype} == {pl.Int64, pl.String} and _is_csv(given, interactions):
            # A CSV has no types: its ids take the type of the other table's.
            frame, actions = (t.with_columns(pl.col(key).cast(pl.String)) for t in (frame, actions))
        if frame[key].dtype != actions[key].dtype:
            raise DataError(
                f"column '{key}': {what} has {frame[key].dtype} and interactions {actions[key].dtype}; "
                "give both the same type"
            )
        unknown = actions.join(frame.select(key), on=key, how="anti", maintain_order="left")[key].unique(
            maintain_order=True
        )
        if len(unknown):
            raise DataError(
                f"interactions: {len(unknown)} ids of '{key}' are not in {what} (the first: {unknown[0]}); "
                f"add them to {what} or drop their rows"
            )
        sides[side] = frame  # type: ignore[index]
    if schema.title:
        need(sides["item"], [schema.title], "items", schema)

    actions = labelled(actions, schema)
    actions = _deduplicate(actions, schema, notes)
    return Tables(sides["user"], sides["item"], actions, notes)


def _is_csv(*tables: Any) -> bool:
    return any(isinstance(t, str | Path) and is_text(table_files(t)[0]) for t in tables)


def need(frame: pl.DataFrame, columns: list[str], what: str, schema: Schema) -> None:
    """Raise DataError if the table `what` lacks one of the columns."""
    for name in columns:
        if name not in frame.columns:
            raise DataError(
                f"{what}: no column '{name}'{did_you_mean(name, frame.columns)} "
                f"(found: {', '.join(frame.columns[:12])}{', …' if frame.width > 12 else ''}); name it in [schema]"
            )


def _not_empty(frame: pl.DataFrame, what: str) -> None:
    if not frame.height:
        raise DataError(f"{what}: the table has no rows, expected at least one; fill it")


def with_ids(frame: pl.DataFrame, key: str, what: str) -> pl.DataFrame:
    """Return the table with the id column as Int64, UInt64 or String. Raises DataError for missing or unusable ids."""
    series = frame[key]
    if series.dtype.is_nested():
        raise DataError(
            f"{what}: column '{key}' holds {series.dtype}, expected one id a row (text or integer); "
            "name another column in [schema]"
        )
    if n := missing_count(series):
        raise DataError(f"{what}: column '{key}' has {n} missing ids; fill them or drop the rows")
    ids = canonical_ids(series)
    if series.dtype.is_float() and ids.dtype == pl.String:
        first = ids.filter(~ids.str.contains(r"^-?\d+$"))[0]
        raise DataError(
            f"{what}: column '{key}' holds fractions or floats from 2**53 on (the first: {first}), expected ids as "
            "text or integers; cast it"
        )
    return frame.with_columns(ids)


def _side(frame: pl.DataFrame, what: str, key: str, schema: Schema, notes: list[str]) -> pl.DataFrame:
    need(frame, [key], what, schema)
    _not_empty(frame, what)
    frame = with_ids(frame, key, what)
    repeated = frame.height - frame[key].n_unique()
    if repeated:
        if schema.duplicates == "error":
            first = frame.filter(pl.col(key).is_duplicated())[key][0]
            raise DataError(
                f"{what}: {repeated} rows repeat an id of '{key}' (the first: {first}); "
                "drop them or set schema.duplicates = 'last'"
            )
        frame = frame.unique(key, keep="last", maintain_order=True)
        notes.append(f"{what}: {repeated} rows repeated an id; the last of each was kept")
    return frame


def check_side(frame: pl.DataFrame, side: SideName, schema: Schema, notes: list[str]) -> pl.DataFrame:
    """Check the table of a side without the interactions, and return the columns that the schema names. Raises
    DataError."""
    what, key = side + "s", schema.id_column(side)
    frame = _side(frame, what, key, schema, notes)
    if frame.height < 2:
        raise DataError(f"{what}: found only one id of '{key}' ({frame[key][0]}), expected at least two; add rows")
    _features(frame, side, what, schema, None, notes)
    if schema.title and side == "item":
        need(frame, [schema.title], what, schema)
    return frame.select(side_columns(side, schema))


def side_columns(side: SideName, schema: Schema) -> list[str]:
    """Return the columns of a side's table that the schema names, the id first."""
    made = {f.name for f in schema.side(side) if isinstance(f, Sequence) or (isinstance(f, Numeric) and f.statistic)}
    named = [f.source for f in schema.side(side) if f.name not in made]
    title = [schema.title] if schema.title and side == "item" else []
    return list(dict.fromkeys([schema.id_column(side), *named, *title]))


def _features(
    frame: pl.DataFrame, side: SideName, what: str, schema: Schema, actions: pl.DataFrame | None, notes: list[str]
) -> None:
    for f in schema.side(side):
        if isinstance(f, Sequence):
            continue
        if isinstance(f, Numeric) and f.statistic:
            if f.statistic_column and actions is not None:
                need(actions, [f.statistic_column], "interactions", schema)
                if not (
                    actions[f.statistic_column].dtype.is_numeric() or actions[f.statistic_column].dtype == pl.Boolean
                ):
                    raise DataError(
                        f"interactions: column '{f.statistic_column}' holds {actions[f.statistic_column].dtype}, expected numbers for feature "
                        f"'{f.name}' to average; cast it"
                    )
                if n := missing_count(actions[f.statistic_column]):
                    notes.append(
                        f"interactions: {n} of {actions.height} values of '{f.statistic_column}' are missing; left out"
                    )
            continue
        need(frame, [f.source], what, schema)
        if n := missing_count(frame[f.source]):
            if f.missing == "error":
                raise DataError(
                    f"{what}: column '{f.source}' has {n} missing values and feature '{f.name}' has "
                    "missing = 'error'; fill them or set missing = 'impute'"
                )
            notes.append(f"{what}: {n} of {frame.height} values of '{f.source}' are missing or not finite; imputed")


def labelled(actions: pl.DataFrame, schema: Schema, some: bool = True) -> pl.DataFrame:
    """Add the boolean column POSITIVE. Raises DataError for an unusable label, and if `some` and no row is positive."""
    if not schema.label:
        return actions.with_columns(pl.lit(True).alias(POSITIVE))
    series = actions[schema.label]
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean):
        raise DataError(
            f"interactions: label '{schema.label}' holds {series.dtype}, expected numbers or booleans; cast it"
        )
    if n := missing_count(series):
        raise DataError(f"interactions: label '{schema.label}' has {n} missing values; fill them or drop the rows")
    positive = series.cast(pl.Float64) > schema.positive_above
    if some and not positive.any():
        raise DataError(
            f"interactions: no row has '{schema.label}' above {schema.positive_above:g} "
            f"(the largest is {series.cast(pl.Float64).to_numpy().max():g}); set schema.positive_above"
        )
    return actions.with_columns(positive.alias(POSITIVE))


def timed(actions: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Add the column TIME, if the schema has a time. Raises DataError if its column holds no times."""
    if not schema.time:
        return actions
    times = Times(schema)
    times.look(actions[schema.time])
    times.settle()
    return times.add(actions)


def _deduplicate(actions: pl.DataFrame, schema: Schema, notes: list[str]) -> pl.DataFrame:
    pair = [schema.user_id, schema.item_id]
    repeated = actions.height - actions.select(pl.struct(pair).n_unique()).item()
    if not repeated:
        return actions
    if schema.duplicates == "error":
        first = actions.filter(pl.struct(pair).is_duplicated()).select(pair).row(0)
        raise DataError(
            f"interactions: {repeated} rows repeat a pair of user and item (the first: {first[0]}, {first[1]}); "
            "drop them or set schema.duplicates = 'last'"
        )
    notes.append(f"interactions: {repeated} rows repeated a pair of user and item; the last of each was kept")
    actions = actions.with_row_index(_ROW_COLUMN)
    by = [TIME, _ROW_COLUMN] if TIME in actions.columns else [_ROW_COLUMN]
    return actions.sort(by).unique(pair, keep="last", maintain_order=True).sort(_ROW_COLUMN).drop(_ROW_COLUMN)


def describe(frame: pl.DataFrame) -> list[tuple[str, str, int, str, str]]:
    """Return for each column: name, type, missing values, distinct values (or '–' for lists), an example."""
    out = []
    for series in frame:
        distinct = "–" if series.dtype.is_nested() else f"{series.n_unique():,}"
        values = series.drop_nulls()
        example = "" if not len(values) else str(values[0] if not series.dtype.is_nested() else values[0].to_list())
        out.append((series.name, str(series.dtype), missing_count(series), distinct, example[:40]))
    return out


def activity(found: dict[str, pl.DataFrame]) -> list[str]:
    """Return lines about the interactions per user and per item, for id columns that two tables share."""
    lines = []
    for name in ("users", "items"):
        shared = [c for c in found[name].columns if c in found["interactions"].columns] if name in found else []
        for key in shared:
            known, used = found[name][key].unique(), found["interactions"][key].alias("id")
            if known.dtype != used.dtype:
                continue
            n = used.filter(used.is_in(known.implode())).value_counts(name="n")["n"].to_numpy()
            if not len(n):
                lines.append(f"interactions per {key}: none, no id of {name} has any")
                continue
            lines.append(
                f"interactions per {key}: median {np.median(n):.0f}, largest {n.max():,}, "
                f"{found[name][key].n_unique() - len(n):,} of {found[name][key].n_unique():,} without any"
            )
    return lines
