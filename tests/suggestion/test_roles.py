"""Roles of columns by standard names and types, and the one question where two readings are possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from suggestion_worlds import START, log, with_label

from twotower.errors import ConfigError, DataError, OpenRoles
from twotower.suggestion.roles import (
    MAX_STEPS,
    OPTION_OF,
    Roles,
    event_rule,
    find_roles,
    is_title,
    plain,
    role_of_name,
    threshold,
)
from twotower.suggestion.suggest import suggest

N = 60
RNG = np.random.default_rng(0)
TIMES = [START + 100 * i for i in range(N)]
ROWS: dict[str, Sequence[object]] = {
    "user_id": [100 + i % 12 for i in range(N)],
    "item_id": [200 + i * 7 % 11 for i in range(N)],
    "timestamp": TIMES,
}
STARS: Sequence[object] = RNG.integers(1, 6, N).tolist()
WORDS: Sequence[object] = RNG.choice(["a b", "c d", "e"], N).tolist()
EVENTS: Sequence[object] = RNG.choice(["view", "buy"], N).tolist()
OTHER: dict[str, list[object]] = {
    "created_at": [START + 50_000 + 90 * i for i in range(N)],
    "customer": [f"c{i % 11}" for i in range(N)],
}


def found(
    columns: Mapping[str, Sequence[object]], roles: Mapping[str, str] | None = None, has_users: bool = False
) -> Roles:
    return find_roles(pl.DataFrame(columns), {}, dict(roles or {}), has_users)


def question(columns: Mapping[str, Sequence[object]], **roles: str) -> OpenRoles:
    with pytest.raises(OpenRoles) as raised:
        found(columns, roles)
    return raised.value


@pytest.mark.parametrize(
    ("user", "item"),
    [
        ("user_id", "item_id"), ("userId", "movieId"), ("UserID", "sku"), ("customer", "product"),
        ("user_id:token", "item_id:token"), ("session_id", "parent_asin"), ("用户ID", "商品ID"),
    ],
)  # fmt: skip
def test_ids_have_standard_names_in_english_and_chinese(user: str, item: str) -> None:
    roles = found({user: ROWS["user_id"], item: ROWS["item_id"], "timestamp": ROWS["timestamp"]})
    assert (roles.options["user_id"], roles.options["item_id"]) == (user, item)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("timestamp", "time"), ("日期", "time"), ("rating", "label"), ("Book-Rating", "label"), ("权重", "weight"),
        ("event_type", "event"), ("keyword", "query"), ("sessionId", "session"), ("zip", ""), ("home_team", ""),
    ],
)  # fmt: skip
def test_a_name_has_one_role_or_none(name: str, role: str) -> None:
    assert role_of_name(name) == role


def test_names_are_plain_and_titles_are_of_items() -> None:
    assert [plain(name) for name in ("userId", "user_id:token", "User ID", "Item Name")] == [
        "user_id", "user_id", "user_id", "item_name",
    ]  # fmt: skip
    assert all(map(is_title, ("title", "name", "product_name", "movieTitle", "标题")))
    assert not any(map(is_title, ("brand_name", "user_name", "label", "titles")))


def test_every_role_is_found_at_once() -> None:
    roles = found({**ROWS, "rating": STARS, "weight": [1.0 + i % 5 for i in range(N)], "device": ["a", "b", "c"] * 20})
    assert {key: roles.options[key] for key in ("user_id", "item_id", "time", "label", "weight", "positive_above")} == {
        "user_id": "user_id", "item_id": "item_id", "time": "timestamp", "label": "rating", "weight": "weight",
        "positive_above": 3,
    }  # fmt: skip
    assert roles.why["label"] == "by its name"


QUESTIONS: dict[str, tuple[dict[str, Sequence[object]], list[str], str]] = {
    "two users": ({**ROWS, "customer": OTHER["customer"]}, ["user"], "user: 'user_id' or 'customer'"),
    "no user": ({"who": ROWS["user_id"], "item": ROWS["item_id"]}, ["user"], "user: no usual name"),
    "two times": ({**ROWS, "created_at": OTHER["created_at"]}, ["time"], "time: 'timestamp' or 'created_at'"),
    "numbers like times": (
        {"user": ROWS["user_id"], "item": ROWS["item_id"], "x": ROWS["timestamp"]}, ["time"],
        "time: 'x' (its numbers look like times)",
    ),
    "a time in no form": (
        {**ROWS, "timestamp": [f"quarter {i % 4} of {1990 + i % 30}" for i in range(N)]}, ["time"],
        "time: 'timestamp' (no form reads this text; schema.time_format gives one)",
    ),
    "a label apart": (
        {**ROWS, "rating": RNG.choice([-1, 1, 2, 3, 4, 5], N).tolist()}, ["label"],
        "label: 'rating' (-1 may be a refusal, or no rating: then leave its rows out)",
    ),
    "an item for each user": (
        {**ROWS, "item_id": [f"t{i % 12 // 3}" for i in range(N)]}, ["item"], "'item_id' (each user has one value)",
    ),
    "a label and events": (
        {**ROWS, "rating": STARS, "event": EVENTS}, ["label", "event"], "label: 'rating'",
    ),
    "a label in words": ({**ROWS, "rating": WORDS}, ["label"], "types of events are words"),
    "a rating or a quantity": (
        {**ROWS, "n": STARS}, ["label"], "label: 'n' (a rating, an outcome, or a quantity for `weight`)",
    ),
    "all at once": (
        {"a": ROWS["user_id"], "b": ROWS["item_id"], "c": ROWS["timestamp"], "d": STARS},
        ["user", "item", "time", "label"],
        "item: no usual name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUESTIONS)
def test_an_open_role_is_one_question_with_all_that_settles_it(case: str) -> None:
    columns, roles, words = QUESTIONS[case]
    asked = question(columns)
    assert asked.arguments == roles
    assert words in "\n".join(asked.lines)
    for name, values in columns.items():
        first = ", ".join(f"{v!s:.24}" for v in list(dict.fromkeys(values))[:3])
        assert sum(line.split() == f"{name} {first}".split() for line in asked.lines) == 1, "a line with three values"
    assert all(f"`{role}='COLUMN'`" in str(asked) for role in roles)


def test_a_question_says_what_is_taken_and_how_to_say_that_there_is_none() -> None:
    asked = question({**ROWS, "created_at": OTHER["created_at"]})
    assert "  found: user = 'user_id', item = 'item_id'" in asked.lines
    assert asked.hint == "'': no column has the role"
    assert "`query` or `session` may stand for `user`" in question({**ROWS, "customer": OTHER["customer"]}).hint


@pytest.mark.parametrize(
    ("role", "name", "columns"),
    [
        ("user", "customer", {**ROWS, "customer": OTHER["customer"]}), ("query", "query", {**ROWS, "query": WORDS}),
        ("session", "x", {"x": ROWS["user_id"], "item_id": ROWS["item_id"]}),
        ("time", "created_at", {**ROWS, "created_at": OTHER["created_at"]}),
        ("label", "liked", {**ROWS, "rating": STARS, "liked": [i % 3 % 2 for i in range(N)]}),
        ("event", "rating", {**ROWS, "rating": EVENTS}),
    ],
)  # fmt: skip
def test_a_role_that_is_given_is_not_guessed(role: str, name: str, columns: dict[str, Sequence[object]]) -> None:
    roles = found(columns, {role: name})
    assert roles.options[OPTION_OF[role]] == name
    assert roles.why[OPTION_OF[role]] == "as given"
    if role not in ("user", "item", "query", "session"):
        assert OPTION_OF[role] in roles.options
        assert not found(columns, {role: ""} | ({"label": ""} if role in ("event", "weight") else {})).options[role]


def test_sessions_are_users_where_no_column_is_and_left_out_otherwise() -> None:
    sessions = {**ROWS, "session_id": [i // 3 for i in range(N)]}
    roles = found(sessions)
    assert roles.options["user_id"] == "user_id"
    assert "'session_id': sessions, and 'user_id' is the user" in roles.notes
    assert found({k: v for k, v in sessions.items() if k != "user_id"}).options["user_id"] == "session_id"
    both = found(sessions, {"user": "user_id", "session": "session_id"})
    assert (both.options["user_id"], both.named) == ("user_id", {"user_id", "item_id", "timestamp", "session_id"})
    assert found(sessions, {"session": "session_id"}).options["user_id"] == "session_id"


def test_columns_of_users_and_items_are_no_columns_of_rows() -> None:
    born = {
        **ROWS,
        "birth_date": [START - 1000 * (i % 12) for i in range(N)],
        "stars": [i * 7 % 11 % 5 for i in range(N)],
    }
    roles = found(born)
    assert roles.options["time"] == "timestamp"
    assert "'birth_date': each user has one value, so it is no time of rows" in roles.notes
    assert "'stars': each item has one value, so it is no label of rows" in roles.notes


@pytest.mark.parametrize(
    ("values", "unit", "form"),
    [
        (TIMES, "s", ""), ([1000 * t for t in TIMES], "ms", ""),
        (list(range(N)), "order", ""), ([f"{13 + i % 9}.03.2021" for i in range(N)], "s", ""),
        ([20230101 + i % 28 for i in range(N)], "s", "%Y%m%d"),
        ([f"{1 + i % 28} Mar 2021" for i in range(N)], "s", "%d %b %Y"),
        ([f"2021年03月{1 + i % 28:02}日" for i in range(N)], "s", "%Y年%m月%d日"),
        ([START * 1000 if i else START for i in range(N)], "ms", ""),
    ],
)  # fmt: skip
def test_times_have_a_unit_or_a_format(values: Sequence[object], unit: str, form: str) -> None:
    """A few bad values change neither: a check refuses them with their number."""
    options = found({**ROWS, "timestamp": values}).options
    assert (options.get("time_unit", "s"), options.get("time_format", "")) == (unit, form)


def test_dates_are_times_by_their_type_and_durations_are_none() -> None:
    days = pl.DataFrame({"user": ROWS["user_id"], "item": ROWS["item_id"], "x": ROWS["timestamp"], "watch_time": STARS})
    days = days.with_columns(pl.from_epoch("x"))
    assert find_roles(days, {}, {"label": ""}).options["time"] == "x"
    clicked = {"user": ROWS["user_id"], "item": ROWS["item_id"], "clicked_at": ROWS["timestamp"]}
    assert found(clicked).options["time"] == "clicked_at"


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("view", 1), ("add_to_cart", 1), ("impression", "ignored"), ("dislike", "negative"),
        ("remove_from_cart", "ignored"), ("no_click", "negative"),
    ],
)  # fmt: skip
def test_events_have_meanings(word: str, rule: object) -> None:
    assert event_rule(word) == rule


def test_types_of_events_are_listed_with_their_rows() -> None:
    roles = found({**ROWS, "event": ["view"] * 20 + ["zap", "skip", "zap", "zap"] * 10})
    assert roles.options["events"] == {"view": 1, "zap": 1, "skip": "negative"}
    assert roles.why["events"] == "zap 30; view 20; skip 10. The weights are yours to set"


@pytest.mark.parametrize("values", [[1] * N, [None, *STARS[1:]]])
def test_what_says_nothing_is_no_label(values: list[object]) -> None:
    roles = found({**ROWS, "rating": values})
    assert "label" not in roles.options
    assert any(note.startswith("'rating': ") and note.endswith("so it is no label") for note in roles.notes)


def test_a_column_that_is_missing_and_a_role_that_does_not_exist_are_refused() -> None:
    with pytest.raises(DataError, match=r"no column 'itm_id'; did you mean 'item_id'\? \(columns: user_id, item_id"):
        found(ROWS, {"item": "itm_id"})
    with pytest.raises(ConfigError, match=r"`usr`: no such role; did you mean 'user'\?"):
        suggest(log(), usr="user_id")  # type: ignore[call-arg]


NONSENSE = {"user_id": "kk", "item_id": "vv", "timestamp": "zz", "rating": "ww"}
FLAGS = {"user_id": "user", "item_id": "item", "timestamp": "time", "rating": "label"}
RATED = with_label(log(), 0.4, scale=6).with_columns(pl.col("rating").cast(pl.Float64))


@given(
    changed=st.sampled_from([set(some) for n in range(1, 5) for some in combinations(NONSENSE, n)]),
    suffix=st.text("bcdfghjklmnpqrstvwxz", min_size=0, max_size=4),
)
@settings(max_examples=25, deadline=None)
def test_nonsense_names_lead_to_a_question_and_with_flags_to_the_roles_of_standard_names(
    changed: set[str], suffix: str
) -> None:
    names = {name: f"{NONSENSE[name]}{suffix}" for name in changed}
    frame = RATED.rename(names)
    standard = find_roles(RATED, {}, {}).options
    with pytest.raises(OpenRoles) as raised:
        find_roles(frame, {}, {})
    assert {*raised.value.arguments} == {FLAGS[name] for name in changed}
    given_ = find_roles(frame, {}, {FLAGS[name]: new for name, new in names.items()}).options
    assert given_ == {key: names.get(str(value), value) for key, value in standard.items()}


MANY = [float(value) for value in range(MAX_STEPS + 1)]


@pytest.mark.parametrize(
    ("values", "above", "why"),
    [
        ([0, 1], 0.0, "two values: 1 is a positive, 0 a negative"), ([True, False], 0.0, "two values"),
        ([1, 2, 3, 4, 5], 3.0, "the middle of 1 to 5"),
        ([0.5 * half for half in range(1, 11)], 3.0, "the middle of 0.5 to 5, rounded up"),
        ([-3, 0, 10], 0.0, "what is above 0"),
        ([*MANY, *[4.0] * 30], 4.0, "the median of 21 distinct values from 0 to 20"),
        ([*MANY, *[20.0] * 30], 19.0, "the median of 21 distinct values from 0 to 20, or the second largest"),
        ([None, 1.0, np.nan, 2.0, np.inf], 1.0, "two values: 2 is a positive"),
    ],
)  # fmt: skip
def test_a_threshold_follows_the_values(values: list[float | None], above: float, why: str) -> None:
    found_above, reason = threshold(pl.Series(values))
    assert (found_above, why in reason) == (above, True)
