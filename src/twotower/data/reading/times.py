"""Times of interactions as exact whole microseconds since 1970, from dates, numbers or text.

The whole column is checked before it is converted: its texts need one format, and its times must be plausible.
"""

from __future__ import annotations

import re
import time as clock
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.errors import DataError
from twotower.features.schema import Schema
from twotower.features.values import TEXT_TYPES, missing_count

TIME = "__time"
"""The column that `Times.add` adds to the interactions."""
MICROSECONDS = 1_000_000
"""Microseconds in a second."""

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_EARLIEST_SECOND = 631_152_000
"""The start of 1990, in seconds since 1970."""
_DAY = 86_400

_DIGITS = {
    "months as YYYYMM": "%Y%m",
    "dates as YYYYMMDD": "%Y%m%d",
    "dates as YYYYMMDDhhmm": "%Y%m%d%H%M",
    "dates as YYYYMMDDhhmmss": "%Y%m%d%H%M%S",
}

_MONTH, _DAY_OF_MONTH = (re.compile(f"%[-_0]?[{letters}]") for letters in ("mbBh", "de"))
"""Parts of a format. A month without a day is its first."""
SAMPLED_TEXTS = 200
"""Distinct texts of a piece, the first, whose formats are tried where bad times are left out."""
SHOWN = 60
"""Characters of a value that are shown."""
_NUMBER = ""
"""Format of texts that are numbers."""
_DATE = re.compile(
    r"(?P<a>\d{4}|\d{1,2})(?P<sep>[-/.])\d{1,2}(?P=sep)(?P<c>\d{4}|\d{1,2})"
    r"(?:(?P<gap>[T ])\d{1,2}:\d\d(?P<s>:\d\d(?:\.\d+)?)?)?(?P<space> ?)(?P<zone>Z|[+-]\d\d:?\d\d)?"
)


def plausible_range() -> tuple[int, int]:
    """Return the earliest and the latest plausible time, in microseconds since 1970: the start of 1990, and
    tomorrow."""
    return _EARLIEST_SECOND * MICROSECONDS, int((clock.time() + _DAY) * MICROSECONDS)


