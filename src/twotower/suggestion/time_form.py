"""Form of a column of times, guessed from its values: the unit of numbers, the format of text."""

from __future__ import annotations

import re
from dataclasses import dataclass

import polars as pl

from twotower.data.times import TIME, Times, formats_of, plausible_range
from twotower.errors import DataError
from twotower.features.schema import Schema

SAMPLED_ROWS = 200
"""Rows of a column, the first, that must be times for the whole column to be tried."""
FORMATS = (
    "%d/%b/%Y:%H:%M:%S %z", "%d/%b/%Y:%H:%M:%S", "%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z",
    "%d %b %Y %H:%M:%S", "%d %b %Y %H:%M", "%d %b %Y", "%d %B %Y", "%b %d, %Y %H:%M:%S", "%b %d, %Y", "%B %d, %Y",
    "%d-%b-%Y %H:%M:%S", "%d-%b-%Y %H:%M", "%d-%b-%Y", "%d-%b-%y %H:%M:%S", "%d-%b-%y %H:%M", "%d-%b-%y",
    "%d-%b-%y %I.%M.%S.%f %p", "%d/%b/%Y", "%b %d %Y %H:%M:%S", "%b %d %Y",
    "%Y-%m-%d %I:%M:%S %p", "%Y-%m-%d %I:%M %p", "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %I:%M %p", "%Y%m%dT%H%M%SZ",
    "%Y%m%dT%H%M%S", "%Y年%m月%d日 %H:%M:%S", "%Y年%m月%d日 %H:%M", "%Y年%m月%d日",
    "%Y-%m", "%Y/%m", "%m/%Y", "%m.%Y", "%b %Y", "%B %Y", "%Y年%m月", "%Y%m%d", "%Y%m%d%H%M%S",
)  # fmt: skip
"""Formats of text that a time has only if `schema.time_format` names them."""
MAX_ODD = 0.05
"""Share of the values of a column, at most, that have a shape that those of a time have not."""
_DIGIT_FORMATS = {6: "%Y%m", 8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
"""Formats of whole numbers, by the number of their digits."""
_SHORT_DATE = re.compile(r"\d{1,2}(?P<sep>[-/.])\d{1,2}(?P=sep)\d{1,2}(?:(?P<gap>[T ])\d{1,2}:\d\d(?P<s>:\d\d)?)?")
"""A date whose year has two digits, in any order of day, month and year."""
_NAMED_ZONE = re.compile(r"(\d{4})([-/.])\d\d\2\d\d([T ])\d\d:\d\d(:\d\d(\.\d+)?)?( ?)(UTC|GMT)")


@dataclass(frozen=True)
class TimeForm:
    """Options of the schema for a column of times."""

    unit: str = "s"
    """Value of `time_unit`."""
    format: str = ""
    """Value of `time_format`. Empty: numbers, or dates that are read without one."""


def time_form(series: pl.Series, given: str = "", strict: bool = True, drops: bool = False) -> TimeForm | None:
    """Return the form of a column of times, None for a column of others, and for years of two digits in several orders
    (`refuse_orders`). `given` is a format that is not guessed. `drops`: the form of most values, whatever the others
    are. Raises DataError for days and months in either order, if `strict`."""
    series = _likely(series) if drops else series
    plain = _unit(series, given, strict, drops)
    if given or (plain and plain != "order"):
        return TimeForm(plain, given) if plain else None
    if short := _orders(series):
        return TimeForm(format=short[0]) if len(short) == 1 else None
    for form in _formats(series):
        if _has_format(series, form, drops):
            return TimeForm(format=form)
    return TimeForm(plain) if plain else None


def _has_format(series: pl.Series, form: str, drops: bool = False) -> bool:
    return all(_unit(some, form, False, drops) == "s" for some in (series.head(SAMPLED_ROWS), series))


def _likely(series: pl.Series) -> pl.Series:
    """Return the values that may be times by their looks: text of the usual shape, or numbers in the most frequent unit
    of s, ms and us, if half of the values above 0 are times in one; else all that are not missing."""
    series = series.drop_nulls().drop_nans() if series.dtype.is_float() else series.drop_nulls()
    if series.dtype == pl.String:
        return series.filter(~odd_values(series))
    if not series.dtype.is_numeric():
        return series
    first, last = plausible_range()
    fits = [series.is_between(first / per, last / per) for per in (1_000_000, 1_000, 1)]
    are_times = 2 * sum(int(of.sum()) for of in fits) >= int((series > 0).sum())
    return series.filter(max(fits, key=lambda of: int(of.sum()))) if are_times else series


def faults_of_times(series: pl.Series, given: str = "") -> Times | None:
    """Return a reader that has found bad times in a column; None for a column without them, or of no times. `given` is
    a format."""
    form = time_form(series, given, strict=False, drops=True)
    if form is None or form.unit == "order":
        return None
    times = Times(_schema(series.name, form.unit, form.format), drops=True)
    times.look(series)
    return times if times.bad else None


def _short_formats(series: pl.Series) -> list[str]:
    """Return the formats of the first value if its year has two digits."""
    found = _SHORT_DATE.fullmatch(str(series[0]).strip()) if len(series) and series.dtype == pl.String else None
    if found is None:
        return []
    clock = f"{found['gap']}%H:%M{':%S' if found['s'] else ''}" if found["gap"] else ""
    return [found["sep"].join(f"%{part}" for part in order) + clock for order in ("dmy", "mdy", "ymd")]


def _orders(series: pl.Series) -> list[str]:
    """Return the formats of dates whose years have two digits: those that fit all rows and give different times."""
    formats = [form for form in _short_formats(series) if _has_format(series, form)]
    if len(formats) < 2:
        return formats
    text = series.str.strip_chars()
    first, *others = (text.str.to_datetime(form, time_unit="us", strict=False) for form in formats)
    return formats[:1] if all(other.equals(first) for other in others) else formats


def moments(series: pl.Series, form: TimeForm) -> pl.Series:
    """Return the times of a column of this form, in microseconds since 1970; null for bad ones."""
    times = Times(_schema(series.name, form.unit, form.format), drops=True)
    times.look(series)
    row = f"row of {series.name}"
    rows = series.to_frame().with_row_index(row)
    return rows.select(row).join(times.add(times.kept(rows)), on=row, how="left", maintain_order="left")[TIME]


def odd_values(series: pl.Series) -> pl.Series:
    """Return True for the values of text of a kind that few have, at most MAX_ODD of them and always one: the shape, digits and letters aside, and
    whether a year of four digits is from 1990 to 2099, which 0000 for none is not."""
    text = series.cast(pl.String)
    shape = text.str.replace_all(r"\d+", "0").str.replace_all(r"[A-Za-z]+", "a")
    year = text.str.extract(r"(?:^|\D)(\d{4})(?:\D|$)").cast(pl.Int64)
    kind = pl.DataFrame({"shape": shape, "year": year.is_between(1990, 2099).fill_null(True)})
    return kind.select(pl.len().over("shape", "year") <= max(1, MAX_ODD * len(series))).to_series()


def problem(series: pl.Series, given: str = "") -> str:
    """Return why a column of text is none of times, of a format if one is given, as a training says it."""
    times = Times(_schema(series.name or "time", "s", given))
    try:
        times.look(series)
        times.settle()
    except DataError as e:
        return str(e).removeprefix(times.what).lstrip(": ")
    return "its values are no times"


def refuse_orders(series: pl.Series) -> None:
    """Raise DataError for dates that fit several orders of day, month and a year of two digits."""
    if len(formats := _orders(series.drop_nulls())) > 1:
        raise DataError(
            f"interactions: time '{series.name}' holds days, months and years of two digits in one of {len(formats)} orders, all rows fit "
            f"each; set schema.time_format = {' or '.join(repr(form) for form in formats)}, or schema.time = '' if it is no time"
        )


def is_dated(series: pl.Series) -> bool:
    """Return True for dates, and for text whose first rows are."""
    if series.dtype == pl.String:
        present = series.drop_nulls().unique(maintain_order=True).head(SAMPLED_ROWS)
        found = time_form(present, strict=False) if len(present) else None
        return found is not None and present.cast(pl.Float64, strict=False).null_count() > 0
    return series.dtype.is_temporal()


def has_digits_of_dates(series: pl.Series) -> bool:
    """Return True for whole numbers that are dates, such as 20230131."""
    if not series.dtype.is_integer():
        return False
    form = time_form(series.unique(maintain_order=True).head(SAMPLED_ROWS), strict=False)
    return form is not None and form.format != ""


def _formats(series: pl.Series) -> list[str]:
    """Return the formats that the first value may have."""
    if not len(series):
        return []
    if series.dtype.is_integer():
        return [form] if (form := _DIGIT_FORMATS.get(len(str(series[0])))) else []
    if series.dtype != pl.String:
        return []
    if found := _NAMED_ZONE.fullmatch(str(series[0]).strip()):
        _, sep, gap, seconds, fraction, space, zone = found.groups()
        clock = "%H:%M" + (":%S" if seconds else "") + (".%f" if fraction else "")
        return [f"%Y{sep}%m{sep}%d{gap}{clock}{space}{zone}"]
    return formats_of(str(series[0]), FORMATS)


def _unit(series: pl.Series, form: str, strict: bool, drops: bool = False) -> str:
    """Return the unit of a column of times, or of most of its values if `drops`; "" for none. Raises DataError for days
    and months in either order, if `strict`."""
    for unit in ("s", "ms", "us"):
        times = Times(_schema(series.name or "time", unit, form), drops=drops)
        try:
            times.look(series)
        except DataError:
            return ""
        if times.is_ambiguous and strict:
            times.settle()
        try:
            times.settle()
            if 2 * times.bad > times.rows:
                raise DataError("most are no times")
        except DataError:
            if times.is_ambiguous:
                return unit
            if form or not series.dtype.is_numeric():
                return ""
            continue
        return unit
    return "order" if series.dtype.is_numeric() and series.n_unique() > 1 else ""


def _schema(name: str, unit: str, form: str) -> Schema:
    """Return a schema whose time is a column of this name and form."""
    # Not validated: a column that is looked at may have a name that no schema has.
    return Schema.model_construct(time=name, time_unit=unit, time_format=form)  # type: ignore[arg-type]
