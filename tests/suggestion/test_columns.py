"""Meaning of the columns of interactions, by names and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

import numpy as np
import polars as pl
import pytest
from suggestion_worlds import START, log

from twotower.config.toml import TomlValue
from twotower.data.tables import check
from twotower.errors import DataError
from twotower.features.schema import Schema
from twotower.suggestion.columns import guess_columns
from twotower.suggestion.guessed_columns import GuessedColumns
from twotower.suggestion.names import names_item, names_time, names_user, plain, rank

N = 40
IDS = {"user_id": [i % 8 for i in range(N)], "item_id": [i % 7 for i in range(N)]}

SECONDS = [START + 100 * i for i in range(N)]


def guessed(**columns: Sequence[object]) -> GuessedColumns:
    return guess_columns(pl.DataFrame({**IDS, **columns}), {}, {})


@pytest.mark.parametrize(
    ("user", "item"),
    [
        ("user_id", "item_id"),
        ("userId", "movieId"),
        ("reviewerID", "asin"),
        ("customer", "product"),
        ("CUSTOMER_ID", "ARTICLE_ID"),
        ("uid", "iid"),
        ("user_id:token", "item_id:token"),
        ("visitorid", "itemid"),
        ("session_id", "parent_asin"),
        ("msno", "song_id"),
        ("wer", "was"),
        ("用户ID", "商品ID"),
        ("买家编号", "电影标识"),
        ("用户ID（脱敏）", "商品ID（脱敏后）"),
        ("客户代码", "商品代码"),
        ("会员卡ID", "商品条码"),
        ("买家账号", "商品货号"),
        ("用户号码", "商品唯一编码"),
    ],
)  # fmt: skip
def test_ids_are_found_by_names_then_by_places(user: str, item: str) -> None:
    frame = log().rename({"user_id": user, "item_id": item}).select("timestamp", user, item)
    found = guess_columns(frame, {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == (user, item)


def test_a_chinese_name_with_a_word_that_is_not_known_is_no_id() -> None:
    found = guessed(用户年龄=[30] * 40, 商品价格=[2.5] * 40, 商品类别=[1] * 40)
    assert (found.options["user_id"], found.options["item_id"]) == ("user_id", "item_id")
    frame = log().rename({"user_id": "用户", "item_id": "商品号"}).with_columns(用户年龄=30, 商品价格=2.5)
    frame = frame.select("用户年龄", "商品价格", "用户", "商品号", "timestamp")
    found = guess_columns(frame, {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == ("用户", "商品号")


@pytest.mark.parametrize("given", [{}, {"time": "timestamp"}])
@pytest.mark.parametrize(
    ("bad", "unit", "words"),
    [
        (
            [0],
            "s",
            "1 of 40 times are not between 1990 and tomorrow in unit 's' (the first, in row 1: 0); 97.5 % look like seconds, 2.5 % like zeros",
        ),
        ([0] * 30, "s", "30 of 40 times"),
        ([-1] * 7, "s", "17.5 % like no unit of time"),
        ([4_102_444_800], "s", "2.5 % like times in the future"),
        ([2023, 2024], "s", "2 of 40 times are not between 1990 and tomorrow in unit 's' (the first, in row 1: 2023)"),
        ([1_000 * s for s in SECONDS[:20]], "s", "50 % look like seconds, 50 % like milliseconds"),
        ([1_000 * s for s in SECONDS[:30]], "ms", "75 % look like milliseconds, 25 % like seconds"),
        ([float("nan"), 0.5], "s", "2 of 40 times are missing or not between"),
        ([None], "s", "1 of 40 times are missing (the first in row 1)"),
    ],
)
def test_fault_G11_a_few_bad_times_are_refused_and_are_no_order(
    bad: list[float | None], unit: str, words: str, given: dict[str, TomlValue]
) -> None:
    frame = pl.DataFrame(IDS).with_columns(timestamp=pl.Series([*bad, *SECONDS[len(bad) :]], strict=False))
    with pytest.raises(DataError) as caught:
        guess_columns(frame, given, {})
    assert str(caught.value).startswith("interactions: time 'timestamp': ")
    assert words in str(caught.value)
    is_whole = all(value is not None and value == value for value in bad)
    assert "set schema.bad_times = 'drop' to leave those rows out, " in str(caught.value)
    assert ("set schema.time_unit = 'order' if the numbers are an order" in str(caught.value)) == is_whole
    found = guess_columns(frame, {**given, "bad_times": "drop"}, {})
    assert (found.options["time"], found.options.get("time_unit", "s"), found.remarks) == ("timestamp", unit, [])
    check(None, None, frame, Schema.model_validate(found.options))
    if is_whole:
        order = guess_columns(frame, {**given, "time_unit": "order"}, {})
        assert (order.options["time"], order.options["time_unit"]) == ("timestamp", "order")
        check(None, None, frame, Schema.model_validate(order.options))


@pytest.mark.parametrize(
    "numbers", [[*range(1, 41)], [0, 0, *range(38)], [i / 7 for i in range(40)], [i * 10**11 for i in range(40)]]
)
def test_numbers_that_order_the_rows_are_an_order(numbers: list[float]) -> None:
    assert guessed(timestamp=numbers).options["time_unit"] == "order"


def test_a_time_with_missing_values_is_looked_at_where_it_would_tell_the_order() -> None:
    few = [None if i == 3 else s for i, s in enumerate(SECONDS)]
    found = guessed(timestamp=[None if i % 4 == 3 else s for i, s in enumerate(SECONDS)])
    assert "time" not in found.options
    assert found.remarks == [
        "'timestamp': 10 of 40 times are missing (the first in row 4) and tells no order; set schema.time=timestamp and schema.bad_times=drop to leave "
        "these rows out, and call suggest again"
    ]
    found = guessed(timestamp=[None if i < 21 else s for i, s in enumerate(SECONDS)])
    assert (found.remarks, found.notes) == ([], ["'timestamp': 21 of 40 values are missing, so it is no time"])
    found = guessed(clicked_at=SECONDS, timestamp=few)
    assert found.options["time"] == "clicked_at"
    assert (found.remarks, found.notes) == ([], ["'timestamp': 1 of 40 times are missing (the first in row 4)"])
    frame = pl.DataFrame(IDS).with_columns(
        bought_at=pl.Series(few), updated_at=pl.Series([None if i % 3 else s for i, s in enumerate(SECONDS)])
    )
    found = guess_columns(frame, {"bad_times": "drop"}, {})
    assert found.options["time"] == "bought_at"


def test_words_among_numbers_make_no_label() -> None:
    ratings = ["NULL" if i % 9 == 0 else str(1 + i % 5) for i in range(N)]
    found = guessed(rating=ratings)
    assert "label" not in found.options
    assert found.notes == [
        "'rating': 5 of 40 values are no numbers ('NULL'), so it is no label; give numbers in their place, or drop the rows"
    ]
    assert "no numbers" not in " ".join(guessed(rating=["good" if i % 3 else "1" for i in range(N)]).notes)


@pytest.mark.parametrize("word", ["NA", "null", " None "])
def test_ids_that_say_none_are_told(word: str) -> None:
    items = [word if i % 10 == 0 else f"i{i % 7}" for i in range(N)]
    found = guess_columns(pl.DataFrame({**IDS, "item_id": items}), {}, {})
    assert found.remarks == [
        f"'item_id': 4 rows have the id {word!r}, which is read as an id like any other; drop these rows if it says that there is none"
    ]
    assert not guess_columns(pl.DataFrame({**IDS, "item_id": [f"i{i % 7}" for i in range(N)]}), {}, {}).remarks


def test_the_item_may_stand_first() -> None:
    found = guess_columns(pl.DataFrame({"movieId": IDS["item_id"], "userId": IDS["user_id"]}), {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == ("userId", "movieId")


def test_a_user_stands_before_a_session() -> None:
    assert guessed(session_id=[i % 20 for i in range(N)]).options["user_id"] == "user_id"


def test_a_shared_column_wins() -> None:
    frame = log().rename({"user_id": "who", "item_id": "what"}).with_columns(member_id=pl.lit(1) + pl.col("who"))
    found = guess_columns(frame, {}, {"user_id": ["who", "city"], "item_id": ["what", "price"]})
    assert (found.options["user_id"], found.options["item_id"]) == ("member_id", "what")
    found = guess_columns(frame.drop("member_id"), {}, {"user_id": ["who"], "item_id": ["what"]})
    assert found.options["user_id"] == "who"


def test_of_shared_columns_one_that_repeats_in_the_rows_and_is_distinct_in_the_table_is_the_id() -> None:
    frame = log().rename({"user_id": "who", "item_id": "what"})
    frame = frame.with_columns(nr=pl.int_range(pl.len()), city=pl.col("who") % 3)
    sides = {"user_id": ["nr", "city", "who"], "item_id": ["nr", "what"]}
    keys = {"user_id": ["nr", "who"], "item_id": ["nr", "what"]}
    found = guess_columns(frame, {}, sides, keys)
    assert (found.options["user_id"], found.options["item_id"]) == ("who", "what")
    assert found.why["item_id"] == "the tables share it"
    found = guess_columns(frame, {}, {"user_id": ["nr"]}, {"user_id": ["nr"]})
    assert found.options["user_id"] == "nr", "the tables share no other"
    assert any("'nr' as the user" in line and "hardly a history" in line for line in found.remarks)
    found = guess_columns(frame, {}, {"user_id": ["who"], "item_id": ["who", "what"]})
    assert (found.options["user_id"], found.options["item_id"]) == ("who", "what"), "no column is both"


def test_no_ids_say_what_to_name() -> None:
    with pytest.raises(DataError, match="no column of user_id and item_id .*schema.user_id=NAME"):
        guess_columns(pl.DataFrame({"price": [1.5, 2.5], "rating": [1, 2]}), {}, {})
    with pytest.raises(DataError, match="no column of item_id is found"):
        guess_columns(pl.DataFrame({"user_id": [1, 1, 2], "at": [START, START + 1, START + 2]}), {}, {})


@pytest.mark.parametrize(
    ("name", "values", "unit"),
    [
        ("timestamp", [START + i for i in range(N)], ""),
        ("ts", [1000 * START + i for i in range(N)], "ms"),
        ("time", [1_000_000 * START + i for i in range(N)], "us"),
        ("clicked_at", [f"2023-01-{1 + i % 28:02d} 12:00:00" for i in range(N)], ""),
        ("date", [datetime(2023, 1, 1 + i % 28) for i in range(N)], ""),
        ("day", [i % 30 for i in range(N)], "order"),
        ("x", [START + i for i in range(N)], ""),
    ],
)
def test_times_and_their_units(name: str, values: list[object], unit: str) -> None:
    found = guessed(**{name: values})
    assert found.options["time"] == name
    assert found.options.get("time_unit", "") == unit


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ([f"2023-01-{1 + i % 28:02d} 12:00:00 UTC" for i in range(N)], "%Y-%m-%d %H:%M:%S UTC"),
        ([f"2023-01-{1 + i % 28:02d}T12:00:00.5 GMT" for i in range(N)], "%Y-%m-%dT%H:%M:%S.%f GMT"),
        ([f"{1 + i % 28:02d}/Jan/2023:12:00:00 +0100" for i in range(N)], "%d/%b/%Y:%H:%M:%S %z"),
        ([f"{1 + i % 28} Jan 2023" for i in range(N)], "%d %b %Y"),
        ([20230101 + i % 28 for i in range(N)], "%Y%m%d"),
        ([f"{1 + i % 28:02d}.01.23 9:{i:02d}" for i in range(N)], "%d.%m.%y %H:%M"),
        ([f"1/{1 + i % 28}/23 8:05:{i:02d}" for i in range(N)], "%m/%d/%y %H:%M:%S"),
        ([f"19-01-{1 + i % 28:02d}" for i in range(N)], "%y-%m-%d"),
        ([f"2023年1月{1 + i % 28}日 9:{i:02d}" for i in range(N)], "%Y年%m月%d日 %H:%M"),
        ([202301011200 + i for i in range(N)], "%Y%m%d%H%M"),
        ([f"2019-{1 + i % 12:02d}" for i in range(N)], "%Y-%m"),
        ([f"{1 + i % 12:02d}/2019" for i in range(N)], "%m/%Y"),
        ([201901 + i % 12 for i in range(N)], "%Y%m"),
    ],
)
def test_times_that_need_a_format(values: list[object], form: str) -> None:
    frame = pl.DataFrame({**IDS, "at": values})
    for given in ({}, {"time": "at"}, {"time_format": form}, {"time": "at", "time_format": form}):
        options = guess_columns(frame, given, {}).options
        assert (options["time"], options["time_format"], options.get("time_unit")) == ("at", form, None)
        check(None, None, frame, Schema.model_validate(options))


def test_text_that_is_no_time_gets_no_unit() -> None:
    frame = pl.DataFrame({**IDS, "at": ["morning", "noon"] * 20})
    assert guess_columns(frame, {"time": "at"}, {}).options.get("time_unit") is None


def test_what_is_no_time_is_told() -> None:
    assert "time" not in guessed(time=["morning", "noon"] * 20).options
    found = guessed(time=[START, None] * 20)
    assert "time" not in found.options
    assert found.remarks[0].startswith("'time': 20 of 40 times are missing")


def of_places(first: int, column: str = "position", time: bool = False) -> pl.DataFrame:
    """Users of two to seven rows, of which a column numbers the rows of each, the latest first in the table."""
    rows = [(u, (7 * u + 3 * i) % 11, first + i, START + i) for u in range(8) for i in reversed(range(2 + u % 6))]
    frame = pl.DataFrame(rows, schema=["wer", "was", column, "seen_at"], orient="row")
    return frame if time else frame.drop("seen_at")


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_of_the_rows_of_each_user_are_an_order(first: int) -> None:
    found = guess_columns(of_places(first), {"user_id": "wer", "item_id": "was"}, {})
    assert (found.options["time"], found.options["time_unit"]) == ("position", "order")
    assert found.why["time"] == f"it numbers the rows of each user from {first} on, which is read as oldest first"
    assert not [note for note in found.notes if "position" in note]


def test_numbers_of_the_rows_of_each_user_are_no_item_and_no_label() -> None:
    found = guess_columns(of_places(0).select("wer", "position", "was"), {}, {})
    assert (found.options["item_id"], found.options["time"]) == ("was", "position")
    assert "time" not in guess_columns(of_places(1, "score"), {"user_id": "wer", "item_id": "was"}, {}).options
    assert guess_columns(of_places(1, time=True), {"user_id": "wer"}, {}).options["time"] == "seen_at"


@pytest.mark.parametrize(
    "change",
    [
        pl.col("position") * 2,  # gaps
        pl.col("position").clip(0, 3),  # repeats
        pl.col("position") + pl.col("wer") % 2,  # two first numbers
        pl.col("position") + 0.5,
        pl.when(pl.col("position") > 5).then(None).otherwise("position"),
    ],
)
def test_other_numbers_are_no_order(change: pl.Expr) -> None:
    frame = of_places(0).with_columns(position=change)
    assert "time" not in guess_columns(frame, {"user_id": "wer", "item_id": "was"}, {}).options
    few = of_places(0).filter(pl.col("wer") < 5)
    assert "time" not in guess_columns(few, {"user_id": "wer", "item_id": "was"}, {}).options, "by chance"


@pytest.mark.parametrize("dropped", [0, 3], ids=["complete", "with users who end early"])
@pytest.mark.parametrize("columns", [("student", "question", "answer"), ("a", "b", "c")])
def test_answers_to_the_same_questions_are_of_items(columns: tuple[str, ...], dropped: int) -> None:
    rows = [(u, q, (q * 7 + u % 3) % 4) for u in range(20) for q in range(1, 13 - u % (dropped + 1))]
    found = guess_columns(pl.DataFrame(rows, schema=list(columns), orient="row"), {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == columns[:2]
    assert "time" not in found.options


@pytest.mark.parametrize("name", ["won", "bought", "preferred", "chosen", "x"])
@pytest.mark.parametrize("single", [1, 3], ids=["pairs", "pairs and single rows"])
def test_one_of_two_is_an_outcome_and_no_order(name: str, single: int) -> None:
    rows = [(u, (7 * u + 3 * i) % 31, i) for u in range(60) for i in range(2) if u % 3 < single or i == 0]
    found = guess_columns(pl.DataFrame(rows, schema=["user_id", "item_id", name], orient="row"), {}, {})
    assert "time" not in found.options
    assert [note for note in found.notes if note.startswith(f"'{name}'")] == [
        f"'{name}' looks like a label; set schema.label={name}"
    ]


def test_numbers_of_rows_that_are_not_read_are_told() -> None:
    frame = of_places(0).with_columns(liked=pl.int_range(pl.len()) % 2)
    found = guess_columns(frame, {"user_id": "wer", "item_id": "was", "time": ""}, {})
    assert found.notes == [
        "'position' numbers the rows of each user; schema.time=position would read an order, the oldest first, a feature with "
        "side = 'context' what is known before"
    ]


def test_dates_whose_year_has_two_digits_need_one_order() -> None:
    dates = ["01.02.03", "03.04.05"] * 20
    with pytest.raises(
        DataError, match=r"in one of 3 orders.*set schema\.time_format = '%d\.%m\.%y' or '%m\.%d\.%y' or"
    ):
        guessed(date=dates)
    assert (
        guess_columns(pl.DataFrame({**IDS, "date": dates}), {"time": "date", "time_format": "%d.%m.%y"}, {}).options[
            "time"
        ]
        == "date"
    )
    assert guessed(date=["05.05.05", "06.06.06"] * 20).options["time_format"] == "%d.%m.%y"
    with pytest.raises(DataError, match="in one of 3 orders"):
        guess_columns(pl.DataFrame({**IDS, "v": dates}), {"time": "v"}, {})


def test_versions_and_codes_that_would_fit_several_orders_are_no_dates() -> None:
    version = ["4.3.2", "4.3.10", "5.1.1", "5.2.3"] * 10
    found = guessed(version=version, epoch=[1_700_000_000 + i for i in range(N)])
    assert found.options["time"] == "epoch"
    assert "version" not in found.named
    assert "time" not in guessed(version=version).options
    assert guessed(date=["01.02.03", "03.04.05"] * 20, time=[*range(N)]).options["time"] == "time"
    assert not guessed(version=[None, *version[1:]]).remarks
    codes = pl.DataFrame({"user_id": IDS["user_id"], "shelf": ["01-02-03", "02-02-03", "03-04-05", "03-04-06"] * 10})
    assert guess_columns(codes, {}, {}).options["item_id"] == "shelf"


def test_an_id_that_begins_like_a_date_is_an_id() -> None:
    users = [20120304] * (N // 2) + [87654321, 12345678] * (N // 4)
    found = guess_columns(pl.DataFrame({"kunde": users, "ware": IDS["item_id"]}), {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == ("kunde", "ware")


@pytest.mark.parametrize("day", ["{:02d}.01.23", "{:02d}.01.2023", "202301{:02d}"])
def test_dates_are_no_ids(day: str) -> None:
    dates: list[object] = [day.format(1 + i % 28) for i in range(N)]
    dates = [*map(int, map(str, dates))] if "." not in day else dates
    found = guess_columns(pl.DataFrame({"Datum": dates, "Artikel": IDS["item_id"], "Kunde": IDS["user_id"]}), {}, {})
    assert (found.options["user_id"], found.options["item_id"]) == ("Artikel", "Kunde")
    assert found.remarks == [
        "'Artikel' as the user and 'Kunde' as the item: by the place alone, because no name of a column tells it; overrides "
        "such as schema.user_id=NAME and schema.item_id=NAME would correct it"
    ]


def test_an_id_is_no_guess_where_no_other_column_is_left() -> None:
    frame = pl.DataFrame({"customer": IDS["user_id"], "was": IDS["item_id"]})
    assert guess_columns(frame, {}, {}).remarks == []
    (remark,) = guess_columns(frame.with_columns(price=pl.Series([0.5, 1.5] * 20)), {}, {}).remarks
    assert remark.startswith(
        "'was' as the item: by the place alone, because no name of a column tells it; no other column may be one; an"
    )
    (remark,) = guess_columns(frame.with_columns(wo=pl.Series(["x", "y"] * 20)), {}, {}).remarks
    assert remark.startswith("'was' as the item: by the place alone")
    assert remark.endswith("an override such as schema.item_id=NAME would correct it")


def test_numbers_of_a_scale_may_be_ratings() -> None:
    told = "'Bewertung' has 9 steps from 0.5 to 4.5; schema.label=Bewertung would read ratings"
    assert told in guessed(Bewertung=[i % 9 / 2 + 0.5 for i in range(N)]).notes
    for values in (
        [i % 4 for i in range(N)],
        [i % 7 for i in range(N)],
        [i % 9 / 3 for i in range(N)],
    ):  # few, of items, no steps
        assert not any("steps" in note for note in guessed(x=values).notes)
    assert not any(
        "steps" in note for note in guessed(x=[i % 9 for i in range(N)], rating=[i % 5 for i in range(N)]).notes
    )


def test_numbers_beside_events_are_no_ratings() -> None:
    events = ["view", "buy"] * (N // 2)
    assert not any("steps" in note for note in guessed(event=events, weekday=[i % 9 for i in range(N)]).notes)


def test_days_and_months_in_either_order_are_refused() -> None:
    with pytest.raises(DataError, match=r"either order.*set schema\.time_format"):
        guessed(date=["01/02/2023", "03/04/2023"] * 20)
    found = guess_columns(
        pl.DataFrame({**IDS, "date": ["01/02/2023", "03/04/2023"] * 20}),
        {"time": "date", "time_format": "%d/%m/%Y"},
        {},
    )
    assert found.options["time"] == "date"


@pytest.mark.parametrize(
    ("values", "above"),
    [
        ([0, 1], 0),
        ([-1, 1], -1),
        ([-1, 0, 1], 0),
        ([-10.0, -2.5, 8.0, 3.0], 0),
        ([-3, -2, -1], -2),
        ([1, 2, 3, 4, 5], 3),
        ([0.5, 3.0, 4.5, 5.0], 3),
        ([1, 5, 10, 7], 6),
        ([0.0, 0.25, 0.5, 1.0], 0.5),
        ([False, True], 0),
    ],
)
def test_labels_and_the_middle_of_their_scale(values: list[object], above: float) -> None:
    found = guessed(rating=[values[i % len(values)] for i in range(N)])
    assert (found.options["label"], found.options["positive_above"]) == ("rating", above)


@pytest.mark.parametrize("values", [[1] * N, [1, None] * 20, ["good", "bad"] * 20])
def test_what_tells_nothing_is_no_label(values: list[object]) -> None:
    assert "label" not in guessed(rating=values).options


def test_events_have_meanings() -> None:
    found = guessed(event_type=[["view", "buy", "impression", "dislike"][i % 4] for i in range(N)])
    assert found.options["event"] == "event_type"
    assert found.options["events"] == {"view": 1, "buy": 1, "impression": "ignored", "dislike": "negative"}
    assert "view 10" in found.why["events"]
    assert "event" not in guessed(event_type=[f"t{i % 21}" for i in range(N)]).options
    assert "event" not in guessed(event_type=["click"] * N).options


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        *((word, "negative") for word in ("return", "Refund", "cancelled", "downvote", "unsubscribe", "unfollow", "report", "removeFromCart", "remove_from_wishlist", "order_canceled")),
        *((word, "ignored") for word in ("impression", "ad_shown")),
        *((word, 1) for word in ("addtocart", "upvote", "videoPlay")),
    ],
)  # fmt: skip
def test_events_by_their_words(word: str, rule: object) -> None:
    found = guessed(event=[["view", word][i % 2] for i in range(N)])
    assert found.options["events"] == {"view": 1, word: rule}
    assert "yours to set" not in found.why["events"]


def test_events_that_no_list_knows_are_named() -> None:
    found = guessed(event=[["view", "frob", "7"][i % 3] for i in range(N)])
    assert found.options["events"] == {"view": 1, "frob": 1, "7": 1}
    assert "No list knows '7', 'frob'" in found.why["events"] or "No list knows 'frob', '7'" in found.why["events"]
    assert "weights of these are yours to set" in found.why["events"]


def test_a_label_in_words_says_how_it_is_read() -> None:
    words = ["yea", "nay", "absent", "present", "paired"]
    for n_words, told in ((2, False), (3, True), (5, True)):
        drawn = np.random.default_rng(0).integers(n_words, size=len(log()))
        votes = log().with_columns(vote=pl.Series([words[i] for i in drawn]))
        found = guess_columns(votes, {}, {})
        assert not found.options.get("label")
        assert any("'vote' is a label in words" in note for note in found.notes) == told
    (note,) = (note for note in found.notes if "in words" in note)
    assert note.startswith(
        "'vote' is a label in words ('absent', 'nay', 'paired', 'present', …), which is not read; schema.event=vote"
    )
    of_items = log().with_columns(vote=pl.format("w{}", pl.col("item_id").hash() % 4))
    many = log().with_columns(vote=pl.format("w{}", pl.int_range(pl.len()) % 21))
    for other in (of_items, many):
        assert not any("in words" in note for note in guess_columns(other, {}, {}).notes)


def test_a_label_of_numbers_that_are_text_says_what_to_do() -> None:
    rated = log().with_columns(rating=(pl.int_range(pl.len()) % 5 + 1).cast(pl.String))
    found = guess_columns(rated, {}, {})
    assert "'rating': its numbers are text; make them numbers for a label" in found.notes
    assert not any("in words" in note for note in found.notes)


def test_a_label_stands_before_events_that_all_weigh_1() -> None:
    kinds = [["movie", "series", "short"][i % 3] for i in range(N)]
    clicked = [int(i % 4 == 0) for i in range(N)]
    found = guessed(type=kinds, clicked=clicked)
    assert (found.options["label"], "event" in found.options) == ("clicked", False)
    assert "'type': all its types weigh 1, and 'clicked' is a label" in found.notes
    assert guessed(event=["view", "dislike"] * 20, clicked=clicked).options["event"] == "event"
    assert guessed(type=kinds).options["event"] == "type"


EARLIER, BORN = [START + 99 * i for i in range(N)], [START - 86400 * (i % 7) for i in range(N)]


@pytest.mark.parametrize(
    ("columns", "option", "name", "rival"),
    [
        ({"shipping_time": EARLIER, "timestamp": SECONDS}, "time", "timestamp", "shipping_time"),
        ({"day": [i % 30 for i in range(N)], "clicked_at": SECONDS}, "time", "clicked_at", "day"),
        ({"avg_rating": [i % 4 for i in range(N)], "rating": [i % 3 for i in range(N)]}, "label", "rating", "avg_rating"),
        ({"session_id": [i % 9 for i in range(N)]}, "user_id", "user_id", "session_id"),
        ({"offer_no": [i % 9 for i in range(N)]}, "item_id", "item_id", "offer_no"),
    ],
)  # fmt: skip
def test_names_that_are_known_as_a_whole_stand_first(
    columns: dict[str, list[object]], option: str, name: str, rival: str
) -> None:
    found = guess_columns(pl.DataFrame({**columns, **IDS}), {}, {})
    what = {"time": "a time", "label": "a label", "event": "an event", "user_id": "a user", "item_id": "an item"}[
        option
    ]
    assert found.options[option] == name
    assert any(note.startswith(f"'{rival}' also looks like {what};") for note in found.notes)
    assert f"{rival} also looks like {what}" in found.why[option]


def test_a_column_of_items_is_no_time_label_or_event() -> None:
    found = guessed(
        release_date=BORN, rating=[i % 7 for i in range(N)], type=[["film", "short"][i % 7 % 2] for i in range(N)], played_at=SECONDS
    )  # fmt: skip
    assert (found.options["time"], "label" in found.options, "event" in found.options) == ("played_at", False, False)
    for name, what in (("release_date", "time"), ("rating", "label"), ("type", "event")):
        assert f"'{name}': each item has one value, so it tells of items, and is no {what}" in found.notes
    once = pl.DataFrame({"user_id": IDS["user_id"], "item_id": range(N), "timestamp": SECONDS})
    assert guess_columns(once, {}, {}).options["time"] == "timestamp"  # no item repeats


@pytest.mark.parametrize(("distinct", "item"), [(1.0, "product_code"), (0.95, "product_code"), (0.9, "item_id")])
def test_a_column_of_rows_is_no_item(distinct: float, item: str) -> None:
    rows = [min(i, round(distinct * N) - 1) for i in range(N)]
    columns = {"item_id": rows, "user_id": IDS["user_id"], "product_code": IDS["item_id"]}
    assert guess_columns(pl.DataFrame(columns), {}, {}).options["item_id"] == item
    del columns["product_code"]
    assert guess_columns(pl.DataFrame(columns), {}, {}).options["item_id"] == "item_id"


@pytest.mark.parametrize(
    ("name", "values", "ways"),
    [
        ("purchased", [1.5, 2.5], "schema.label=purchased"),
        ("x", [0, 1], "schema.label=x"),
        ("x", [False, True], "schema.label=x"),
        ("x", ["like", "dislike"], "schema.event=x, and schema.events: 'negative' for one of 'dislike' and 'like'"),
        ("x", ["No", "Yes"], "schema.event=x"),
    ],
)
def test_outcomes_are_told(name: str, values: list[object], ways: str) -> None:
    notes = guessed(**{name: [values[i % 3 % 2] for i in range(N)]}).notes
    assert [note for note in notes if note.startswith(f"'{name}' looks like a label; set {ways}")]


def test_an_outcome_with_missing_values_is_told_with_them() -> None:
    (note,) = [n for n in guessed(accepted=[None if i % 4 else i % 3 % 2 for i in range(N)]).notes if "looks like" in n]
    assert note.startswith(f"'accepted' looks like a label, but {3 * N // 4:,} of {N:,} values are missing; fill them")
    assert note.endswith("and set schema.label=accepted")


def test_decimal_commas_are_told() -> None:
    found = guessed(rating=[["1,5", "2,0", "4,5"][i % 3] for i in range(N)])
    assert found.notes == ["'rating': numbers with decimal commas are text; write them with points for a label"]
    assert not any("decimal" in note for note in guessed(rating=["good", "1,5"] * 20).notes)
    assert not any("decimal" in note for note in guessed(rating=["07", "08"] * 20).notes)


def test_spaces_around_numbers_are_told() -> None:
    told = "'rating': numbers with spaces around them are text; remove the spaces for a label"
    assert told in guessed(rating=[[" 1.5", "2.0", " 4"][i % 3] for i in range(N)]).notes
    assert told not in guessed(rating=[["07", "08"][i % 2] for i in range(N)]).notes
    assert told not in guessed(rating=[[" good", "1.5"][i % 2] for i in range(N)]).notes


@pytest.mark.parametrize("name", ["plays", "listen_count", "hours", "quantity", "total_hours"])
def test_numbers_that_may_weigh_rows_are_told(name: str) -> None:
    told = f"'{name}' may tell how much a row counts; schema.weight={name} would weigh rows by it"
    values = [i % 9 for i in range(N)]
    assert told in guessed(**{name: values}).notes
    others: list[Sequence[object]] = [
        [i % 8 for i in range(N)], [i % 7 for i in range(N)], [i % 2 for i in range(N)], [-1, *values[1:]], [None, *values[1:]]
    ]  # fmt: skip  # of users, of items, of two values, below 0, with a gap
    assert not any(told in guessed(**{name: column}).notes for column in others)
    assert told not in guessed(**{name: values, "weight": values}).notes


@pytest.mark.parametrize("values", [["ios", "web"], [0, 2], [0, 1, 2]])
def test_other_columns_are_no_outcomes(values: list[object]) -> None:
    notes = guessed(x=[values[i % len(values)] for i in range(N)]).notes
    assert notes == []
    assert not any(
        "label" in note for note in guessed(x=[i % 8 % 2 for i in range(N)]).notes
    )  # one value for each user


@pytest.mark.parametrize(("largest", "scale"), [(9, None), (10, "log"), (99_000, "log")])
def test_weights_of_a_long_tail_are_read_on_the_log_scale(largest: int, scale: str | None) -> None:
    plays = [0, 1, *[10] * (N - 4), 10 * largest, 10 * largest]
    found = guessed(weight=plays)
    assert (found.options["weight"], found.options.get("weight_scale")) == ("weight", scale)
    frame = pl.DataFrame({**IDS, "weight": plays})
    assert guess_columns(frame, {"weight": "weight"}, {}).options.get("weight_scale") == scale
    assert guess_columns(frame, {"weight_scale": "linear"}, {}).options["weight_scale"] == "linear"
    assert "weight_scale" not in guess_columns(frame, {"weight": ""}, {}).options
    assert "weight_scale" not in guessed(weight=[0] * N).options


def test_a_weight_is_not_negative() -> None:
    assert guessed(weight=[i % 3 for i in range(N)]).options["weight"] == "weight"
    assert "weight" not in guessed(weight=[i % 3 - 1 for i in range(N)]).options


def test_given_options_are_not_guessed() -> None:
    frame = pl.DataFrame({**IDS, "rating": [i % 5 for i in range(N)], "timestamp": [START + i for i in range(N)]})
    found = guess_columns(frame, {"label": "", "time": "", "user_id": "item_id", "item_id": "user_id"}, {})
    assert found.options == {"label": "", "time": "", "user_id": "item_id", "item_id": "user_id"}
    assert guess_columns(frame, {"label": "rating", "positive_above": 1}, {}).options["positive_above"] == 1


def test_names_are_plain() -> None:
    assert [plain(n) for n in ("userId", "User ID", "user_id:token", "reviewerID")] == ["user_id"] * 3 + ["reviewer_id"]
    assert names_user("customer_number")
    assert names_item("Product Code")
    assert not names_item("price")
    assert names_time("created_at")
    assert not names_user("used")


KNOWN: dict[str, tuple[Mapping[str, Sequence[object]], dict[str, object]]] = {
    "movielens": (
        {"userId": IDS["user_id"], "movieId": IDS["item_id"], "rating": [0.5 * (1 + i % 10) for i in range(N)], "timestamp": SECONDS},
        {"user_id": "userId", "item_id": "movieId", "label": "rating", "positive_above": 3, "time": "timestamp"},
    ),
    "amazon reviews": (
        {"reviewerID": ["A" + str(i) for i in IDS["user_id"]], "asin": [f"B0{i}" for i in IDS["item_id"]], "overall": [1.0 + i % 5 for i in range(N)], "unixReviewTime": SECONDS},
        {"user_id": "reviewerID", "item_id": "asin", "label": "overall", "positive_above": 3, "time": "unixReviewTime"},
    ),
    "amazon 2023": (
        {"user_id": IDS["user_id"], "parent_asin": [f"B0{i}" for i in IDS["item_id"]], "rating": [1.0 + i % 5 for i in range(N)], "timestamp": [1000 * s for s in SECONDS]},
        {"user_id": "user_id", "item_id": "parent_asin", "label": "rating", "positive_above": 3, "time": "timestamp", "time_unit": "ms"},
    ),
    "retail rocket": (
        {"timestamp": [1000 * s for s in SECONDS], "visitorid": IDS["user_id"], "event": ["view", "addtocart", "transaction", "view"] * 10, "itemid": IDS["item_id"], "transactionid": [None, 1, 2, None] * 10},
        {"user_id": "visitorid", "item_id": "itemid", "event": "event", "events": {"view": 1, "addtocart": 1, "transaction": 1}, "time": "timestamp", "time_unit": "ms"},
    ),
    "yelp": (
        {"review_id": [f"r{i}" for i in range(N)], "user_id": IDS["user_id"], "business_id": IDS["item_id"], "stars": [1.0 + i % 5 for i in range(N)], "date": [f"2019-03-{1 + i % 28:02d} 10:00:00" for i in range(N)]},
        {"user_id": "user_id", "item_id": "business_id", "label": "stars", "positive_above": 3, "time": "date"},
    ),
    "shop": (
        {"t_dat": [f"2019-03-{1 + i % 28:02d}" for i in range(N)], "customer_id": IDS["user_id"], "article_id": IDS["item_id"], "price": [0.01 * i for i in range(N)], "sales_channel_id": [1, 2] * 20},
        {"user_id": "customer_id", "item_id": "article_id", "time": "t_dat"},
    ),
    "invoices": (
        {"InvoiceNo": [i // 3 for i in range(N)], "StockCode": [f"S{i}" for i in IDS["item_id"]], "Quantity": [1 + i % 4 for i in range(N)], "InvoiceDate": [f"2010-12-{1 + i % 28:02d} 08:26:00" for i in range(N)], "UnitPrice": [2.5] * N, "CustomerID": IDS["user_id"]},
        {"user_id": "CustomerID", "item_id": "StockCode", "time": "InvoiceDate"},
    ),
    "listening": (
        {"userID": IDS["user_id"], "artistID": IDS["item_id"], "weight": [1 + i % 9 for i in range(N)]},
        {"user_id": "userID", "item_id": "artistID", "weight": "weight"},
    ),
    "taobao": (
        {"user_id": IDS["user_id"], "item_id": IDS["item_id"], "category_id": IDS["item_id"], "behavior_type": ["pv", "buy", "cart", "fav"] * 10, "timestamp": SECONDS},
        {"user_id": "user_id", "item_id": "item_id", "event": "behavior_type", "events": {"pv": 1, "buy": 1, "cart": 1, "fav": 1}, "time": "timestamp"},
    ),
    "impressions": (
        {"user": IDS["user_id"], "ad": IDS["item_id"], "clicked": [0, 0, 0, 1] * 10, "hour": [i % 24 for i in range(N)]},
        {"user_id": "user", "item_id": "ad", "label": "clicked", "positive_above": 0},
    ),
    "check-ins": (
        {"user": IDS["user_id"], "check-in time": [f"2010-10-{1 + i % 28:02d}T23:55:27Z" for i in range(N)], "latitude": [0.1 * i for i in range(N)], "longitude": [0.2 * i for i in range(N)], "location id": IDS["item_id"]},
        {"user_id": "user", "item_id": "location id", "time": "check-in time"},
    ),
}  # fmt: skip
"""Columns of known kinds of logs, and the options that they decide."""


@pytest.mark.parametrize("name", KNOWN)
def test_known_logs(name: str) -> None:
    columns, expected = KNOWN[name]
    assert guess_columns(pl.DataFrame(columns, strict=False), {}, {}).options == expected


def test_what_stands_at_a_place_is_the_item_and_not_the_place() -> None:
    ranks = {name: rank(name, "item_id") for name in ("restaurant_id", "hotel", "place", "location", "venue_id")}
    assert max(ranks[name] for name in ("restaurant_id", "hotel")) < min(
        ranks[n] for n in ("place", "location", "venue_id")
    )


# ---- what columns do not tell


@pytest.mark.parametrize(
    "name",
    [
        "dislike",
        "is_hate",
        "skip_2",
        "skipped",
        "returned",
        "nonclk",
        "thumbs_down",
        "non_click",
        "not_like",
        "is_not_click",
        "dislike_score",
    ],
)
def test_what_users_refused_is_no_label(name: str) -> None:
    outcomes = [int(i % 11 == 0) for i in range(N)]
    found = guessed(**{name: outcomes})
    assert "label" not in found.options
    assert any(note.startswith(f"'{name}' tells by its name what users refused") for note in found.notes)
    frame = pl.DataFrame({**IDS, name: outcomes})
    (remark,) = guess_columns(frame, {"label": name}, {}).remarks
    assert remark.startswith(f"'{name}' as the label: by its name a row above 0 is what users refused")


@pytest.mark.parametrize("name", ["not_skipped", "watched", "finished"])
def test_what_users_did_not_refuse_may_be_a_label(name: str) -> None:
    found = guessed(**{name: [int(i % 11 == 0) for i in range(N)]})
    assert any(note == f"'{name}' looks like a label; set schema.label={name}" for note in found.notes)


def test_names_that_only_begin_like_refusals_are_none() -> None:
    for name in ("no_of_nights", "non_member", "hidden_gem", "return_visit", "is_not_skipped", "no"):
        found = guessed(**{name: [1 + int(i % 11 == 0) for i in range(N)]})
        assert not any("refused" in note for note in found.notes)


@pytest.mark.parametrize("none", ["\\N", "anonymous", "Guest", "<null>"])
def test_words_for_no_user_are_looked_at(none: str) -> None:
    frame = pl.DataFrame(
        {"user_id": [none if i % 8 == 0 else f"u{i % 19}" for i in range(N)], "item_id": IDS["item_id"]}
    )
    assert guess_columns(frame, {}, {}).remarks[0].startswith(f"'user_id': 5 rows have the id {none!r}")


@pytest.mark.parametrize("none", [0, -1])
def test_a_user_of_very_many_rows_is_looked_at(none: int) -> None:
    users = [none] * 40 + [1 + i % 90 for i in range(360)]
    frame = pl.DataFrame({"user_id": users, "item_id": [i % 50 for i in range(400)]})
    (remark,) = guess_columns(frame, {}, {}).remarks
    assert remark == (
        f"'user_id': 40 rows are of the one user {none}, and the next has 4; drop these rows if it stands for users who are not known"
    )
    less = frame.filter(pl.int_range(pl.len()) >= 1)
    assert not guess_columns(less, {}, {}).remarks
    told = guess_columns(frame.rename({"user_id": "n", "item_id": "m"}), {"user_id": "n"}, {}).remarks
    assert any("rows are of the one user" in line for line in told)


def test_rows_that_were_only_shown_are_looked_at_where_they_are_most_or_may_be_views() -> None:
    found = guessed(event=["impression"] * 21 + ["click"] * 19)
    assert found.options["events"] == {"impression": "ignored", "click": 1}
    assert found.remarks == [
        "'event': rows that were only shown are ignored (impression 21); schema.events gives them a weight if users chose them"
    ]
    assert guessed(event=["impression"] * 20 + ["click"] * 20).remarks == []
    assert guessed(action=["show"] * 5 + ["buy"] * 35).remarks[0].startswith("'action': rows that were only shown")
    for shown in ("show_item", "display_ad", "exposure_feed", "shown_in_list"):
        kinds = guessed(action=[shown] * 5 + ["click_item"] * 35).options["events"]
        assert kinds == {shown: "ignored", "click_item": 1}
    for refused in ("not_interested", "never_watched", "not_liked"):
        assert guessed(action=[refused] * 5 + ["buy"] * 35).options["events"] == {refused: "negative", "buy": 1}
    assert guessed(action=["no_click"] * 5 + ["buy"] * 35).options["events"] == {"no_click": "negative", "buy": 1}
    assert guessed(action=["show_phone"] * 5 + ["buy"] * 35).options["events"] == {"buy": 1, "show_phone": 1}


def test_numbers_of_users_are_no_labels_and_those_of_items_no_weights() -> None:
    n = 500
    users = [i % 50 for i in range(n)]
    items = [i * 7 % 60 for i in range(n)]
    frame = pl.DataFrame({
        "user_id": users, "item_id": items, "credit_score": [300 + 7 * u for u in users], "weight": [100 + 3 * i for i in items],
    })  # fmt: skip
    found = guess_columns(frame, {}, {})
    assert not {"label", "weight"} & {*found.options}
    assert "'credit_score': each user has one value, so it tells of users, and is no label" in found.notes
    assert "'weight': each item has one value, so it tells of items, and is no weight" in found.notes
    found = guess_columns(frame.with_columns(credit_score=pl.Series([i * 37 % 101 for i in range(n)])), {}, {})
    assert found.options["label"] == "credit_score"
    assert found.remarks[0].startswith("'credit_score' as the label: 101 values, those above 50 are positives")


def test_numbers_bought_below_0_are_looked_at() -> None:
    found = guessed(Quantity=[-1 if i < 3 else 2 for i in range(N)])
    assert found.remarks == [
        "'Quantity': 3 of 40 values are below 0, as of returns, and these rows count as taken; drop them, or give a label"
    ]
    for other in ({"Quantity": [2] * N}, {"quantity": [True, False] * (N // 2)}):
        assert guessed(**other).remarks == []
    assert guessed(Quantity=[-1] * N, label=[int(i % 11 == 0) for i in range(N)]).remarks == []
    assert guessed(Quantity=[-1] * N, event=["buy", "refund"] * (N // 2)).remarks == []


def test_a_post_code_is_no_item() -> None:
    frame = pl.DataFrame({"user_id": IDS["user_id"], "postcode": [i % 7 for i in range(N)], "ware": IDS["item_id"]})
    assert guess_columns(frame, {}, {}).options["item_id"] == "ware"