class Times:
    """Reader of one time column: call `look` on every piece, then `settle` once, then `add` on every piece."""

    def __init__(
        self, schema: Schema, table: str = "interactions", column: str = "", drops: bool | None = None
    ) -> None:
        """Read a column of a table, by default `schema.time` of the interactions, whose bad times are left out if
        `drops`; None: as schema.bad_times says."""
        self.schema, self.column, self.rows = schema, column or schema.time, 0
        self.what = f"{table}: time '{self.column}'"
        self.drops = not column and (schema.bad_times == "drop" if drops is None else drops)
        """True if rows of bad times are left out (`kept`), and are no error."""
        self._until = clock.time() + _DAY
        self._kinds: set[bool] = set()  # True for dates, False for numbers
        self._zoned = False  # dates have a zone
        self._formats: list[str] = []  # formats that read most texts so far
        self._seen, self._counts = 0, dict[str, int]()  # texts so far, and those that a format reads
        self._ambiguous = False  # two formats fit and give different times
        self.bad, self.missing = 0, 0
        """Number of times that are bad, and of those that are missing."""
        self._first: tuple[int, str] = (0, "")
        self._like: dict[str, int] = {}

    def look(self, column: pl.Series) -> None:
        """Check the next piece. Raises DataError for values that cannot be read."""
        if not len(column):
            return
        self.missing += (n := missing_count(column))
        if n and not self.drops:
            raise DataError(f"{self.what} has {n:,} missing values in {len(column):,} rows; fill them{self._or_drop}")
        if n == len(column):
            self._judge(pl.Series([None], dtype=pl.Float64).new_from_index(0, n), column)
            self.rows += n
            return
        if not (column.dtype in (pl.Datetime, pl.Date, *TEXT_TYPES) or column.dtype.is_numeric()):
            raise DataError(f"{self.what} holds {column.dtype}, expected a datetime, a number or text; parse it")
        if column.dtype == pl.Float32 and self.schema.time_unit != "order":
            raise DataError(
                f"{self.what} holds Float32, which keeps 7 digits: seconds since 1970 need 10; give Float64 or integers"
            )
        read = self._texts(column) if self._is_text(column) else column
        if read.count():  # of a file whose texts are all bad, others say the kind
            self._kinds.add(read.dtype.is_temporal())
            self._zoned = self._zoned or getattr(read.dtype, "time_zone", None) is not None
        if len(self._kinds) > 1:
            raise DataError(f"{self.what} is a date in some rows and a number in others; make it one")
        if self.schema.time_unit != "order" or self.drops:
            self._judge(read, column)
        self.rows += len(column)

    @property
    def kind(self) -> str:
        """Form of the times: "number", "date", or "zoned date" for dates with a time zone."""
        return "number" if True not in self._kinds else "zoned date" if self._zoned else "date"

    @property
    def is_ambiguous(self) -> bool:
        """True if the texts so far fit two formats, of days and months in either order, and differ by them."""
        return self._ambiguous and len(self._formats) > 1

    def settle(self) -> None:
        """Raise DataError if the texts fit two formats, or a time is bad; if bad times are left out, if all are."""
        if self.is_ambiguous:
            one, other = self._formats
            raise DataError(
                f"{self.what} holds days and months in either order, all rows fit both; "
                f"set schema.time_format = '{one}' or '{other}'"
            )
        if self.bad and not (self.drops and self.bad < self.rows):
            raise DataError(f"{self.what}: {self.faults()}: {self._advice()}")

    @property
    def _or_drop(self) -> str:
        is_of_log = self.column == self.schema.time
        return ", or set schema.bad_times = 'drop' to leave those rows out" if is_of_log else ""

    @property
    def notes(self) -> list[str]:
        """A message about the bad times that are left out, none without such."""
        return [f"{self.what}: {self.faults()}; these rows are left out"] if self.drops and self.bad else []

    def kept(self, actions: pl.DataFrame) -> pl.DataFrame:
        """Return the rows without those of bad times, if these are left out."""
        return actions.filter(self._good(*self._values(self._parsed(actions[self.column])))) if self.drops else actions

    def add(self, actions: pl.DataFrame) -> pl.DataFrame:
        """Return the rows with parsed text and the column TIME (Int64; with unit 'order' the numbers themselves)."""
        column = self._parsed(actions[self.column])
        return actions.with_columns(column, _as_microseconds(column, self.schema.time_unit).alias(TIME))

    def _parsed(self, column: pl.Series) -> pl.Series:
        return _read(_as_text(column), self._formats[0]) if self._is_text(column) and self._formats else column

    # ---- text

    def _is_text(self, column: pl.Series) -> bool:
        """Return True for a column that is read by a format: text, or whole numbers such as 20231105 if the schema has
        a time_format."""
        if not self.schema.time_format or not column.dtype.is_numeric():
            return column.dtype in TEXT_TYPES
        return bool((column.cast(pl.Int64, strict=False) == column).fill_null(self.drops).all())

    def _texts(self, column: pl.Series) -> pl.Series:
        """Read a piece of text in the format that reads most texts so far; null where it reads none. Raises DataError
        if there is such a text and bad times are an error, or if the format is refused."""
        text, seen = _as_text(column), self._seen
        if self.drops or not self._counts:
            some = text.drop_nulls().unique(maintain_order=True).head(SAMPLED_TEXTS if self.drops else 1)
            forms = [self.schema.time_format] if self.schema.time_format else [f for t in some for f in _formats(t)]
            self._counts = dict.fromkeys(forms, 0) | self._counts
        found = {form: self._read(text, form) for form in self._counts}
        whole = [form for form, n in self._counts.items() if n == seen]
        self._seen += len(text)
        self._counts = {form: n + found[form].count() for form, n in self._counts.items()}
        most = max(self._counts.values())
        if not self.drops and most < self._seen:
            at = max(int(found[form].is_null().arg_max() or 0) for form in whole)  # the first row of no such format
            raise self._odd_text(text[at], self.rows + at)
        self._formats = [form for form, n in self._counts.items() if n == most]
        first, *others = (found[form] for form in self._formats)
        self._ambiguous = self._ambiguous or any(not read.equals(first) for read in others)
        return first

    def _odd_text(self, value: str, row: int) -> DataError:
        """Return the error of a text that is not of the format of the rows before."""
        given = self.schema.time_format
        if given or row:
            what = f"schema.time_format = '{given}'" if given else "the format of the rows before"
            return DataError(
                f"{self.what}: row {row + 1:,} holds '{value}', which is not of {what}; give all rows one format "
                f"and name it in schema.time_format{self._or_drop}"
            )
        return DataError(
            f"{self.what}: row 1 holds '{value}', expected a number or a date such as 2023-01-31 12:30:15.250 or "
            "31/01/2023 12:30; name another format in schema.time_format"
        )

    def _read(self, text: pl.Series, form: str) -> pl.Series:
        """Read text in a format. Raises DataError for a format that is not read."""
        try:
            return _read(text, form)
        except pl.exceptions.PolarsError:
            raise DataError(
                f"{self.what}: schema.time_format = '{form}' is not read; give hours with minutes, as in '%H:%M', and "
                "hours of 1 to 12 with AM or PM, as in '%I:%M %p'"
            ) from None

    # ---- plausibility

    def _values(self, read: pl.Series) -> tuple[npt.NDArray[np.float64], bool]:
        """Return the values (n,) of dates in seconds, or of numbers, NaN for missing ones, and True for dates."""
        dated = read.dtype.is_temporal()
        return (_seconds(read) if dated else read.cast(pl.Float64).to_numpy()), dated

    def _good(self, values: npt.NDArray[np.float64], dated: bool) -> npt.NDArray[np.bool_]:
        """Return True (n,) for times between 1990 and tomorrow; with unit 'order' for finite numbers, and all dates."""
        if self.schema.time_unit == "order":
            return np.isfinite(values)
        per = 1 if dated else _PER_SECOND[self.schema.time_unit]
        return (values >= _EARLIEST_SECOND * per) & (values <= self._until * per)

    def _judge(self, read: pl.Series, given: pl.Series) -> None:
        """Count the times, read from given values, that are not between 1990 and tomorrow, by their likely unit."""
        values, dated = self._values(read)
        good = self._good(values, dated)
        unit = "s" if dated else self.schema.time_unit
        self._count("dates since 1990" if dated else _UNIT_NAMES.get(unit, "numbers"), int(good.sum()))
        if good.all():
            return
        at = int(np.argmin(good))
        if not self.bad:
            value = read[at : at + 1].cast(pl.String)[0] if dated else str(read[at])  # Python has no year 0, nor 10000
            value = ("missing" if given[at] is None else str(given[at])[:SHOWN]) if read.is_null()[at] else value
            self._first = (self.rows + at, re.sub(r"\.0+(?=\D|$)", "", value))
        left = values[~good]
        self.bad += len(left)
        self._count("no time", int((~np.isfinite(left)).sum()))
        left = left[np.isfinite(left)]
        for name, low, high in self._likely(unit, dated) if len(left) else ():
            fits = (left >= low) & (left <= high)
            self._count(name, int(fits.sum()))
            left = left[~fits]
        self._count("no unit of time", len(left))

    def _count(self, name: str, n: int) -> None:
        if n:
            self._like[name] = self._like.get(name, 0) + n

    def _likely(self, unit: str, dated: bool) -> list[tuple[str, float, float]]:
        """Return guesses for a value that is no time in `unit`: name, lowest and highest value of each."""
        per, latest = _PER_SECOND[unit], datetime.fromtimestamp(self._until, UTC).year * 10_000 + 1232
        units = [(_UNIT_NAMES[u], _EARLIEST_SECOND * n, self._until * n) for u, n in _PER_SECOND.items()]
        dates = [(f, 1990_01_00 * 10**n, latest * 10**n) for f, n in zip(_DIGITS, (-2, 0, 4, 6), strict=True)]
        return [
            *([] if dated else units + dates),
            ("zeros", 0, 0),
            ("times before 1990", -np.inf if dated else 1e8 * per, _EARLIEST_SECOND * per),  # from 1973 on
            ("times in the future", self._until * per, np.inf if dated else 5e9 * per),  # up to 2128
        ]

    def faults(self) -> str:
        """Return how many times are bad, the first of them, and what the times look like."""
        unit = "" if True in self._kinds else f" in unit '{self.schema.time_unit}'"
        shares = sorted(self._like.items(), key=lambda found: -found[1])
        likes = ", ".join(
            f"{_percent(n, self.rows)} {'look ' if i == 0 else ''}like {name}" for i, (name, n) in enumerate(shares)
        )
        row, value = self._first
        missing = "missing or " if self.missing else ""
        if self.bad == self.missing:
            return f"{self.bad:,} of {self.rows:,} times are missing (the first in row {row + 1:,})"
        return (
            f"{self.bad:,} of {self.rows:,} times are {missing}not between 1990 and tomorrow{unit} (the first, in "
            f"row {row + 1:,}: {value}); {likes}"
        )

    def _advice(self) -> str:
        names = [*self._like]
        if self.column == self.schema.valid_from:
            form = f"'{self.schema.time_format}'" if self.schema.time_format else f"unit '{self.schema.time_unit}'"
            return (
                f"give '{self.column}' as schema.time ({form}) or as dates, and leave it empty in rows that always held"
            )
        if len(names) == 1:
            if unit := next((u for u in ("s", "ms", "us") if _UNIT_NAMES[u] == names[0]), ""):
                return f"set schema.time_unit = '{unit}'"
            if names[0] == _UNIT_NAMES["ns"]:
                return "divide them by 1,000 and set schema.time_unit = 'us'"
            if names[0] in _DIGITS:
                return f"set schema.time_format = '{_DIGITS[names[0]]}'"
        if self.drops:
            return "no row would be left; give times, or leave schema.time out"
        return (
            "correct them, or set schema.bad_times = 'drop' to leave those rows out; if all are right, set "
            "schema.time_unit = 'order'"
        )


