"""Features of the time of an interaction, against Python's own calendar."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError

from twotower.features.categorical import Categorical
from twotower.features.day_of_week import DayOfWeek
from twotower.features.days_since_previous import DaysSincePrevious
from twotower.features.hour_of_day import HourOfDay
from twotower.features.schema import Schema

IDS = [{"kind": "categorical", "name": n, "side": n[:4]} for n in ("user_id", "item_id")]
seconds = st.integers(631_152_000, 2_000_000_000)


@examples(deadline=None)
@given(seconds, st.sampled_from(["UTC", "Europe/Zurich", "Asia/Kolkata", "America/New_York", "Pacific/Chatham"]))
def test_hour_and_day_are_those_of_the_calendar(second: int, zone: str) -> None:
    times, nothing = np.array([second * 1_000_000]), np.array([-1])
    local = datetime.fromtimestamp(second, UTC).astimezone(ZoneInfo(zone))
    hour, day = HourOfDay(name="h", time_zone=zone), DayOfWeek(name="d", time_zone=zone)
    hours, days = hour.of_times(times, nothing), day.of_times(times, nothing)
    assert (hours.to_list(), days.to_list()) == ([local.hour], [local.isoweekday()])
    ones = np.ones(1, np.int64)
    assert hour.fit(hours, ones).transform(hours).tolist() == [local.hour + 1]
    assert day.fit(days, ones).transform(days).tolist() == [local.isoweekday()]


def test_days_since_the_previous_interaction_are_in_buckets() -> None:
    feature, day = DaysSincePrevious(name="since", edges=(1.0, 7.0)), 86_400_000_000
    times = np.array([10, 10, 10, 10, 10]) * day
    values = feature.of_times(times, np.array([10 * day, 9 * day, 4 * day, 3 * day, -1]))
    assert values.to_list() == [0.0, 1.0, 6.0, 7.0, None]
    assert feature.fit(values, np.ones(5, np.int64)).transform(values).tolist() == [1, 2, 2, 3, 0]


@pytest.mark.parametrize(
    ("feature", "told"),
    [
        (
            {"kind": "hour_of_day", "time_zone": "Europe/Zurch"},
            "no time zone 'Europe/Zurch'; did you mean 'Europe/Zurich'?",
        ),
        ({"kind": "days_since_previous", "edges": [2, 1]}, "edges [2.0, 1.0] do not rise from above 0"),
        ({"kind": "days_since_previous", "default": -0.5}, "default is -0.5, expected -1 (none) or at least 0"),
        ({"kind": "sequence", "side": "context"}, "Input should be 'user' or 'item'"),
        ({"kind": "numeric", "side": "context", "statistic": "count"}, "a statistic is of users or items"),
        ({"kind": "categorical", "side": "user", "default": 3}, "'default' goes with side = 'context'"),
        (
            {"kind": "categorical", "side": "context", "column": "stars"},
            "reads the column of label; no request knows it",
        ),
        (
            {"kind": "numeric", "side": "context", "column": "at"},
            "reads the column of time; it is the time: use hour_of_day",
        ),
        ({"kind": "categorical", "side": "context", "name": "user_id"}, "'user_id' is defined twice in the user tower"),
    ],
)
def test_a_feature_of_no_context_is_refused_in_one_line(feature: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Schema.model_validate({"label": "stars", "time": "at", "features": [*IDS, {"name": "x", **feature}]})
    (problem,) = refused.value.errors()
    assert told in problem["msg"]
    assert "\n" not in problem["msg"]


@pytest.mark.parametrize(
    ("times", "told"),
    [({}, "name their column in schema.time"), ({"time": "at", "time_unit": "order"}, "'order' has none")],
)
def test_a_feature_of_the_time_needs_times(times: dict[str, str], told: str) -> None:
    for feature in ({"kind": "hour_of_day", "name": "h"}, {"kind": "gap_sequence", "name": "g", "side": "user"}):
        with pytest.raises(ValidationError, match=told):
            Schema.model_validate({**times, "features": [*IDS, feature]})


def test_days_since_previous_needs_the_times_that_last_drops() -> None:
    feature = {"kind": "days_since_previous", "name": "gap"}
    with pytest.raises(
        ValidationError, match=r"'gap' needs the time of every interaction.*set schema\.duplicates = 'keep'"
    ):
        Schema.model_validate({"time": "at", "features": [*IDS, feature]})
    for kept in ("keep", "error"):
        Schema.model_validate({"time": "at", "duplicates": kept, "features": [*IDS, feature]})


def test_the_user_tower_reads_the_context_in_the_order_of_the_schema() -> None:
    features = (HourOfDay(name="h"), *(Categorical(name=n, side=n[:4]) for n in ("user_id", "item_id")))
    schema = Schema(time="at", features=(*features, Categorical(name="page", side="context")))
    assert [f.name for f in schema.tower("user")] == ["h", "user_id", "page"]
    assert [f.name for f in schema.side("user")] == ["user_id"]
    assert schema.context_columns() == ("page",)
    assert not schema.precomputes
