"""Form of a text file, guessed from its first lines: separator, header line, one row or one user a line."""

from __future__ import annotations

import csv
import re
import zlib
from itertools import islice

import polars as pl

from twotower.data.table_path import TablePath
from twotower.data.text_encoding import check_line_ends, not_utf8
from twotower.data.text_format import SEPARATOR_OF, SPACE, TextFormat
from twotower.data.times import plausible_range
from twotower.errors import DataError
from twotower.features.values import are_numbers
from twotower.suggestion.names import is_known

SAMPLED_LINES = 200
MIN_SAME_WIDTH = 0.9
"""Share of lines that must have as many values as the first for a line to be a row."""
SEQUENCE_WIDTH = 6
"""Values of a line from which a file of numbers alone, without a header line, has one user a line."""
MAX_SCALE = 20
"""Number of steps up to which numbers in half or whole steps are ratings, and the highest of them."""

_DECIMAL_COMMA = r"^\s*[-+]?\d+(,\d+)?\s*$"
_SPREADSHEET = re.compile(r'"?sep=(.|\\t)"?', re.IGNORECASE)
_SEPARATORS = (",", "\t", ";", "|", SPACE)


def guess_form(path: TablePath) -> TextFormat:
    """Return the form of a text file whose columns have no names yet if it has no header line: `columns` are then column_1,
    column_2, …. Raises DataError if it cannot be read."""
    lines = _first_lines(path)
    default = SEPARATOR_OF[path.ending]
    if not lines:
        raise DataError(f"{path}: the file is empty; it needs at least one row")
    try:
        widths = {s: [len(row) for row in _rows(lines, s)] for s in _SEPARATORS}
    except csv.Error as e:
        raise DataError(
            f"{path}: cannot be read as lines of values ({e}); does a value begin with a quote and not end with one?"
        ) from None
    regular = {s: found[0] for s, found in widths.items() if found[0] > 1 and _share(found) >= MIN_SAME_WIDTH}
    decimal = {s: n for s, n in regular.items() if s not in (",", SPACE) and _has_commas_in_numbers(_rows(lines, s))}
    of_default = default in regular and not (default == "," and decimal)  # a comma a line may be of decimals: 7;8;1,5
    separator = default if of_default else max(decimal or regular, key=lambda s: regular[s], default=default)
    rows = _rows(lines, separator)
    given = "" if separator == default else separator
    if separator not in regular:
        rows = [line.split() for line in lines] if separator == SPACE else rows  # a tab is a space here
        # One user a line: the numbers of values differ, and the first of them are of as many users.
        if min(map(len, rows)) < 1 or max(map(len, rows)) < 2 or len({row[0] for row in rows}) < len(rows):
            return TextFormat(separator=given)
        return TextFormat(separator=given, layout="sequences")
    if _has_header(rows):
        return TextFormat(separator=given)
    whole = all(re.fullmatch(r"\d+", value) for row in rows for value in row)
    if whole and len(rows[0]) >= SEQUENCE_WIDTH and len({row[0] for row in rows}) == len(rows):
        return TextFormat(separator=given, layout="sequences")
    return TextFormat(separator=given, columns=tuple(f"column_{i}" for i in range(1, len(rows[0]) + 1)))


def _first_lines(path: TablePath) -> list[str]:
    try:
        with path.open() as f:
            found = [line.decode("utf-8-sig") for line in islice(f, SAMPLED_LINES)]
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read ({e}); is the file complete?") from None
    check_line_ends(path, [text.rstrip("\r\n") for text in found[:1]])
    lines = [line for text in found if (line := text.rstrip("\r\n")).strip()]
    if lines and _SPREADSHEET.fullmatch(lines[0]):
        raise DataError(
            f"{path}: the first line is {lines[0]!r}, which spreadsheets alone read, and is no row; remove it (tail -n +2)"
        )
    return lines


def _rows(lines: list[str], separator: str) -> list[list[str]]:
    return [*csv.reader(lines, delimiter=separator)]


def _share(widths: list[int]) -> float:
    return sum(n == widths[0] for n in widths) / len(widths)


def _has_commas_in_numbers(rows: list[list[str]]) -> bool:
    """Return True if commas stand in values, and these are numbers with a decimal comma."""
    values = [value for row in rows for value in row if "," in value]
    return bool(values) and all(re.fullmatch(_DECIMAL_COMMA, value) for value in values)


def _has_header(rows: list[list[str]]) -> bool:
    """Return True if the first line names columns: no number is in it, and it has a known name, a column of numbers below it,
    or no value that its column has again."""
    first, rest = rows[0], [row for row in rows[1:] if len(row) == len(rows[0])]
    if any(_is_number(value) for value in first):
        return False
    if not rest or any(map(is_known, first)):
        return True
    if len({*first}) < len(first):
        return False
    columns = [*zip(*rest, strict=True)]
    return any(all(map(_is_number, column)) for column in columns) or not any(
        value in column for value, column in zip(first, columns, strict=True)
    )


def _is_number(value: str) -> bool:
    return re.fullmatch(r"\s*[-+]?\d+(\.\d*)?([eE][-+]?\d+)?\s*", value) is not None


def has_decimal_commas(series: pl.Series) -> bool:
    """Return True for a column of text of numbers, some with a decimal comma."""
    values = series.drop_nulls()
    return bool(len(values)) and values.str.contains(_DECIMAL_COMMA).all() and values.str.contains(",").any()


def looks_like_years(series: pl.Series) -> bool:
    """Return True for whole numbers from 1800 to 2100."""
    return series.dtype.is_integer() and bool(series.drop_nulls().is_between(1800, 2100).all())


def looks_like_seconds(series: pl.Series) -> bool:
    """Return True for numbers between 1990 and tomorrow in seconds, milliseconds or microseconds since 1970."""
    values = series.drop_nulls()
    if not len(values) or not values.dtype.is_numeric():
        return False
    low, high = (float(v) for v in (values.min(), values.max()))  # type: ignore[arg-type]
    first, last = plausible_range()
    return any(first / per <= low and high <= last / per for per in (1_000_000, 1_000, 1))


def looks_like_scale(series: pl.Series) -> bool:
    """Return True for numbers in half or whole steps, 3 to MAX_SCALE of them, as ratings are."""
    values = series.drop_nulls().unique()
    if not values.dtype.is_numeric() or not 3 <= len(values) <= MAX_SCALE:
        return False
    steps = values.cast(pl.Float64)
    return bool(((steps.abs() <= MAX_SCALE) & (steps * 2 == (steps * 2).round())).all())


def words_among_numbers(series: pl.Series) -> pl.Series | None:
    """Return the values that are no numbers in a column of text most of whose values are; None for another column."""
    present = series.drop_nulls()
    odd = present.filter(present.str.strip_chars().cast(pl.Float64, strict=False).is_null())
    return odd if 0 < len(odd) < len(present) / 2 else None


def fault_of_numbers(series: pl.Series) -> str:
    """Return why numbers of a column of text are not read, and what to do, "" for other text."""
    present = series.drop_nulls()
    bare = present.str.strip_chars()
    if has_decimal_commas(series):
        return "numbers with decimal commas are text; write them with points"
    if (bare != present).any() and not bare.cast(pl.Float64, strict=False).null_count():
        return "numbers with spaces around them are text; remove the spaces"
    return "its numbers are text; make them numbers" if are_numbers(series) else ""
