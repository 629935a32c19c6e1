"""Feature `date`: days in quantile buckets."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import polars as pl
from pydantic import Field, field_validator

from twotower.arrays.ragged import Column
from twotower.arrays.types import Ints
from twotower.errors import DataError
from twotower.features.feature import ColumnFeature
from twotower.features.numeric import NumericEncoder
from twotower.features.values import TEXT_TYPES

YEAR_FIRST = ("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d")
"""Formats that are read without `format`. A time of day may follow."""
_OF_A_DAY = re.compile(r"%[-_0]?[dejDFcxsv+]")
_OF_A_MONTH = re.compile(r"%[-_0]?[mbBh]")


class DateEncoder(NumericEncoder):
    """Encoder of days as codes of quantile buckets 1..b, 0 for missing days."""

    format: str

    def transform(self, series: pl.Series) -> Column:
        return super().transform(days(series, self.format))


class Date(ColumnFeature):
    """The day of a date in quantile buckets, each with an embedding. The scorers that read columns use their order.

    Use it for the day on which an item appears or takes place, or a user was born or joined. The column holds dates,
    times or text. In a `format` a month without a day, as "%Y-%m", is its first day. A day that changes with the log,
    such as the last sale, leaks the answer.
    """

    kind = "date"
    encoder = DateEncoder

    buckets: int = Field(16, ge=2, le=1_000_000, description="Number of quantile buckets, each with an embedding.")
    format: str = Field(
        "", description="strptime format of dates in text or whole numbers, such as '%d.%m.%Y'. Empty: year first."
    )

    @field_validator("format")
    @classmethod
    def _check_format(cls, given: str) -> str:
        if given and not (re.search("%[-_0]?[YyCGDFcxs+]", given)):
            raise ValueError(f"format is {given!r}, expected one with a year, such as '%d.%m.%Y'")
        try:
            pl.select(_read(pl.lit("x"), given or YEAR_FIRST[0]))
        except pl.exceptions.PolarsError:
            raise ValueError(
                f"format is {given!r}, which is not read; give hours with minutes, as in '%d.%m.%Y %H:%M', and hours "
                "of 1 to 12 with AM or PM, as in '%d.%m.%Y %I:%M %p'"
            ) from None
        return given

    @property
    def has_code(self) -> bool:
        return True

    def fit(self, series: pl.Series, counts: Ints) -> DateEncoder:
        x = days(series, self.format).filter(pl.Series(counts > 0)).drop_nulls().to_numpy()
        edges = np.unique(np.quantile(x, np.arange(1, self.buckets) / self.buckets)).tolist() if len(x) else []
        return DateEncoder(mean=0.0, deviation=1.0, edges=edges, buckets=self.buckets, format=self.format)

    def request_type(self, dtype: pl.DataType) -> pl.DataType:
        """Return text: a request gives a date in the form of the column, or with the year first."""
        return pl.String()


def days(series: pl.Series, given: str) -> pl.Series:
    """Return the days since 1970 of dates, times, or text of the format `given`, null for missing and empty values.

    Raises DataError for other values."""
    if series.dtype == pl.Null:
        return series.cast(pl.Float64)
    if series.dtype == pl.Datetime:
        series = series.dt.date()  # of its own zone
    if series.dtype == pl.Date:
        return series.to_physical().cast(pl.Float64)
    if series.dtype.is_float() and given and (series.fill_nan(None).drop_nulls() % 1 == 0).all():
        series = series.fill_nan(None).cast(pl.Int64)  # whole numbers and missing values
    if not (series.dtype in TEXT_TYPES or (given and series.dtype.is_integer())):
        raise DataError(
            f"column '{series.name}': found {series.dtype}, expected dates, or text of them; make it numeric, or name "
            "a format of whole numbers such as '%Y%m%d'"
        )
    text = _stripped(series.cast(pl.String))
    found = text.to_frame("text").select(_dates(given).alias(series.name)).to_series()
    if (odd := text.filter(found.is_null() & text.is_not_null())).len():
        expected = f"a date of the format {given!r}" if given else "a date whose year is first, such as 2023-01-31"
        raise DataError(
            f"column '{series.name}': the first of {len(odd):,} values that are no dates is '{odd[0]:.40}', expected "
            f"{expected}; name another format, or make them empty, as missing values are"
        )
    return found.to_physical().cast(pl.Float64)


def fitting_formats(text: pl.Series, formats: Iterable[str]) -> dict[str, pl.Series]:
    """Return the days since 1970 of text by each of the `formats` that reads all of it. The format "" is YEAR_FIRST."""
    text = _stripped(text)
    frame = text.to_frame("text").with_columns(year_first=_dates(""))
    found = frame.select(
        (pl.coalesce(_read(pl.col("text"), form), "year_first") if form else pl.col("year_first")).alias(form)
        for form in formats
    )
    fits = (dates for dates in found if dates.null_count() == text.null_count())
    return {dates.name: dates.to_physical().cast(pl.Float64) for dates in fits}


def _stripped(text: pl.Series) -> pl.Series:
    """Return stripped text, null where it is empty."""
    text = text.str.strip_chars()
    return text.set(text == "", None)


def _dates(given: str) -> pl.Expr:
    """Return the dates of a column `text` by the format `given` or with the year first, else null."""
    day = pl.col("text").str.extract(r"^(\d{4}[-/.]\d{1,2}[-/.]\d{1,2})(?:[T ].*)?$")
    others = [day.str.to_date(form, strict=False) for form in YEAR_FIRST]
    return pl.coalesce(_read(pl.col("text"), given), *others) if given else pl.coalesce(others)


def _read(text: pl.Expr, form: str) -> pl.Expr:
    """Return the dates of text by a format, else null."""
    if not _OF_A_DAY.search(form):
        text, form = (text + " 1", form + " %d") if _OF_A_MONTH.search(form) else (text + " 1 1", form + " %m %d")
    if form.endswith("z"):  # the day as written, without its offset
        text, form = text.str.replace(r"\s*(?:[-+]\d{2}:?\d{2}|Z|UTC|GMT)$", ""), re.sub(r"\s*%#?:{0,2}z$", "", form)
    return text.str.to_datetime(form.replace(".%f", "%.f"), time_unit="us", strict=False).dt.date()