def _percent(n: int, of: int) -> str:
    return "all" if n == of else f"{100 * n / of:.3g} %"


def _as_text(column: pl.Series) -> pl.Series:
    return (
        (column if column.dtype in TEXT_TYPES else column.cast(pl.Int64, strict=False))
        .cast(pl.String)
        .str.strip_chars()
    )


def _formats(text: str) -> list[str]:
    """Return the formats that a text may have: those of a date with a year of four digits, one or two; else a
    number's."""
    found = _DATE.fullmatch(text)
    if found is None or (len(found["a"]) == 4) == (len(found["c"]) == 4):
        return [_NUMBER]
    rest = ""
    if found["gap"]:
        rest = found["gap"] + ("%H:%M:%S%.f" if found["s"] else "%H:%M")
    if found["zone"]:
        rest += found["space"] + "%#z"
    orders = ("Ymd",) if len(found["a"]) == 4 else ("dmY", "mdY")
    return [found["sep"].join("%" + part for part in order) + rest for order in orders]


def _read(text: pl.Series, form: str) -> pl.Series:
    """Return datetimes or numbers; null where the text does not have this format. Raises PolarsError for a format that
    is not read."""
    if form != _NUMBER:
        return text.to_frame("text").select(_datetimes(form)).to_series().alias(text.name)
    for kind in (pl.Int64, pl.Int128):  # many numbers such as 20231105123015250999 are one float
        whole = text.cast(kind, strict=False)
        if not whole.null_count():
            return whole
    read = text.cast(pl.Float64, strict=False)
    return read.set(~read.is_finite(), None)


