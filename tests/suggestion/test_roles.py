"""Roles of columns by standard names and types, and the one question where two readings are possible."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from suggestion_worlds import START, log, queries, with_label

from twotower.errors import ConfigError, DataError
from twotower.suggestion.roles import (
    MAX_STEPS,
    OPTION_OF,
    Roles,
    event_rule,
    find_roles,
    is_title,
    no_rating,
    plain,
    role_of_name,
    threshold,
)
from twotower.suggestion.suggest import suggest

N = 60
RNG = np.random.default_rng(0)
ROWS: dict[str, Sequence[object]] = {
    "user_id": [100 + i % 12 for i in range(N)],
    "item_id": [200 + i * 7 % 11 for i in range(N)],
    "timestamp": [START + 100 * i for i in range(N)],
}
STARS: Sequence[object] = RNG.integers(1, 6, N).tolist()
WORDS: Sequence[object] = RNG.choice(["a b", "c d", "e"], N).tolist()
EVENTS: Sequence[object] = RNG.choice(["view", "buy"], N).tolist()
OTHER: dict[str, list[object]] = {
    "created_at": [START + 50_000 + 90 * i for i in range(N)],
    "customer": [f"c{i % 11}" for i in range(N)],
}


def found(
    columns: Mapping[str, Sequence[object]],
    roles: Mapping[str, str] | None = None,
    tables: Mapping[str, pl.DataFrame | None] | None = None,
) -> Roles:
    return find_roles(pl.DataFrame(columns), {}, dict(roles or {}), tables or {})


def question(columns: Mapping[str, Sequence[object]], **roles: str) -> str:
    with pytest.raises(DataError) as raised:
        found(columns, roles)
    text = str(raised.value)
    assert "\n" not in text
    return text


def asked(text: str) -> list[str]:
    """Return the roles that a question names."""
    return re.findall(r"`(\w+)='COLUMN'`", text)


@pytest.mark.parametrize(
    ("user", "item"),
    [
        ("user_id", "item_id"), ("userId", "movieId"), ("UserID", "sku"), ("customer", "product"), ("uid", "iid"),
        ("CUSTOMER_ID", "ARTICLE_ID"), ("user_id:token", "item_id:token"), ("visitorid", "itemid"),
        ("session_id", "parent_asin"), ("用户ID", "商品ID"), ("买家编号", "电影标识"), ("用户", "物品"),
        ("会员", "商品编码"),
    ],
)  # fmt: skip
def test_ids_have_standard_names_in_english_and_chinese(user: str, item: str) -> None:
    roles = found({user: ROWS["user_id"], item: ROWS["item_id"], "timestamp": ROWS["timestamp"]})
    assert (roles.options["user_id"], roles.options["item_id"]) == (user, item)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("timestamp", "time"), ("时间戳", "time"), ("日期", "time"), ("rating", "label"), ("评分", "label"),
        ("is_click", "label"),
        ("点击", "label"), ("weight", "weight"), ("权重", "weight"), ("event_type", "event"), ("行为类型", "event"),
        ("keyword", "query"), ("搜索词", "query"), ("sessionId", "session"), ("user_session", "session"),
        ("会话", "session"),
        ("quantity", ""), ("msno", ""), ("zip", ""), ("postcode", ""), ("rownames", ""), ("source", ""),
        ("home_team", ""),
    ],
)  # fmt: skip
def test_a_name_has_one_role_or_none(name: str, role: str) -> None:
    assert role_of_name(name) == role


def test_names_are_plain_and_titles_are_of_items() -> None:
    assert [plain(name) for name in ("userId", "user_id:token", "用户ID", "Item Name", "用户信息")] == [
        "user_id", "user_id", "user_id", "item_name", "user",
    ]  # fmt: skip
    assert all(map(is_title, ("title", "name", "product_name", "movieTitle", "标题", "商品名称")))
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
    "a user and a query": ({**ROWS, "query": WORDS}, ["user"], "user: 'user_id' or 'query'"),
    "no user": ({"who": ROWS["user_id"], "item": ROWS["item_id"]}, ["user"], "user: no standard name"),
    "no item": ({"user": ROWS["user_id"], "what": ROWS["item_id"]}, ["item"], "item: no standard name"),
    "two items": ({**ROWS, "product": ROWS["item_id"]}, ["item"], "item: 'item_id' or 'product'"),
    "an item of each row": ({**ROWS, "item_id": range(N)}, ["item"], "'item_id' (each row has a value of its own)"),
    "two times": ({**ROWS, "created_at": OTHER["created_at"]}, ["time"], "time: 'timestamp' or 'created_at'"),
    "created and updated": (
        {
            "user": ROWS["user_id"], "item": ROWS["item_id"], "created_at": ROWS["timestamp"],
            "updated_at": OTHER["created_at"],
        },
        ["time"], "time: 'created_at' or 'updated_at'",
    ),
    "numbers like times": (
        {"user": ROWS["user_id"], "item": ROWS["item_id"], "x": ROWS["timestamp"]}, ["time"],
        "time: 'x' (its numbers look like times)",
    ),
    "a time in no form": (
        {**ROWS, "timestamp": [f"quarter {i % 4} of {1990 + i % 30}" for i in range(N)]}, ["time"],
        "time: 'timestamp' (a text that no form reads; schema.time_format gives one)",
    ),
    "two labels": (
        {**ROWS, "rating": STARS, "liked": [i % 3 % 2 for i in range(N)]}, ["label"], "label: 'rating' or 'liked'",
    ),
    "a label and events": (
        {**ROWS, "rating": STARS, "event": EVENTS}, ["label", "event"], "label: 'rating'",
    ),
    "a label in words": ({**ROWS, "rating": WORDS}, ["label"], "`event` reads words"),
    "a rating or a quantity": (
        {**ROWS, "n": STARS}, ["label"], "label: 'n' (a rating, an outcome, or a quantity for `weight`)",
    ),
    "an outcome": ({**ROWS, "won": [i * i % 7 % 2 == 0 for i in range(N)]}, ["label"], "label: 'won'"),
    "two weights": ({**ROWS, "weight": STARS, "weights": STARS[::-1]}, ["weight"], "weight: 'weight' or 'weights'"),
    "all at once": (
        {"a": ROWS["user_id"], "b": ROWS["item_id"], "c": ROWS["timestamp"], "d": STARS},
        ["user", "item", "time", "label"],
        "item: no standard name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUESTIONS)
def test_an_open_role_is_one_question_with_all_that_settles_it(case: str) -> None:
    columns, roles, words = QUESTIONS[case]
    text = question(columns)
    assert asked(text) == roles
    assert words in text
    for name, values in columns.items():
        first = ", ".join(str(v) for v in list(dict.fromkeys(values))[:3])
        assert f"'{name}' ({first[:24]}" in text, "each column with three values"


def test_a_question_says_what_is_taken_and_how_to_say_that_there_is_none() -> None:
    text = question({**ROWS, "created_at": OTHER["created_at"]})
    assert "Taken so far: user = 'user_id', item = 'item_id'. " in text
    assert text.endswith("Name them: `time='COLUMN'`; an empty name, '', if none has it")
    text = question({**ROWS, "customer": OTHER["customer"]})
    assert text.endswith("Name them: `user='COLUMN'` (or `query` or `session`)")


@pytest.mark.parametrize(
    ("role", "name", "columns"),
    [
        ("user", "customer", {**ROWS, "customer": OTHER["customer"]}),
        ("item", "product", {**ROWS, "product": ROWS["item_id"]}),
        ("query", "query", {**ROWS, "query": WORDS}),
        ("session", "x", {"x": ROWS["user_id"], "item_id": ROWS["item_id"]}),
        ("time", "created_at", {**ROWS, "created_at": OTHER["created_at"]}),
        ("label", "liked", {**ROWS, "rating": STARS, "liked": [i % 3 % 2 for i in range(N)]}),
        ("event", "rating", {**ROWS, "rating": EVENTS}),
        ("weight", "n", {**ROWS, "n": STARS}),
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


def test_a_table_tells_which_of_two_columns_is_its_id() -> None:
    two = {**ROWS, "product": ROWS["item_id"]}
    items = pl.DataFrame({"product": range(200, 211), "size": range(11)})
    assert found(two, tables={"items": items}).options["item_id"] == "product"
    unnamed = {"user": ROWS["user_id"], "what": ROWS["item_id"], "city": ["x", "y", "z"] * 20}
    things = pl.DataFrame({"what": range(200, 211), "city": ["x", "y"] * 5 + ["x"]})
    assert found(unnamed, tables={"items": things}).options["item_id"] == "what", "the only key that both have"


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
        (ROWS["timestamp"], "s", ""), ([1000 * t for t in ROWS["timestamp"]], "ms", ""),  # type: ignore[operator]
        ([10**6 * t for t in ROWS["timestamp"]], "us", ""), (list(range(N)), "order", ""),  # type: ignore[operator]
        ([f"2023-01-{1 + i % 28:02} 10:00" for i in range(N)], "s", ""),
        ([f"{13 + i % 9}.03.2021" for i in range(N)], "s", ""),
        ([20230101 + i % 28 for i in range(N)], "s", "%Y%m%d"),
        ([f"{1 + i % 28} Mar 2021" for i in range(N)], "s", "%d %b %Y"),
        ([f"2021年03月{1 + i % 28:02}日" for i in range(N)], "s", "%Y年%m月%d日"),
        ([START if i else 0 for i in range(N)], "s", ""), ([START * 1000 if i else START for i in range(N)], "ms", ""),
    ],
)  # fmt: skip
def test_times_have_a_unit_or_a_format(values: Sequence[object], unit: str, form: str) -> None:
    """A few bad values change neither: a check refuses them with their number."""
    options = found({**ROWS, "timestamp": values}).options
    assert (options.get("time_unit", "s"), options.get("time_format", "")) == (unit, form)


def test_dates_are_times_by_their_type_and_durations_are_none() -> None:
    days = pl.DataFrame({"user": ROWS["user_id"], "item": ROWS["item_id"], "x": ROWS["timestamp"], "watch_time": STARS})
    days = days.with_columns(pl.from_epoch("x"))
    assert find_roles(days, {}, {"label": ""}, {}).options["time"] == "x"
    clicked = {"user": ROWS["user_id"], "item": ROWS["item_id"], "clicked_at": ROWS["timestamp"]}
    assert found(clicked).options["time"] == "clicked_at"


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("view", 1), ("addtocart", 1), ("add_to_cart", 1), ("浏览", 1), ("purchase", 1), ("impression", "ignored"),
        ("show", "ignored"),
        ("skip", "negative"), ("dislike", "negative"), ("remove_from_cart", "negative"), ("refund", "negative"),
        ("no_click", "negative"), ("zap", None), ("not_known", None),
    ],
)  # fmt: skip
def test_events_have_meanings(word: str, rule: object) -> None:
    assert event_rule(word) == rule


def test_events_that_no_list_knows_are_named() -> None:
    roles = found({**ROWS, "event": RNG.choice(["view", "zap", "skip"], N).tolist()})
    assert roles.options["events"] == {"view": 1, "zap": 1, "skip": "negative"}
    assert "No list knows 'zap': their weights are yours to set" in roles.why["events"]


def test_a_weight_of_a_long_tail_is_read_on_the_log_scale() -> None:
    assert found({**ROWS, "weight": [1 + i % 7 for i in range(N)]}).options.get("weight_scale") is None
    assert found({**ROWS, "weight": [1 + i % 7 for i in range(N - 2)] + [900, 999]}).options["weight_scale"] == "log"
    assert "weight" not in found({**ROWS, "weight": [-1.5 + i % 9 / 7 for i in range(N)]}).options


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
    standard = find_roles(RATED, {}, {}, {}).options
    with pytest.raises(DataError) as raised:
        find_roles(frame, {}, {}, {})
    assert {*asked(str(raised.value))} == {FLAGS[name] for name in changed}
    given_ = find_roles(frame, {}, {FLAGS[name]: new for name, new in names.items()}, {}).options
    assert given_ == {key: names.get(str(value), value) for key, value in standard.items()}


def test_flags_lead_to_the_config_of_standard_names() -> None:
    plain_names = suggest(RATED, label="rating", overrides=["train.seed=1"])
    frame = RATED.rename(NONSENSE)
    found_ = suggest(frame, user="kk", item="vv", time="zz", label="ww", overrides=["train.seed=1"])
    text = found_.text
    for name, new in NONSENSE.items():
        text = text.replace(f'"{new}"', f'"{name}"')
    assert tomllib.loads(text) == tomllib.loads(plain_names.text)
    assert (found_.schema.user_id, found_.schema.item_id, found_.schema.time) == ("kk", "vv", "zz")
    users, items, actions = queries()
    words = actions.join(users, on="query_id").select(pl.col("query").alias("kk"), "item_id")
    assert suggest(words, items=items.rename({"title": "tt"}), query="kk", title="tt").schema.title == "tt"
    assert suggest(words, items=items, query="kk").recipe == "words"


MANY = [float(value) for value in range(MAX_STEPS + 1)]


@pytest.mark.parametrize(
    ("values", "above", "why"),
    [
        ([0, 1], 0.0, "two values: 1 is a positive, 0 a negative"), ([4, 5, 4], 4.0, "two values"),
        ([True, False], 0.0, "two values"), ([1, 2, 3, 4, 5], 3.0, "the middle of 1 to 5"),
        ([1, 2, 10], 2.0, "the middle"),
        ([0.5 * half for half in range(1, 11)], 3.0, "the middle of 0.5 to 5, rounded up"),
        ([0.0, 0.5, 1.0], 0.5, "the middle of 0 to 1"), ([-3, 0, 10], 0.0, "what is above 0"),
        ([*MANY, *[4.0] * 30], 4.0, "the median of 21 distinct values from 0 to 20"),
        ([*MANY, *[20.0] * 30], 19.0, "the median of 21 distinct values from 0 to 20, or the second largest"),
        ([None, 1.0, np.nan, 2.0, np.inf], 1.0, "two values: 2 is a positive"),
        ([None, None], 0.0, "it has no two values"),
    ],
)  # fmt: skip
def test_a_threshold_follows_the_values(values: list[float | None], above: float, why: str) -> None:
    found_above, reason = threshold(pl.Series(values))
    assert (found_above, why in reason) == (above, True)


@pytest.mark.parametrize(
    ("rows", "apart"),
    [
        ({-1: 400, 1: 20, 2: 50, 3: 300, 4: 900, 5: 200}, -1.0), ({0: 1500, 1: 20, 2: 50, 3: 300, 4: 900, 5: 200}, 0.0),
        ({0: 1470, 1: 20, 2: 50, 3: 300, 4: 900, 5: 200}, None), ({-1: 80, 1: 20, 2: 50, 3: 300, 4: 900, 5: 250}, -1.0),
        ({-1: 79, 1: 20, 2: 50, 3: 300, 4: 900, 5: 200}, None), ({0: 9000, 1: 900, 2: 300, 3: 90, 4: 30, 5: 10}, None),
        ({1: 9000, 2: 20, 3: 50, 4: 300, 5: 900, 6: 10}, None), ({}, None),
    ],
)  # fmt: skip
def test_a_label_apart_from_a_scale_stands_for_no_rating(rows: dict[float, int], apart: float | None) -> None:
    labels = pl.Series([float(v) for v, n in rows.items() for _ in range(n)], dtype=pl.Float64)
    assert no_rating(labels) == apart


@pytest.mark.parametrize("name", ["Book-Rating", "movie_rating", "user_score", "电影评分"])
def test_a_rating_of_an_item_or_a_user_is_a_label(name: str) -> None:
    assert role_of_name(name) == "label"


def test_a_label_that_is_given_is_in_the_config() -> None:
    assert "label" not in tomllib.loads(suggest(RATED).text)["schema"]  # the recipe takes all rows
    assert tomllib.loads(suggest(RATED, label="rating").text)["schema"]["label"] == "rating"


PAGES: dict[str, Sequence[object]] = {
    "user_id": ROWS["user_id"],
    "event": [f"page{i * 7 % 11}" for i in range(N)],
    "timestamp": ROWS["timestamp"],
}


def test_events_are_the_items_if_no_other_column_has_as_many_values() -> None:
    devices = [f"d{i * i % 4}" for i in range(N)]
    roles = found({**PAGES, "device": devices, "session_id": [i // 2 for i in range(N)]})
    assert (roles.options["item_id"], "event" in roles.options) == ("event", False)
    assert "item: no standard name" in question({**PAGES, "thing": [f"t{i * 5 % 13}" for i in range(N)]})
    assert "item: no standard name" in question({"event": PAGES["event"], "query": WORDS})


def test_an_item_that_is_one_for_each_user_is_put_in_question() -> None:
    assert "each user has one value" in question({**PAGES, "game": [f"t{i % 12 // 3}" for i in range(N)]})


def test_a_standard_name_of_times_comes_before_other_dates() -> None:
    months = [f"2024-0{1 + i * i % 7}" for i in range(N)]
    assert found({**ROWS, "cohort": months}).options["time"] == "timestamp"
    assert "time: 'timestamp' or 'created_at'" in question({**ROWS, "created_at": OTHER["created_at"]})


def test_years_are_the_time_of_a_log_without_another() -> None:
    years = [1990 + i * i % 9 for i in range(N)]
    ids = {name: ROWS[name] for name in ("user_id", "item_id")}
    roles = found({**ids, "yearID": years})
    assert (roles.options["time"], roles.options["time_unit"]) == ("yearID", "order")
    assert found({**ROWS, "year": years}).options["time"] == "timestamp"
    assert "'month' too" in question({**ids, "year": years, "month": [1 + i * i % 12 for i in range(N)]})
    assert "time" not in found({**ids, "year": [i * i % 9 for i in range(N)]}, {"label": ""}).options


def test_few_removals_among_purchases_are_types_of_events() -> None:
    columns = {
        "user_id": [f"u{i % 20}" for i in range(1_000)], "item_id": [f"i{i * 7 % 93}" for i in range(1_000)],
        "event": ["remove_from_cart" if i in (3, 517) else "buy" for i in range(1_000)],
    }  # fmt: skip
    assert found(columns).options["event"] == "event"


def test_a_team_is_the_item_if_no_other_text_or_id_has_as_many_values() -> None:
    teams = {
        "user_id": ROWS["user_id"], "teamID": [f"t{i * 7 % 11}" for i in range(N)],
        "G_all": [i * 5 % 31 for i in range(N)], "yearID": [1950 + i % 31 for i in range(N)],
    }  # fmt: skip
    assert found(teams).options["item_id"] == "teamID"
    for name, values in (("document_id", [i * 5 % 31 for i in range(N)]), ("thing", [f"x{i % 13}" for i in range(N)])):
        assert "item: no standard name" in question({**teams, name: values})
