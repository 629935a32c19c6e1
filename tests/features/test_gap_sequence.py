"""Histories of the time between interactions: their buckets, and what they are good for in a bundle and over HTTP."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from event_worlds import BROWSED, DAY, GAPS, shop_schema, shop_settings, shopping
from features.test_sequence import column
from service_client import clients

import twotower
from twotower.arrays.ragged import Values
from twotower.data.dataset import build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.features.days_since_previous import DaysSincePrevious
from twotower.features.feature import HistoryFacts
from twotower.features.gap_sequence import GapSequence
from twotower.retrieval.event import Event
from twotower.retrieval.request import Request
from twotower.runs import Run

SPLIT = SplitConfig(kind="column", column="part", ordered=True, validation=0)


def codes(seconds: list[float], first: list[bool] | None = None, **options: Any) -> list[int]:
    """The codes of interactions at some times."""
    times = np.array([round(s * 1e6) for s in seconds], np.int64)
    mask = np.arange(len(times)) == 0 if first is None else np.array(first)
    facts = HistoryFacts(mask, np.zeros(len(times), np.int32), times)
    found: list[int] = GapSequence(name="g", side="user", **options).codes(facts).tolist()
    return found


def test_buckets_double() -> None:
    at = [0.0, 0.5, 0.5 + 1, 1.5 + 2.9, 4.4 + 3, 7.4 + 60, 67.4 + 86400]
    assert codes(at) == [0, 1, 2, 2, 3, 6, 17]
    assert codes([0.0, 7 * DAY], buckets=4) == [0, 4]
    assert codes([]) == []


def test_the_first_interaction_of_a_history_and_one_of_an_untold_time_have_no_gap() -> None:
    assert codes([0, 1, 2, 3], first=[True, False, True, False]) == [0, 2, 0, 2]
    assert codes([10, -1e-6, 12, 13]) == [0, 0, 0, 2]
    assert codes([10, 5]) == [0, 1]  # told in another order


def test_a_history_holds_the_gap_before_each_interaction() -> None:
    cut = GapSequence(name="cut", side="user", max_length=3, buckets=20)
    schema = shop_schema(GAPS)
    schema = schema.model_copy(update={"features": (*schema.features, cut)})
    of, (_, _, log) = build_dataset(check(*shopping("gap"), schema), schema, SPLIT), shopping("gap")
    for user in range(0, 160, 9):
        own = log.filter(pl.col("user_id") == user, pl.col("part") == "train").sort("at")["at"].to_list()
        gaps = [0, *(1 + int(np.log2(1 + b - a)) for a, b in pairwise(own))]
        assert column(of, "user", "gaps").row(user).tolist() == gaps
        assert column(of, "user", "cut").row(user).tolist() == [0, *gaps[-2:]]
    assert next(f for f in of.encoders.fields("user") if f.name == "cut").rows == 21


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return twotower.fit(
        shopping("gap"), shop_schema(GAPS), shop_settings(), folder=tmp_path_factory.mktemp("gaps") / "run"
    )


def test_what_depends_on_the_gaps_of_a_history_is_found_with_them(run: Run) -> None:
    assert run.metrics["test.recall@1"] > 0.95


@pytest.mark.system
def test_what_depends_on_the_gaps_of_a_history_is_not_found_without_them() -> None:
    without = twotower.fit(shopping("gap"), shop_schema(), shop_settings())
    assert without.metrics["test.recall@1"] < 0.7


def test_requests_tell_times_in_python_and_over_http(run: Run) -> None:
    assert run.folder is not None
    store = run.folder.parent / "store"
    twotower.publish(run, store)
    retriever = twotower.retriever(store)
    stored = retriever.embed_request(Request("3"), 1).vector
    log = shopping("gap")[2].filter(pl.col("user_id") == 3, pl.col("part") == "train").sort("at")
    history = [{"id": str(i), "time": at} for i, at in log.select("item_id", "at").iter_rows()]
    now = int(log["at"].max()) + 3 * DAY  # type: ignore[arg-type]

    def visit(gap: int) -> list[dict[str, Any]]:
        return [{"id": "2", "time": now}, {"id": "5", "time": now + gap}]

    given = Request(None, history=[Event(str(e["id"]), time=float(e["time"])) for e in history])
    np.testing.assert_allclose(retriever.embed_request(given, 2).vector, stored, atol=1e-4)
    untold = Request(None, history=[(str(e["id"]), True) for e in history])
    assert not np.allclose(retriever.embed_request(untold, 2).vector, stored, atol=1e-2)
    with clients(store) as make:
        client = make()
        vector = client.post("/v1/embed/user", {"history": history}).json()["vector"]
        np.testing.assert_allclose(vector, stored[0], atol=1e-4)
        for gap, wanted in ((10, 2), (DAY, 5)):
            body = {"k": 1, "keep_seen": True, "user_id": "3"}
            reply = client.post("/v1/recommend", body | {"events": visit(gap)}).json()
            assert reply["items"][0]["id"] == str(BROWSED + wanted)
            client.post("/v1/events", {"user_id": "3", "events": visit(gap)})
            assert client.post("/v1/recommend", body).json()["items"] == reply["items"]
            client.ask("DELETE", "/v1/events/3")


def test_an_event_that_replaces_a_stored_one_changes_the_gap_after_it(tmp_path: Path) -> None:
    """With `duplicates = "last"`, as training on the longer log would."""
    frames = shopping("gap")
    schema = shop_schema(GAPS, duplicates="last")
    run = twotower.fit(
        frames, schema, shop_settings(train={"epochs": 1}, evaluation={"repeats": "exclude"}), folder=tmp_path / "run"
    )
    twotower.publish(run, tmp_path / "store")
    retriever = twotower.retriever(tmp_path / "store")
    stored = column(run.dataset, "user", "history")
    assert stored.source is not None
    source = stored.source[slice(*stored.offsets[:2])]
    items, times = run.dataset.pairs.item[source], run.dataset.times[source] / 1e6
    now = float(times[-1]) + 5
    asked = Request("0", events=[Event(str(items[1]), time=now)])
    whole = [(str(i), float(t)) for i, t in zip(items, times, strict=True) if i != items[1]] + [(str(items[1]), now)]
    expected = Request("0", history=[Event(i, time=t) for i, t in whole])
    found, wanted = (retriever.embed_request(r, 2).vector for r in (asked, expected))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_days_since_previous_sees_the_times_of_events(tmp_path: Path) -> None:
    schema = shop_schema(GAPS)
    schema = schema.model_copy(update={"features": (*schema.features, DaysSincePrevious(name="days"))})
    run = twotower.fit(shopping("gap"), schema, shop_settings(train={"epochs": 1}), folder=tmp_path / "run")
    twotower.publish(run, tmp_path / "store")
    retriever = twotower.retriever(tmp_path / "store")
    last = int(shopping("gap")[2].filter(pl.col("user_id") == 0)["at"].max())  # type: ignore[arg-type]
    asked = [
        Request("0", context={"at": last + 10 * DAY}, events=events)
        for events in (
            [],
            [("1", True)],
            [Event("1", time=last + 10.0 * DAY - 60)],
            [Event("1", time=last + 11.0 * DAY)],
        )
    ]
    found = list[int]()
    for request in asked:
        retriever.user_inputs.context.read(retriever.query(request), values := dict[str, Values]())
        found.append(int(values["days"][0]))
    assert found[0] == found[1] == found[3] != found[2]
