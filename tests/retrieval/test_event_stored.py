"""Recent events that the log of a bundle holds count once, and those that it lacks are never lost."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from twotower.arrays.types import ItemRow, UserRow
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.features.schema import Schema
from twotower.retrieval.event import NO_TIME, Event, ReadEvent, StoredEvents

Row = tuple[str, int, bool, str]
"""Item, seconds since 1970, label, and part of an interaction."""
BEGIN = 1_700_000_000
ITEMS = "abc"
OTHERS: list[tuple[str, Row]] = [
    *(("other", (item, BEGIN + 7 * n, True, "train")) for n, item in enumerate(ITEMS * 3)),
    *(("other", (item, BEGIN + 11 * n, True, "test")) for n, item in enumerate(ITEMS)),
]


def dataset(rows: list[Row], duplicates: str = "keep", **options: Any) -> Dataset:
    """A log of user "u" beside some of another user, all parts as their rows say."""
    every = [("u", row) for row in rows] + OTHERS
    if duplicates != "keep":
        every = [("u", row) for row in rows] + OTHERS[:3] + [("third", ("a", BEGIN + 9, True, "test"))]
    log = pl.DataFrame(
        [(user, *row) for user, row in every], ["user_id", "item_id", "at", "liked", "part"], orient="row"
    ).with_columns(liked=pl.col("liked").cast(pl.Int8))
    schema = Schema.model_validate(
        {"time": "at", "label": "liked", "duplicates": duplicates, "features": [
            {"kind": "categorical", "name": "user_id", "side": "user"},
            {"kind": "categorical", "name": "item_id", "side": "item"},
        ]} | options
    )  # fmt: skip
    split = SplitConfig(kind="column", column="part", ordered=True)
    return build_dataset(check(None, None, log, schema), schema, split)


def missing(data: Dataset, events: list[Event]) -> list[Event]:
    items = data.items.ids.to_list()
    read = [
        ReadEvent(
            e.item, ItemRow(items.index(e.item) if e.item in items else -1), e.liked, place,
            NO_TIME if e.time is None else round(e.time * 1e6), True,
        )
        for place, e in enumerate(events)
    ]  # fmt: skip
    found = StoredEvents(data).missing(UserRow(data.users.ids.to_list().index("u")), read)
    return [events[event.code] for event in found]


def at(item: str, seconds: float, liked: bool = True) -> Event:
    return Event(item, liked, time=BEGIN + float(seconds))


did = st.lists(st.tuples(st.sampled_from(ITEMS), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=8)


@examples(deadline=None, max_examples=60)
@given(did)
def test_what_the_log_lacks_is_missing_and_nothing_else(things: list[tuple[str, bool, bool, bool]]) -> None:
    """Each thing that somebody does is in the log, is remembered, both or neither."""
    told = [
        (Event(item, liked, time=BEGIN + 1_003.0 * n), kept, heard)
        for n, (item, liked, kept, heard) in enumerate(things, 1)
    ]
    log: list[Row] = [(e.item, int(e.time or 0), e.liked, "train") for e, kept, _ in told if kept]
    data = dataset([*log, ("c", BEGIN - 5_001, True, "train")])
    remembered = [e for e, _, heard in told if heard]
    assert missing(data, remembered) == [e for e, kept, heard in told if heard and not kept]


@examples(deadline=None, max_examples=60)
@given(did, st.integers(0, 40), st.integers(-50, 50))
def test_of_quick_repeats_each_counts_once(things: list[tuple[str, bool, bool, bool]], cut: int, delay: int) -> None:
    """The log ends at a second amid a burst, and the service hears of each thing a little earlier or later."""
    log: list[Row] = [(item, BEGIN + 5 * n, True, "train") for n, (item, *_) in enumerate(things) if 5 * n <= cut]
    remembered = [at(item, 5 * n + delay) for n, (item, *_) in enumerate(things)]
    left = missing(dataset(log), remembered)
    counted = Counter(row[0] for row in log) + Counter(event.item for event in left)
    assert counted == Counter(item for item, *_ in things)


def test_a_time_may_differ_by_a_minute_and_by_the_unit_of_the_log() -> None:
    data = dataset([("a", BEGIN + 1_000, True, "train")])
    for seconds, is_missing in ((940, False), (1_000, False), (1_060, False), (939, True), (1_062, True)):
        assert bool(missing(data, [at("a", seconds)])) == is_missing
    assert missing(data, [at("b", 1_000)])
    assert missing(data, [Event("a")]), "an event without a time"
    assert missing(data, [at("new", 1_000)]), "an item that the bundle does not know"


def test_times_of_a_log_of_dates_are_days() -> None:
    day, noon = 86_400, 43_200
    midnight = BEGIN // day * day
    rows = [("u", "a", midnight), ("v", "b", midnight + day), ("v", "a", midnight - 9 * day), ("v", "c", midnight)]
    log = pl.DataFrame(rows, ["user_id", "item_id", "at"], orient="row").with_columns(part=pl.lit("train"))
    last = log[-1:].with_columns(part=pl.lit("test"))
    ids = [{"kind": "categorical", "name": f"{side}_id", "side": side} for side in ("user", "item")]
    schema = Schema.model_validate({"time": "at", "duplicates": "keep", "features": ids})
    data = build_dataset(
        check(None, None, pl.concat([log, last]), schema), schema, SplitConfig(kind="column", column="part")
    )
    assert StoredEvents(data).unit == day * 1_000_000
    of_day, before, after = (Event("a", time=float(midnight + noon + n * day)) for n in (0, -1, 1))
    assert missing(data, [before, of_day, after]) == [before, after]


def test_an_event_is_rather_the_interaction_that_is_liked_as_it_is() -> None:
    data = dataset([("a", BEGIN + 10, False, "train")])
    like, dislike = at("a", 5), at("a", 9, liked=False)
    assert missing(data, [like, dislike]) == [like]
    assert missing(data, [like]) == [], "a label of the log may say what the event did not"


def test_an_event_is_rather_the_interaction_of_its_very_time() -> None:
    """One that the log lacks, less than a minute before it, is the missing one."""
    data = dataset([("a", BEGIN + 1_030, True, "train")])
    events = [at("a", 1_000), at("a", 1_030)]
    assert missing(data, events) == events[:1]
    assert missing(data, events[::-1]) == events[:1]
    assert missing(data, events[:1]) == []


@pytest.mark.parametrize("duplicates", ["last", "error"])
def test_the_last_interaction_of_a_pair_stands_for_all_before_it(duplicates: Literal["last", "error"]) -> None:
    data = dataset([("a", BEGIN + 10_000, True, "train")], duplicates)
    earlier, same, later = at("a", 100), at("a", 10_000), at("a", 20_000)
    disliked = at("a", 10_030, liked=False)
    assert missing(data, [earlier, same, disliked, later]) == [disliked, later]


def test_an_interaction_of_the_test_part_is_in_no_history() -> None:
    parts = (("a", 1_000, "train"), ("b", 2_000, "validation"), ("c", 3_000, "test"))
    rows = [(item, BEGIN + after, True, part) for item, after, part in parts]
    events = [at("a", 1_000), at("b", 2_000), at("c", 3_000)]
    assert missing(dataset(rows), events) == events[2:]


def test_a_log_of_an_order_tells_no_times() -> None:
    events = [at("a", 1_000)]
    assert missing(dataset([("a", BEGIN + 1_000, True, "train")], time_unit="order"), events) == events
