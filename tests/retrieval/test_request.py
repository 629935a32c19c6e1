"""A request is parsed from JSON, and an answer written as JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from twotower.arrays.types import ItemId
from twotower.errors import DataError
from twotower.features.schema import Schema
from twotower.retrieval.event import Event, EventTypes, checked_event
from twotower.retrieval.request import Answer, Item, Request
from twotower.retrieval.request_body import Json
from twotower.retrieval.retriever import Retriever


def test_json_has_ids_as_text(retriever: Retriever) -> None:
    body = json.loads(retriever.recommend(Request("u1"), 3).to_json())
    assert set(body) == {"items", "bundle_id", "method", "source", "milliseconds", "truncated", "unknown"}
    assert len(body["items"]) == 3
    assert all(isinstance(i["id"], str) and isinstance(i["score"], float) for i in body["items"])


def test_a_notebook_shows_a_table_in_which_titles_are_no_markup() -> None:
    answer = Answer([Item(ItemId("<1>"), 0.25, "A & <b>")], "", 1, "popular", 0.1)
    rows = "<tr><td>1<td>A &amp; &lt;b&gt;<td>&lt;1&gt;<td>0.250"
    assert answer._repr_html_() == f"<table><tr><th>rank<th>title<th>id<th>score (popular){rows}</table>"


def test_an_item_id_alone_is_an_event_in_python(retriever: Retriever) -> None:
    """Ids of two letters too, which are no pair of an item and whether it was liked."""
    assert Request(history=["i1", 7]).history == [Event("i1"), Event("7")]
    assert Request(events=["i1", ("i2", False)]).events == [Event("i1"), Event("i2", liked=False)]
    by_id, by_event = (retriever.recommend(Request(history=[told]), 5) for told in ("i1", Event("i1")))
    assert [i.id for i in by_id.items] == [i.id for i in by_event.items]
    assert "i1" not in {i.id for i in by_id.items}


@pytest.mark.parametrize(
    "wrong",
    [
        "i1", b"i1", {"i1": True}, 5, [True], [None], [2.5], [np.float64(7.0)], [("i1", "buy")], [(7,)], [(7, 1)],
        [(7, True, "buy")], [["i1", True]], [{"id": "i1"}],
    ],
)  # fmt: skip
def test_a_history_of_something_else_is_refused_in_python(wrong: Any) -> None:
    expected = "an item id, a pair such as" if isinstance(wrong, list) else "a list of item ids or events"
    for name in ("history", "events"):
        with pytest.raises(DataError, match=f"request: a history .*, expected {expected}"):
            Request(**{name: wrong})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "JSON object"),
        ({"user": 1}, "unknown key 'user'; did you mean 'user_id'"),
        ({"user_id": True}, "user_id: input should be text or a whole number, got True"),
        ({"features": [1]}, "features: .* got [1]"),
        ({"features": 0}, "features: .* got 0"),
        ({"features": ""}, "features: .* got ''"),
        ({"features": {"age": {}}}, "features.age: found an object, expected text, a number"),
        ({"history": [{"id": True}]}, "history.0.id: .* text or a whole number, got True"),
        ({"history": "i1"}, "history: input should be a valid list, got 'i1'"),
        ({"history": [{"item": 1}]}, "history.0.id: field required"),
        ({"events": {}}, "events: .* got {}"),
        ({"events": [2.5]}, "events.0: found 2.5, expected an item id"),
        ({"history": ["i1", None]}, "history.1: found null, expected an item id"),
    ],
)
def test_a_request_that_is_none_is_refused(body: Json, said: str) -> None:
    with pytest.raises(DataError, match=re.sub(r"([(\[])", r"\\\1", said)):
        Request.parse(body)


def test_types_of_events_say_what_is_liked() -> None:
    schema = Schema.model_validate(
        {
            "event": "type", "events": {"view": "input", "skip": "negative", "ping": "ignored", "*": 0.5},
            "features": [{"kind": "categorical", "name": f"{side}_id", "side": side} for side in ("user", "item")],
        }
    )  # fmt: skip
    types = EventTypes(schema)
    given = [
        Event("1", type="view"),
        Event("2", type="skip"),
        Event("3", type="ping"),
        Event("4", type="buy", time=9.0),
        Event("5", False),
    ]
    read = types.read(given)
    assert read == [
        Event("1", True, "view"), Event("2", False, "skip"), None, Event("4", True, None, 9.0), Event("5", False),
    ]  # fmt: skip
    assert [types.code(event) for event in read if event is not None] == [2, 1, 0, 0]
    strict = EventTypes(schema.model_copy(update={"events": {"view": schema.events["view"]}}))
    with pytest.raises(DataError, match="no event type 'skip' \\(allowed: view\\)"):
        strict.read(given)
    assert strict.read([Event("4", False, "buy", 9.0)], stored=1) == [Event("4", False, None, 9.0)]
    with pytest.raises(DataError, match="the bundle's log has no types; leave out 'event'"):
        EventTypes(schema.model_copy(update={"events": {}})).read(given)


@pytest.mark.parametrize(
    ("event", "read"),
    [
        ({"id": 7}, Event("7")),
        ({"id": "7", "liked": False, "event": None}, Event("7", False)),
        ({"id": "7", "event": 3, "time": 1_700_000_000}, Event("7", True, "3", 1_700_000_000)),
    ],
)
def test_an_event_tells_its_type_and_its_time(event: dict[str, Json], read: Event) -> None:
    assert Request.parse({"events": [event]}).events == [read]
    for wrong in ({"event": True}, {"time": "now"}, {"time": True}, {"at": 1}):
        with pytest.raises(DataError, match=f"history.0.{next(iter(wrong))}: "):
            Request.parse({"history": [event | wrong]})


def test_ids_of_pandas_and_numpy_are_ids() -> None:
    expected = [Event("7"), Event("8", False), Event("9", True, "buy")]
    of_numpy: Any = np.array([7, 8, 9])
    cases: list[Any] = [(7, 8, 9), of_numpy]
    for seven, eight, nine in cases:
        given = [seven, (eight, np.bool_(False)), Event(nine, True, "buy")]
        asked = Request(seven, history=given, events=given)
        assert (asked.user_id, asked.history, asked.events) == ("7", expected, expected)
    assert Request(history=of_numpy).history == [Event("7"), Event("8"), Event("9")]


@pytest.mark.parametrize("wrong", [3.0, np.float64(3), True, float("nan"), b"3"])
def test_a_user_id_that_is_none_is_refused_in_python(wrong: Any) -> None:
    with pytest.raises(DataError, match="user_id is .* expected text or a whole number"):
        Request(wrong)


@pytest.mark.parametrize("time", [0.0, -1.0, 1.7e12, float("inf"), float("nan")])
def test_an_implausible_time_is_refused(time: float) -> None:
    with pytest.raises(DataError, match="expected seconds since 1970, from 1990 to tomorrow"):
        checked_event("7", time=time)
    with pytest.raises(DataError, match="expected seconds since 1970, from 1990 to tomorrow"):
        Request(events=[Event("7", time=time)])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "found nan, expected a finite number"),
        ([1.0, float("inf")], "found inf, expected a finite number"),
        ("x" * 10_001, "found a text of 10,001 characters, expected at most 10,000"),
        ([0] * 65_537, "found a list of 65,537 values, expected at most 65,536"),
    ],
)
def test_a_value_beyond_a_limit_is_one_message(value: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"^request: features.age: {said}$"):
        Request.parse({"features": {"age": value}})


@pytest.mark.parametrize("name", ["history", "events"])
def test_events_with_times_are_read_in_their_order_and_others_as_given(retriever: Retriever, name: str) -> None:
    at = 1_700_000_000
    timed: list[Json] = [{"id": i, "time": at + t} for i, t in (("1", 9), ("2", 5), ("3", 9), ("4", 0.5))]

    def read(events: list[Json]) -> list[str]:
        return [event.item for event in retriever.query(Request.parse({name: events})).events]

    assert read(timed) == ["4", "2", "1", "3"]
    assert read([*timed, "5"]) == ["1", "2", "3", "4", "5"]


def test_a_given_history_replaces_the_stored_one_and_no_recent_event(retriever: Retriever) -> None:
    event = Event("i1", time=1_700_000_000.0)
    query = retriever.query(Request("u1", history=[event]), [event])
    assert ([e.item for e in query.events], query.n_recent) == (["i1", "i1"], 1)
