"""A date or a time that is given as text is the value that a column of them holds, or is refused."""

from __future__ import annotations

from datetime import UTC, date, datetime

import numpy as np
import polars as pl
import pytest
from worlds import ID_FEATURES

from twotower.data.given_values import GivenValues
from twotower.features.categorical import Categorical
from twotower.features.encoders import Encoders
from twotower.features.feature import Feature
from twotower.features.multi_hot import MultiHot
from twotower.features.schema import Schema

MOMENTS = [datetime(1969, 12, 31, 23, 59, 59, 250_000), datetime(2024, 3, 31, 2, 30), datetime(2024, 10, 27, 1, 30)]
HELD: dict[str, tuple[pl.Series, list[str]]] = {
    "days": (pl.Series([m.date() for m in MOMENTS]), ["1969-12-31", "2024-03-31", "20241027"]),
    "clocks": (pl.Series([m.time() for m in MOMENTS]), ["23:59:59.25", "02:30", "01:30:00"]),
    "moments": (pl.Series(MOMENTS), ["1969-12-31 23:59:59.250", "2024-03-31T02:30", "2024-10-27 01:30:00.000000"]),
    "in milliseconds": (pl.Series(MOMENTS, dtype=pl.Datetime("ms")), ["1969-12-31 23:59:59.25", "2024-03-31T02:30:00",
     "2024-10-27 01:30"]),
    "in nanoseconds": (pl.Series(MOMENTS, dtype=pl.Datetime("ns")), ["1969-12-31 23:59:59.25", "2024-03-31T02:30:00",
     "2024-10-27 01:30"]),
    "of a zone": (pl.Series([m.replace(tzinfo=UTC) for m in MOMENTS]).dt.convert_time_zone("Europe/Zurich"),
     ["1969-12-31T23:59:59.25Z", "2024-03-31 04:30:00+02:00", "2024-10-26 20:30:00-05:00"]),
}  # fmt: skip


def given_values(column: pl.Series, feature: Feature) -> GivenValues:
    schema = Schema(features=(*ID_FEATURES, feature))
    encoders = Encoders(
        schema,
        {"user": {feature.name: feature.fit(column, np.ones(len(column), np.int64))}, "item": {}, "context": {}},
        {},
    )
    return GivenValues(encoders, (feature,), column.to_frame())


@pytest.mark.parametrize("name", HELD)
def test_text_of_a_moment_is_the_value_that_the_column_holds(name: str) -> None:
    held, texts = HELD[name]
    feature = Categorical(name="at", side="user")
    values = given_values(held.alias("at"), feature)
    codes = []
    for value, text in zip(held.to_list(), texts, strict=True):
        column = values.column("at", text)
        assert column is not None
        assert column.dtype == held.dtype
        assert column.to_list() == [value]
        codes.append(int(values.encode(feature, column)[0]))
    assert codes == np.asarray(feature.fit(held, np.ones(3, np.int64)).transform(held)).tolist()
    assert sorted(codes) == [1, 2, 3]
    assert values.column("at", held[1]) is not None, "a value of Python is read as before"
    missing = values.column("at", None)
    assert missing is not None
    assert missing.to_list() == [None]


def test_a_list_of_dates_is_given_as_a_list_of_text() -> None:
    days = pl.Series("at", [[date(2024, 1, 1), date(2024, 1, 2)], [date(2024, 1, 3)], None])
    feature = MultiHot(name="at", side="user")
    values = given_values(days, feature)
    column = values.column("at", ["2024-01-03", None, "2024-01-01"])
    assert column is not None
    assert column.to_list() == [[date(2024, 1, 3), None, date(2024, 1, 1)]]
    assert sorted(values.encode(feature, column).tolist()) == [1, 3]
    assert values.column("at", ["2024-01-03", "soon"]) is None
    assert values.expected("at") == "List(Date), as text such as '2024-01-31'"


@pytest.mark.parametrize(
    ("name", "texts", "expected"),
    [
        ("days", ["2024-02-30", "31.12.2024", "2024-01-01 10:00", ""], "Date, as text such as '2024-01-31'"),
        ("clocks", ["25:00", "12:30+01:00", "2024-01-01"], "Time, as text such as '12:30:00'"),
        ("moments", ["2024-03-31 02:30:00Z", "soon", "2024-03-31 02:30:00.1234567"], "'2024-01-31 12:30:00'"),
        ("in milliseconds", ["2024-03-31 02:30:00.000001"], "'2024-01-31 12:30:00'"),
        ("of a zone", ["2024-03-31 04:30:00"], "'2024-01-31 12:30:00+01:00'"),
    ],
)
def test_text_that_is_no_value_of_the_column_is_refused(name: str, texts: list[str], expected: str) -> None:
    values = given_values(HELD[name][0].alias("at"), Categorical(name="at", side="user"))
    assert [text for text in texts if values.column("at", text) is not None] == []
    assert values.expected("at").endswith(expected)
