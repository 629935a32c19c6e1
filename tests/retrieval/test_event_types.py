"""Events of types that the schema ignores count for nothing in a request, as their rows in the log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from service_client import clients, ids
from worlds import settings

import twotower
from twotower.features.schema import Schema
from twotower.retrieval.event import Event
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever, explain

DAY = 86_400
NOW = int(time.time())
FEATURES = [
    {"side": "user", "kind": "sequence", "name": "bought"},
    {"side": "context", "kind": "days_since_previous", "name": "away", "edges": [0.5, 2]},
    {"side": "item", "kind": "categorical", "name": "item_id"},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a log with purchases and impressions, of which only purchases count."""
    folder, rng = tmp_path_factory.mktemp("ignored"), np.random.default_rng(0)
    n = 400
    actions = pl.DataFrame(
        {
            "user_id": [f"u{user}" for user in rng.integers(0, 20, n)],
            "item_id": [f"i{item}" for item in rng.integers(0, 12, n)],
            "at": NOW - 30 * DAY + np.sort(rng.integers(0, 25 * DAY, n)),
            "what": rng.choice(["buy", "impression"], n, p=[0.6, 0.4]),
        }
    )
    schema = Schema.model_validate(
        {
            "time": "at", "event": "what", "events": {"buy": 1, "*": "ignored"}, "duplicates": "keep",
            "features": FEATURES,
        }
    )  # fmt: skip
    config = settings(split={"kind": "time"}, loss={"kind": "softmax"}, negatives={"full": True}, train={"epochs": 2})
    run = twotower.fit((None, None, actions), schema, config, folder=folder / "run")
    twotower.publish(run, folder / "store", force=True)
    return folder / "store"


@pytest.fixture(scope="module")
def retriever(store: Path) -> Retriever:
    return twotower.retriever(store)


def best(retriever: Retriever) -> str:
    """The item that u3 gets first."""
    return retriever.recommend(Request("u3"), 1, 2, keep_seen=False).items[0].id


@pytest.mark.parametrize("when", [None, NOW - 60.0], ids=["untimed", "timed"])
def test_a_request_with_an_ignored_event_is_the_request_without_it(retriever: Retriever, when: float | None) -> None:
    shown = Event(best(retriever), type="impression", time=when)
    bought = Event("i1", type="buy", time=NOW - 3.0 * DAY)
    for told, plain in (
        (Request("u3", events=[shown]), Request("u3")),
        (Request("u3", events=[shown, bought]), Request("u3", events=[bought])),
        (Request("u3", history=[bought, shown]), Request("u3", history=[bought])),
        (Request(None, history=[shown]), Request(None, history=[])),
        (Request(None, events=[shown]), Request(None)),
        (Request("nobody", events=[shown]), Request("nobody")),
    ):
        answers = [retriever.recommend(request, 12, 2, keep_seen=False) for request in (told, plain)]
        assert answers[0].source == answers[1].source
        assert answers[0].items == answers[1].items
        vectors = [retriever.embed_request(request) for request in (told, plain)]
        assert vectors[0].source == vectors[1].source
        np.testing.assert_array_equal(vectors[0].vector, vectors[1].vector)
        np.testing.assert_array_equal(explain(retriever, told).vector, explain(retriever, plain).vector)


def test_an_event_that_counts_still_does(retriever: Retriever) -> None:
    item = best(retriever)
    for told in (Event(item, type="buy", time=NOW - 60.0), Event(item)):
        answer = retriever.recommend(Request("u3", events=[told]), 12, 2, keep_seen=False)
        assert item not in {i.id for i in answer.items}
    assert retriever.recommend(Request(None, events=[Event("i1", type="buy")]), 3, 2).source == "cold_start"


def test_a_table_of_users_with_ignored_events_is_one_without(retriever: Retriever) -> None:
    shown = [{"id": best(retriever), "event": "impression", "time": NOW - 60.0}]
    users = ["u3", "u4", "nobody"]
    frames = [
        retriever.recommend_frame(frame, 12, 2, keep_seen=False)
        for frame in (pl.DataFrame({"user_id": users, "events": [shown] * 3}), pl.DataFrame({"user_id": users}))
    ]
    assert frames[0].equals(frames[1])
    assert set(frames[0].filter(pl.col("user_id") == "nobody")["source"]) == {"popular"}


def test_over_http_an_ignored_event_counts_for_nothing(store: Path, retriever: Retriever) -> None:
    shown = {"id": best(retriever), "event": "impression", "time": NOW - 60}

    def asked(**body: Any) -> tuple[str, int, list[str]]:
        reply = client.post("/v1/recommend", {"k": 12, "keep_seen": False} | body)
        return reply.json()["source"], reply.json()["method"], ids(reply)

    with clients(store) as make:
        client = make()
        assert asked(user_id="u3", events=[shown]) == asked(user_id="u3")
        assert asked(events=[shown]) == asked()
        assert asked()[0] == "popular"
        assert client.post("/v1/events", {"user_id": "u3", "events": [shown]}).json()["recent_events"] == 0