def _datetimes(form: str) -> pl.Expr:
    """Return the datetimes of a column `text`, null where it does not have this format."""
    text = pl.col("text")
    if _MONTH.search(form) and not _DAY_OF_MONTH.search(form):
        text, form = text + " 1", form + " %d"
    return text.str.to_datetime(form.replace(".%f", "%.f"), time_unit="us", strict=False)


def formats_of(text: str, formats: Sequence[str]) -> list[str]:
    """Return those of some formats that a text has."""
    read = pl.DataFrame({"text": [text.strip()]}).select(_datetimes(form).is_not_null().alias(form) for form in formats)
    return [form for form, is_read in zip(formats, read.row(0), strict=True) if is_read]


def _seconds(dates: pl.Series) -> npt.NDArray[np.float64]:
    """Return seconds since 1970 in float64."""
    per = 1 / _DAY if dates.dtype == pl.Date else _PER_SECOND[dates.dtype.time_unit]  # type: ignore[attr-defined]
    return dates.to_physical().cast(pl.Float64).to_numpy() / per


def _as_microseconds(column: pl.Series, unit: str) -> pl.Series:
    """Return dates or numbers as Int64 microseconds. Nanoseconds are rounded down, fractions of a microsecond to the
    nearest."""
    if column.dtype == pl.Date:
        return column.to_physical().cast(pl.Int64) * (_DAY * MICROSECONDS)
    if column.dtype == pl.Datetime:
        whole, per = column.to_physical(), _PER_SECOND[column.dtype.time_unit]  # type: ignore[attr-defined]
        return whole // (per // MICROSECONDS) if per > MICROSECONDS else whole * (MICROSECONDS // per)
    if unit == "order":
        whole = column.cast(pl.Int64, strict=False)
        if (whole == column).fill_null(False).all():
            return whole
        return column.rank("dense").cast(pl.Int64)  # fractions, or more than 64 bits
    n = MICROSECONDS // _PER_SECOND[unit]
    if column.dtype.is_integer():
        return column.cast(pl.Int64) * n
    return (column.cast(pl.Float64) * n).round().cast(pl.Int64)
