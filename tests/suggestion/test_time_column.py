"""Choice of the time among several columns, and what is no time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from twotower.errors import DataError
from twotower.suggestion.columns import guess_columns
from twotower.suggestion.guessed_columns import GuessedColumns
from twotower.suggestion.suggest import suggest

N, START, DAY = 200, 1_600_000_000, 86_400
USERS, ITEMS = [i % 20 for i in range(N)], [i * 7 % 30 for i in range(N)]
SECONDS = [START + 5_000 * i for i in range(N)]


def guessed(**columns: Sequence[object]) -> GuessedColumns:
    return guess_columns(pl.DataFrame({"user_id": USERS, "item_id": ITEMS, **columns}), {}, {})


def date(second: int, form: str = "%Y-%m-%d") -> str:
    return datetime.fromtimestamp(second, UTC).strftime(form)


def test_a_time_of_the_rows_stands_before_one_of_the_users() -> None:
    signup: list[object] = [date(START - DAY * (1 + user)) for user in USERS]
    made: list[object] = [date(s, "%Y-%m-%d %H:%M:%S") for s in SECONDS]
    found = guessed(date=signup, created_at=made)
    assert found.options["time"] == "created_at"
    assert found.remarks == []
    found = guessed(date=signup)
    assert found.options["time"] == "date"
    assert found.remarks[0].startswith("'date' as the time: each user has one value, so rows of a user have no order")


@pytest.mark.parametrize("coarse", ["%Y-%m-%d", "%Y%m%d"])
def test_of_two_columns_of_one_time_the_finer_one_is_read(coarse: str) -> None:
    days: list[object] = [date(s, coarse) for s in SECONDS]
    found = guessed(date=days, time_ms=[1_000 * s for s in SECONDS])
    assert (found.options["time"], found.options["time_unit"]) == ("time_ms", "ms")
    assert found.remarks == []
    far: list[object] = [1_000 * (s - 400 * DAY) for s in SECONDS]
    found = guessed(date=days, event_time=far)
    assert found.options["time"] == "date"
    assert found.remarks == ["'date' as the time: 'event_time' is another; schema.time=event_time would read it"]
    months: list[object] = [date(s, "%Y-%m-01") for s in SECONDS]
    found = guessed(date=months, ts=SECONDS)
    assert (found.options["time"], found.remarks) == ("ts", [])  # the month of a time is not another one


@pytest.mark.parametrize("other", ["delivery_date", "updated_at", "signup_time", "birthDate", "last_seen_at"])
def test_what_comes_after_a_row_or_is_of_a_user_by_its_name_stands_last(other: str) -> None:
    later: list[object] = [date(s + 3 * DAY, "%Y-%m-%d %H:%M") for s in SECONDS]
    found = guessed(**{other: later}, x_at=[date(s, "%Y-%m-%d %H:%M") for s in SECONDS])
    assert found.options["time"] == "x_at"
    assert found.remarks == []
    assert guessed(**{other: later}).options["time"] == other


@pytest.mark.parametrize("name", ["watch_time", "dwellTime", "total_play_time", "order_hour_of_day", "avg_time"])
def test_durations_and_hours_order_nothing(name: str) -> None:
    found = guessed(**{name: [i * 37 % 101 for i in range(N)]})
    assert "time" not in found.options
    (remark,) = found.remarks
    assert remark.startswith(
        f"'{name}': by its name a duration or a part of a date; set schema.time={name} and schema.time_unit=order"
    )
    assert guessed(**{name: list(SECONDS)}).options["time"] == name  # times they are
    with pytest.raises(DataError, match="1 of 200 times are not between 1990 and tomorrow"):
        guessed(**{name: [0, *SECONDS[1:]]})
    other = guessed(**{name: [i * 37 % 101 for i in range(N)]}, at=SECONDS)
    assert (other.options["time"], other.remarks) == ("at", [])


@pytest.mark.parametrize("name", ["view_ts", "session_timestamp", "read_date"])
def test_numbers_that_are_named_times_and_no_durations_order_the_rows(name: str) -> None:
    assert guessed(**{name: [*range(N)]}).options["time_unit"] == "order"


def test_times_of_users_hide_no_broken_time_of_the_rows() -> None:
    signup: list[object] = [date(START - DAY * (1 + user)) for user in USERS]
    with pytest.raises(
        DataError,
        match=r"time 'date': 1 of 200 times are missing \(the first in row 8\); set schema.bad_times = 'drop'",
    ):
        guessed(signup_date=signup, date=[None if i == 7 else date(s) for i, s in enumerate(SECONDS)])


def test_a_day_beside_its_month_orders_nothing() -> None:
    day: list[object] = [1 + i % 28 for i in range(N)]
    assert guessed(day=day).options["time"] == "day"
    assert "time" not in guessed(day=day, month=[1 + i % 12 for i in range(N)]).options
    assert guessed(day=day, year=[2019] * N).options["time"] == "day"
    assert guessed(day=[*range(N)], month=[i // 30 for i in range(N)]).options["time"] == "day"  # since the first one


def test_an_order_by_a_part_of_a_name_is_looked_at() -> None:
    (remark,) = guessed(event_time=[*range(N)]).remarks
    assert remark.startswith("'event_time': its numbers are no times from 1990 to tomorrow, and are read as an order")
    assert guessed(time=[*range(N)]).remarks == []


@pytest.mark.parametrize(
    ("odd", "at", "like"),
    [
        ("NULL", 3, "no time"),
        ("0000-00-00 00:00:00", 17, "no time"),
        ("created_at", 0, "no time"),
        ("1970-01-01 00:00:00", 5, "zeros"),
        ("2035-01-01 00:00:00", 9, "times in the future"),
    ],
)
def test_a_value_that_is_no_time_among_times_is_refused(odd: str, at: int, like: str) -> None:
    times: list[object] = [date(s, "%Y-%m-%d %H:%M:%S") for s in SECONDS]
    times[at] = odd
    with pytest.raises(DataError) as caught:
        guessed(created_at=times)
    assert str(caught.value) == (
        "interactions: time 'created_at': 1 of 200 times are not between 1990 and tomorrow "
        f"(the first, in row {at + 1}: {odd}); 99.5 % look like dates since 1990, 0.5 % like {like}; set schema.bad_times = 'drop' to leave those rows "
        "out, or set schema.time = '' if the column holds no times"
    )
    found = guessed(created_at=times, clicked=[*SECONDS])
    assert (found.options["time"], found.remarks) == ("clicked", [])


def test_a_form_that_is_not_known_is_asked_for() -> None:
    (remark,) = guessed(date=[f"week {1 + i % 50} of 2019" for i in range(N)]).remarks
    assert remark == (
        "'date': row 1 holds 'week 1 of 2019', expected a number or a date such as 2023-01-31 12:30:15.250 or 31/01/2023 12:30; name another "
        "format in schema.time_format; beside it set schema.time=date, and call suggest again"
    )
    places = [i // 20 for i in range(N - 3)]  # rows of each user in their order
    frame = pl.DataFrame({"user_id": USERS[:-3], "item_id": ITEMS[:-3], "date": ["Day 3"] * (N - 3), "step": places})
    assert guess_columns(frame, {}, {}).options["time"] == "step"
    assert guessed(date=["morning", "noon"] * (N // 2)).remarks == []


@pytest.mark.parametrize("form", ["%H:%M:%S", "%H:%M", "%I:%M %p", "%H:%M:%S.%f"])
def test_times_of_day_are_no_times_and_ask_for_their_date(form: str) -> None:
    days, clock = [date(s, "%Y-%m-%d") for s in SECONDS], [date(s, form) for s in SECONDS]
    found = guessed(date=days, time=clock)
    assert (found.options["time"], found.remarks) == ("date", [])
    assert found.notes == [
        "'time': times of day without a date; one column of both, such as 2023-01-31 12:30:15, tells the order within a day"
    ]
    assert "time" not in guessed(time=clock).options
    rest = clock[: N // 2] + ["some time in week 1"] * (N // 2)
    assert not any("times of day" in line for line in (*guessed(time=rest).notes, *guessed(time=rest).remarks))


def test_a_given_format_that_does_not_fit_is_named() -> None:
    frame = pl.DataFrame({"user_id": USERS, "item_id": ITEMS, "time": [date(s) for s in SECONDS]})
    (remark,) = guess_columns(frame, {"time_format": "%d/%m/%Y"}, {}).remarks
    assert remark.startswith("'time': row 1 holds '2020-09-13', which is not of schema.time_format = '%d/%m/%Y'")


@pytest.mark.parametrize(
    "form", ["%d-%b-%Y", "%d-%b-%y", "%d-%b-%Y %H:%M:%S", "%b %d %Y", "%d/%b/%Y", "%d-%b-%y %I.%M.%S.%f %p"]
)
@pytest.mark.parametrize("upper", [False, True])
def test_months_by_their_names_are_known(form: str, upper: bool) -> None:
    texts = [date(s, form) for s in SECONDS]
    found = guessed(at=[t.upper() if upper else t for t in texts])
    assert (found.options["time"], found.options["time_format"]) == ("at", form)


YEARS = [2000 + (i * 7 + i // 20) % 15 for i in range(N)]


@pytest.mark.parametrize("name", ["year", "yearID", "season", "Yr", "年份"])
def test_years_of_the_rows_order_them_where_no_time_does(name: str) -> None:
    frame = pl.DataFrame({name: YEARS, "player": USERS, "team": ITEMS})
    found = guess_columns(frame, {}, {})
    assert [found.options[key] for key in ("user_id", "item_id", "time", "time_unit")] == [
        "player",
        "team",
        name,
        "order",
    ]
    assert "of years" in found.why["time"]
    assert [r for r in found.remarks if r.endswith("set schema.time = '' if they are of the items")]
    with_month = guess_columns(frame.with_columns(month=pl.Series([i % 12 + 1 for i in range(N)])), {}, {})
    assert not with_month.options.get("time")
    assert [
        r for r in with_month.remarks if "no part of a date is read as a time; join them to one column of dates" in r
    ]
    with_time = guess_columns(frame.with_columns(at=pl.Series(SECONDS)), {}, {})
    assert with_time.options["time"] == "at"


@pytest.mark.parametrize("of", ["user", "item", "row", "mostly item", "no year"])
def test_years_of_users_and_items_order_nothing(of: str) -> None:
    """Nor do those of items of one row, which may be theirs, and other numbers of that name."""
    years = {
        "user": [1950 + user for user in USERS],
        "item": [1990 + item for item in ITEMS],
        "row": YEARS,
        "mostly item": [1990 + item + (item < 5 and n % 2) for n, item in enumerate(ITEMS)],  # two spellings of a few
        "no year": ITEMS,
    }[of]
    items = [*range(N)] if of == "row" else ITEMS
    found = guess_columns(pl.DataFrame({"user_id": USERS, "item_id": items, "year": years}), {}, {})
    assert not found.options.get("time")


def of_visits(column: str, falls: int = 0, chain: bool = True) -> pl.DataFrame:
    """Return rows of 80 users on growing numbers of days, of which some fall, with items that follow one another or do not."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(80):
        days = np.cumsum(rng.integers(0, 9, size=8 + user % 5))
        items = (user + np.arange(len(days))) % 20 if chain else rng.integers(20, size=len(days))
        rows += [(user, int(day), f"d{item}") for day, item in zip(days, items, strict=True)]
    frame = pl.DataFrame(rows, schema=["patient", column, "diagnosis"], orient="row")
    return frame.with_columns(
        pl.when(pl.int_range(pl.len()) < falls).then(900 - pl.col(column)).otherwise(column).alias(column)
    )


