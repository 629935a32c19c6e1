"""Days of dates, times and text, in the order of time, and text that is no date."""

from __future__ import annotations

import datetime
import math
import re

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from twotower.errors import DataError
from twotower.features.date import Date, days

FIRST, SECOND = datetime.date(2019, 12, 31), datetime.date(2024, 2, 29)


@pytest.mark.parametrize(
    ("form", "texts"),
    [
        ("", ["2019-12-31", "2024-02-29"]),
        ("", ["2019-12-31T23:59:59.5+02:00", "2024-02-29 00:00"]),
        ("%d.%m.%Y", ["31.12.2019", "2024-02-29"]),
        ("%m/%d/%Y %H:%M:%S.%f", ["12/31/2019 23:00:00.25", "2/29/2024 01:00:00"]),
        ("%Y%m%d", ["20191231", "20240229"]),
    ],
)
def test_texts_of_one_day_are_one_day(form: str, texts: list[str]) -> None:
    expected = pl.Series([FIRST, SECOND, None, None]).to_physical().cast(pl.Float64)
    assert days(pl.Series([*texts, None, ""]), form).to_list() == expected.to_list()
    at_noon = [datetime.datetime.combine(day, datetime.time(12)) for day in (FIRST, SECOND)]
    for column in (
        pl.Series([FIRST, SECOND]),
        pl.Series(at_noon),
        pl.Series(at_noon).dt.replace_time_zone("Asia/Tokyo"),
    ):
        assert days(column, form).to_list() == expected[:2].to_list()


def test_a_month_or_a_year_is_its_first_day_and_whole_numbers_have_a_format() -> None:
    january = float((datetime.date(2024, 1, 1) - datetime.date(1970, 1, 1)).days)
    for values, form in (
        (["2024-01"], "%Y-%m"),
        (["Jan 2024"], "%b %Y"),
        ([2024], "%Y"),
        ([20240101], "%Y%m%d"),
        ([202401], "%Y%m"),
    ):
        assert days(pl.Series(values), form).to_list() == [january]


@pytest.mark.parametrize(
    ("values", "form", "told"),
    [
        (["2024-02-29", "soon", "never"], "", "column 'd': the first of 2 values that are no dates is 'soon', expected "
            "a date whose year is first"),
        (
            ["31.12.2019"],
            "%m.%d.%Y",
            "expected a date of the format '%m.%d.%Y'; name another format, or make them empty",
        ),
        ([2024], "", "column 'd': found Int64, expected dates, or text of them; make it numeric, or name a format of "
            "whole numbers such as '%Y%m%d'"),
    ],
)  # fmt: skip
def test_what_is_no_date_is_refused(values: list[object], form: str, told: str) -> None:
    with pytest.raises(DataError, match=re.escape(told)):
        days(pl.Series("d", values), form)
    encoder = Date(name="d", side="item", format=form).fit(pl.Series("d", [FIRST, SECOND]), np.ones(2, np.int64))
    with pytest.raises(DataError, match=re.escape(told)):
        encoder.transform(pl.Series("d", values))


def test_whole_numbers_beside_missing_ones_are_read_and_a_zone_is_that_of_the_text() -> None:
    assert (
        days(pl.Series([2024.0, None, math.nan]), "%Y").to_list() == days(pl.Series([2024, None, None]), "%Y").to_list()
    )
    texts = pl.Series(["2024-02-29 00:30:00+0900", "2024-02-29 23:30:00 -0500"])
    assert set(days(texts, "%Y-%m-%d %H:%M:%S%z")[:1]) == {days(pl.Series([SECOND]), "")[0]}
    named = pl.Series(["2024-02-29 00:30:00 JST", "2024-02-29 23:30:00 EST"])
    assert set(days(named, "%Y-%m-%d %H:%M:%S %Z")) == {days(pl.Series([SECOND]), "")[0]}


@pytest.mark.parametrize("form", ["%Y-%m-%d %H", "%d.%m.%Y %I:%M"])
def test_a_format_that_is_not_read_is_refused_with_the_config(form: str) -> None:
    with pytest.raises(ValidationError, match="which is not read; give hours with minutes"):
        Date(name="d", side="item", format=form)


def test_a_format_has_a_year() -> None:
    for form in ("%d.%m.", "date"):
        with pytest.raises(ValidationError, match="expected one with a year, such as '%d.%m.%Y'"):
            Date(name="d", side="item", format=form)


def test_buckets_hold_equally_many_days_in_the_order_of_time() -> None:
    column = pl.Series([FIRST + datetime.timedelta(days=n) for n in range(80)])
    encoder = Date(name="d", side="item", buckets=8).fit(column, np.ones(80, np.int64))
    codes = np.asarray(encoder.transform(column))
    assert (np.bincount(codes)[1:] == 10).all()
    assert (np.diff(codes) >= 0).all()
    far = encoder.transform(pl.Series(["1900-01-01", "2100-01-01", None]))
    assert np.asarray(far).tolist() == [1, 8, 0]
    unseen = np.repeat([1, 0], 40)
    early = Date(name="d", side="item", buckets=8).fit(column, unseen)
    assert max(early.edges) < days(column, "")[40], "days of rows without training interactions make no bucket"
