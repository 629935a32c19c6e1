"""Text files of tables: how they are read, what is wrong with one of another form, and the types of their columns."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from twotower.data.reading.table_path import TablePath
from twotower.data.reading.text_format import SEPARATOR_OF, SEPARATORS, SPACE, TextFormat
from twotower.errors import DataError
from twotower.features.schema import Schema, is_pattern
from twotower.features.side import FeatureSide, SideName


@dataclass(frozen=True)
class Reading:
    """Types of the columns of text files, which have none of their own, and the form of the files.

    `numbers` are columns that are numbers however they are spelled, `text` are columns of text. Any other column is
    text, unless all its values are spelled as whole numbers or booleans are: "007" and "7", or "1.10" and "1.1", stay
    two values. `numbers` None: columns with fractions are numbers too."""

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
    decimal_comma: bool = False
    """True: numbers have a decimal comma, in files whose separator is none."""
    encoding: str | None = None
    """Encoding of the files, as Python names it. None: UTF-8, and no option names another one."""

    @classmethod
    def of(cls, schema: Schema, side: SideName | None = None, form: TextFormat | None = None) -> Reading:
        """Return the types that a schema requires for the table of a side, or for the interactions, in files of a
        form."""
        form = form or TextFormat()
        ids = {schema.user_id, schema.item_id, schema.table_id(side or "user")}
        of_type = _columns_by_type(schema, side or "context")
        numbers, lines = of_type["numbers"], tuple[str, ...]()
        if side is None:
            ids |= {schema.time}  # `Times` reads the time
            numbers |= {schema.label, schema.weight, *(s.column for s in schema.statistics() if s.column)}
            lines = _columns_of_lines(schema) if form.layout == "sequences" else ()
        return cls(
            frozenset(numbers - ids), frozenset(of_type["text"] - numbers - ids),
            form.separator_of(f"{side}s" if side else "interactions"), () if side else form.columns, lines,
            decimal_comma=form.decimal == ",", encoding=form.encoding,
        )  # fmt: skip

    def of_table(self, form: TextFormat) -> Reading:
        """Return the types of columns for one table in files of a form, whose options are arguments of a call."""
        return replace(
            self, separator=form.separator, columns=form.columns, option="`{}`", decimal_comma=form.decimal == ",",
            encoding=None,
        )  # fmt: skip

    def of_file(self, path: TablePath) -> Reading:
        """Return the reading with the separator of a file."""
        separator = self.separator or SEPARATOR_OF[path.ending]
        return replace(self, separator=separator, decimal_comma=self.decimal_comma and separator != ",")


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


# ---- rows


def scan_text(path: TablePath, reading: Reading, first: int | None = None) -> pl.LazyFrame:
    """Scan a text file, whose columns are text. Of files with one user a line, the column of the order begins at
    `first`; None leaves it out. Call it within `table_errors`. Raises DataError for a file of another form."""
    _check_form(path, reading)
    separator = reading.of_file(path).separator
    if not reading.lines:
        return path.with_folder_columns(path.scan_csv(separator, reading.columns))
    user, item, *order = reading.lines
    table = _scan_user_lines(path, user, item, separator)
    return with_places(table, order[0], first) if order and first is not None else table


def with_places(table: pl.LazyFrame, column: str, first: int = 0) -> pl.LazyFrame:
    """Add a column with the place of each row, from `first`, as Int64."""
    return table.with_row_index(column).with_columns(pl.col(column).cast(pl.Int64) + first)


def _scan_user_lines(path: TablePath, user: str, item: str, separator: str) -> pl.LazyFrame:
    """Return the interactions of a file with one user a line, in its order, as text in the columns `user` and `item`.

    A line of a user alone has none; a separator at the end of a line, and repeated ones, count as one. With a space as
    separator a tab is one too. Double quotes around a value are not part of it, and a separator between them is."""
    values = pl.col("values").list
    rows = _scan_values(path, separator).select(values.first().alias(user), values.slice(1).alias(item)).explode(item)
    return rows.with_columns(_unquoted(user), _unquoted(item)).filter(pl.col(item) != "")


def _scan_values(path: TablePath, separator: str) -> pl.LazyFrame:
    """Return the values of each line of a file that is not empty, with their quotes, as the lists `values`."""
    lines = path.scan_csv("\x1f", ["line"], quote_char=None)  # whole lines
    ends = re.escape(separator) + ("\t" if separator == SPACE else "")
    line = pl.col("line").str.strip_chars("\r")
    return lines.filter(line != "").select(line.str.extract_all(f'"(?:[^"]|"")*"|[^{ends}]+').alias("values"))


def _unquoted(column: str) -> pl.Expr:
    """Return a column of text without double quotes around its values; two of them within are one."""
    text = pl.col(column)
    inner = text.str.slice(1, text.str.len_chars().cast(pl.Int64) - 2).str.replace_all('""', '"', literal=True)
    return pl.when(text.str.contains('^".*"$')).then(inner).otherwise(text).alias(column)


def text_as_parquet(source: TablePath, columns: Collection[str], reading: Reading, to: Path, first: int = 0) -> None:
    """Write columns of a text file, which are text, as Parquet. `first` is the row of the table at which the file
    begins. Call it within `table_errors`."""
    # All columns are parsed: else a line of too many values, as of a comma without quotes, would give values of other
    # columns.
    whole = pl.QueryOptFlags(projection_pushdown=False)
    scan_text(source, reading, first).select(columns).sink_parquet(to, optimizations=whole)


# ---- columns


def _check_form(path: TablePath, reading: Reading) -> None:
    """Raise DataError if a text file's header names a column twice, if the file has another number of columns than
    `reading` names, or a header line of these names, or if it looks separated by another character."""
    separator = reading.of_file(path).separator
    if reading.lines:
        found = _scan_values(path, separator).head(1).collect().to_series()
        _check_separator(path, found[0].to_list() if len(found) else [], reading)
        return
    header = path.scan_csv(separator, first=True).collect().row(0)
    if any(re.search(r"\r(?!\n)", value or "") for value in header):  # as old spreadsheets write them
        raise DataError(
            f"{path}: its lines end with a carriage return alone; convert it with `tr '\\r' '\\n' < OLD > NEW`, or "
            "save it from a spreadsheet as 'CSV UTF-8'"
        )
    _check_separator(path, header, reading)
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
        return
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: the header names column '{twice}' twice; rename or remove one of them")


def _check_separator(path: TablePath, first: Sequence[str | None], reading: Reading) -> None:
    """Raise DataError if one value of a file's first line alone holds another separator: the only one, or of one user a
    line the user or the only item."""
    separator, lines = reading.of_file(path).separator, bool(reading.lines)
    own = (separator, "\t") if separator == SPACE and lines else (separator,)
    for other in (s for s in (*SEPARATORS, *([SPACE] if lines else [])) if s not in own):
        held = [value for value in first if value and other in value and not value.startswith('"')]
        if len(held) == 1 and (len(first) == 1 or (lines and (len(first) == 2 or held[0] == first[0]))):
            what = "replace it in the file by a tab"
            if len(first) > 1:
                what = "separate all values by one character"
            elif len(other) == 1:
                alone = "" if "`" in reading.option else ", for one table alone in separators"
                what = f"set {reading.option.format('separator')} = {json.dumps(other)}{alone}"
            raise DataError(
                f"{path}: {separator!r} separates the values, and in the first line '{held[0][:40]}' holds {other!r}; "
                f"{what}, or put the value between double quotes"
            )


# ---- types


def text_types(table: pl.LazyFrame, reading: Reading, of: Collection[str] | None = None) -> dict[str, pl.DataType]:
    """Return the types of the columns of text that are none, of all or of some columns, by a reading `of_file`."""
    names = [
        name for name, dtype in table.collect_schema().items()
        if dtype == pl.String and name not in reading.text and not is_pattern(name) and (of is None or name in of)
    ]  # fmt: skip
    if not names:
        return {}
    tests = table.select(_tests(name, reading) for name in names).collect(engine="streaming")
    found = {name: _type(test, name, reading) for name, test in tests.row(0, named=True).items()}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def _tests(name: str, reading: Reading) -> pl.Expr:
    """Return what holds for all values of a column of text, and their number."""
    text = pl.col(name)
    spelled = {str(t): text.eq_missing(text.cast(t, strict=False).cast(pl.String)).all() for t in (pl.Int64, pl.UInt64)}
    tests = {
        **spelled,
        str(pl.Boolean): text.str.to_lowercase().is_in(["true", "false"]).all(),
        "digits": text.str.contains(r"^[-+]?\d+$").all(),
        "number": _number(name, reading).cast(pl.Float64, strict=False).count() == text.count(),
        "n": text.count(),
    }
    return pl.struct([test.alias(key) for key, test in tests.items()]).alias(name)


def _type(test: Mapping[str, int], name: str, reading: Reading) -> pl.DataType | None:
    """Return the type of a column of which `_tests` hold, None for text."""
    if not test["n"]:
        return None
    for dtype in (pl.Int64(), pl.UInt64(), pl.Boolean()):
        if test[str(dtype)]:
            return dtype
    is_number = not test["digits"] if reading.numbers is None else name in reading.numbers
    return pl.Float64() if is_number and test["number"] else None


def _number(name: str, reading: Reading) -> pl.Expr:
    """Return the values of a column with a decimal point, null for those that have another mark."""
    text = pl.col(name)
    if not reading.decimal_comma:
        return text
    return pl.when(~text.str.contains(".", literal=True)).then(text.str.replace_all(",", ".", literal=True))


def as_types(types: Mapping[str, pl.DataType], reading: Reading) -> list[pl.Expr]:
    """Return columns of text as the types that `text_types` found."""
    return [
        (pl.col(name).str.to_lowercase() == "true").alias(name) if dtype == pl.Boolean
        else (_number(name, reading) if dtype == pl.Float64 else pl.col(name)).cast(dtype).alias(name)
        for name, dtype in types.items()
    ]  # fmt: skip


# ---- encoding


_NOT_TEXT = {
    b"\x1f\x8b": "is gzipped, and its name does not say so; add .gz to the name",
    b"PK\x03\x04": "is no text but a workbook of a spreadsheet, or a zip; open it there and save it as 'CSV UTF-8', or "
    "unpack it",
    b"\xd0\xcf\x11\xe0": "is no text but a workbook of a spreadsheet; open it there and save it as 'CSV UTF-8'",
    b"PAR1": "is no text but Parquet; name it .parquet",
}
"""First bytes of files of other kinds, and what to do with them."""
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def check_utf8(path: TablePath) -> None:
    """Raise DataError with the number of the first line that is not UTF-8, and the ways to read the file. Damage of a
    gzipped file ends the search."""
    with suppress(EOFError, OSError, zlib.error), path.open() as f:
        for number, line in enumerate(f, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                raise _not_utf8(path, number) from None


def _not_utf8(path: TablePath, line: int) -> DataError:
    with path.open() as f:
        start = f.read(4)
    if other := next((what for mark, what in _NOT_TEXT.items() if start.startswith(mark)), ""):
        return DataError(f"{path}: {other}")
    likely = "utf-16" if start.startswith(_UTF_16) else "windows-1252"
    option = {
        "utf-16": "set data.format.encoding = 'utf-16', or ",
        "windows-1252": "set data.format.encoding = 'windows-1252' if Windows of Western Europe or America wrote it, "
        "'gb18030' if it is Chinese, 'windows-1251' if its letters are Cyrillic, or ",
    }[likely]
    convert = f"convert the file, for example with `iconv -f {likely.upper()} -t UTF-8 OLD > NEW`"
    return DataError(
        f"{path}: line {line} is not UTF-8; {option if path.encoding else ''}{convert}; or save it from a spreadsheet "
        "as 'CSV UTF-8'"
    )