@pytest.mark.parametrize("column", ["days", "visit_day", "age", "weeks"])
def test_numbers_that_never_fall_among_the_rows_of_a_user_order_them(column: str) -> None:
    found = guess_columns(of_visits(column), {}, {})
    assert {key: found.options[key] for key in ("user_id", "item_id", "time", "time_unit")} == {
        "user_id": "patient", "item_id": "diagnosis", "time": column, "time_unit": "order"
    }  # fmt: skip
    assert "time" not in guess_columns(of_visits("offset_of_it"), {}, {}).options, "the name tells no time"
    if column != "visit_day":  # a name of times
        assert "time" not in guess_columns(of_visits(column, falls=3), {}, {}).options
    frame = of_visits(column).with_columns(pl.col(column).max().over("patient"))
    assert column == "visit_day" or "time" not in guess_columns(frame, {}, {}).options, "each user has one value"
    assert guess_columns(of_visits(column), {"time": ""}, {}).options["time"] == ""


def test_numbers_of_each_user_are_times_only_where_items_follow_one_another() -> None:
    found = suggest(of_visits("days"))
    assert (found.schema.time, found.schema.time_unit) == ("days", "order")
    assert "no times that all users share" in next(line for line in found.reasons if line.startswith("Drift"))
    assert suggest(of_visits("days", chain=False)).schema.time == ""


def test_numbers_of_items_by_which_a_file_is_sorted_order_nothing() -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"user_id": rng.integers(80, size=4000), "item_id": rng.integers(60, size=4000)})
    frame = frame.with_columns(minutes=pl.col("item_id") * 13 % 50).sort("minutes")
    assert "time" not in guess_columns(frame, {}, {}).options
