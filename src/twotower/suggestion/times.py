"""Form of a column of times: the unit of its numbers, or the format of its text."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from twotower.data.times import Times, formats_of, plausible_range
from twotower.errors import DataError
from twotower.features.schema import Schema

SAMPLED_ROWS = 200
"""Distinct values, the first, in which formats are tried."""
FORMATS = (
    "%d/%b/%Y:%H:%M:%S %z", "%d/%b/%Y:%H:%M:%S", "%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z",
    "%d %b %Y %H:%M:%S", "%d %b %Y %H:%M", "%d %b %Y", "%d %B %Y", "%b %d, %Y %H:%M:%S", "%b %d, %Y", "%B %d, %Y",
    "%d-%b-%Y %H:%M:%S", "%d-%b-%Y", "%d/%b/%Y", "%b %d %Y", "%Y-%m-%d %I:%M:%S %p", "%Y-%m-%d %I:%M %p",
    "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %I:%M %p", "%Y%m%dT%H%M%SZ", "%Y%m%dT%H%M%S", "%Y年%m月%d日 %H:%M:%S",
    "%Y年%m月%d日 %H:%M", "%Y年%m月%d日", "%Y-%m-%d %H:%M:%S UTC", "%Y-%m", "%Y/%m", "%m/%Y", "%m.%Y", "%b %Y",
    "%B %Y", "%Y年%m月", "%Y%m%d", "%Y%m%d%H%M%S",
)  # fmt: skip
"""Formats of text that need `schema.time_format`."""
_DIGIT_FORMATS = {6: "%Y%m", 8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}


class TimeForm(NamedTuple):
    """Options of the schema for a column of times."""

    unit: str = "s"  # value of time_unit
    format: str = ""  # value of time_format; empty: numbers, or dates that are read without one


def time_form(series: pl.Series, given: str = "") -> TimeForm | None:
    """Return the form in which at least half of the values are times from 1990 to tomorrow; None without one.

    `given` is a format that is not guessed."""
    values = series.drop_nulls()
    values = values.str.strip_chars().unique(maintain_order=True) if values.dtype == pl.String else values
    if not len(values) or values.dtype == pl.Boolean or values.dtype.is_nested():
        return None
    tried = [TimeForm(unit) for unit in ("s", "ms", "us")] if values.dtype != pl.String else [TimeForm()]
    if values.dtype.is_integer():
        tried += [TimeForm(format=form) for n, form in _DIGIT_FORMATS.items() if len(str(values[0])) == n]
    elif values.dtype == pl.String:
        values = values.head(SAMPLED_ROWS)
        tried += [TimeForm(format=form) for form in formats_of(values[0], FORMATS)]
    return next((form for form in ([TimeForm(format=given)] if given else tried) if _are_times(values, form)), None)


def is_dated(series: pl.Series) -> bool:
    """Return True for dates and times, and for text of them."""
    if series.dtype != pl.String:
        return series.dtype in (pl.Date, pl.Datetime)
    some = series.drop_nulls().head(SAMPLED_ROWS)
    return not some.str.contains(r"^\s*\d+\s*$").all() and time_form(some) is not None


def looks_like_seconds(series: pl.Series) -> bool:
    """Return True for numbers that are all times from 1990 to tomorrow, in s, ms or us since 1970."""
    values = series.drop_nulls()
    if not len(values) or not values.dtype.is_numeric():
        return False
    first, last = plausible_range()
    return any(bool(values.is_between(first / per, last / per).all()) for per in (1_000_000, 1_000, 1))


def _are_times(values: pl.Series, form: TimeForm) -> bool:
    """Return True if at least half of the values are times of this form."""
    # Not validated: a column that is looked at may have a name that no schema has.
    options = {"time": values.name or "time", "time_unit": form.unit, "time_format": form.format}
    times = Times(Schema.model_construct(**options), drops=True)  # type: ignore[arg-type]
    try:
        times.look(values)
    except DataError:
        return False
    return 2 * times.bad <= times.rows
