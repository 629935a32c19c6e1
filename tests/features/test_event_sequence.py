"""Histories of the types of events: what they hold, in memory, prepared, in a bundle and over HTTP, and what they are
good for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from event_worlds import BROWSED, GAPS, TYPES, shop_schema, shop_settings, shopping
from features.test_sequence import column, prepared_as_in_memory
from pydantic import ValidationError
from service_client import clients, problem

import twotower
from twotower.data import prepare
from twotower.data.buckets.check import check_buckets
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST
from twotower.data.tables import check
from twotower.errors import DataError
from twotower.features.event_sequence import EventSequence
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.retrieval.event import Event
from twotower.retrieval.request import Request
from twotower.runs import Run

CODES = {"buy": 1, "cart": 2, "view": 3}
SPLIT = SplitConfig(kind="column", column="part", ordered=True, validation=0)
OTHERS = (
    EventSequence(name="last_likes", side="user", interactions="positive", max_length=2),
    EventSequence(name="of_item", side="item"),
)


@cache
def data() -> Dataset:
    """Read only."""
    schema = shop_schema(TYPES, GAPS)
    schema = schema.model_copy(update={"features": (*schema.features, *OTHERS)})
    return build_dataset(check(*shopping("type"), schema), schema, SPLIT)


def test_a_history_holds_the_type_of_each_interaction() -> None:
    of, (_, _, log) = data(), shopping("type")
    types = log.with_columns(code=pl.col("type").replace_strict(CODES, return_dtype=pl.Int32))
    for user in range(0, 160, 7):
        own = types.filter(pl.col("user_id") == user, pl.col("part") == "train").sort("at")
        assert column(of, "user", "how").row(user).tolist() == own["code"].to_list()
        assert column(of, "user", "last_likes").row(user).tolist() == own["code"].to_list()[-2:]
    of_item = types.filter(pl.col("item_id") == 3, pl.col("part") == "train").sort("at")
    assert column(of, "item", "of_item").row(3).tolist() == of_item["code"].to_list()
    host, beside = column(of, "user", "history"), column(of, "user", "how")
    assert np.array_equal(host.offsets, beside.offsets)
    assert host.source is not None
    assert beside.source is not None
    assert np.array_equal(host.source, beside.source)
    later = of.side_before("user", TEST).columns["how"]
    assert np.array_equal(later.lengths, beside.lengths)  # type: ignore[union-attr]


def test_types_that_the_rule_of_all_others_is_for_have_one_code_and_ignored_ones_none() -> None:
    events = {"view": "ignored", "buy": 1, "*": "input"}
    schema = shop_schema(TYPES, events=events)
    of = build_dataset(check(*shopping("type"), schema), schema, SPLIT)
    assert schema.event_types == ("buy",)
    assert set(column(of, "user", "how").row(0).tolist()) == {0, 1}
    assert len(of.pairs) == sum(t != "view" for t in shopping("type")[2]["type"])


@pytest.mark.parametrize(
    "schema", [shop_schema(TYPES, GAPS), shop_schema(TYPES, duplicates="last")], ids=["keep", "last"]
)
def test_prepared_histories_are_those_in_memory(schema: Schema, tmp_path: Path) -> None:
    names = tuple(f.name for f in schema.side("user") if f.history)
    files, disk, memory = prepared_as_in_memory(shopping("type"), schema, SPLIT, tmp_path, names)
    prepare.write_buckets(files, schema, tmp_path / "buckets", split=SPLIT)
    assert not check_buckets(tmp_path / "buckets", schema)
    with_types = disk.pairs.event
    assert with_types is not None
    assert sorted(with_types.tolist()) == sorted(memory.pairs.event.tolist())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return twotower.fit(
        shopping("type"), shop_schema(TYPES), shop_settings(), folder=tmp_path_factory.mktemp("types") / "run"
    )


@pytest.fixture(scope="module")
def store(run: Run) -> Path:
    assert run.folder is not None
    twotower.publish(run, run.folder.parent / "store")
    return run.folder.parent / "store"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a model that has learnt nothing, for what does not depend on its answers."""
    folder, once = tmp_path_factory.mktemp("untrained"), shop_settings()
    once = once.model_copy(update={"train": once.train.model_copy(update={"epochs": 1})})
    twotower.publish(twotower.fit(shopping("type"), shop_schema(TYPES), once, folder=folder / "run"), folder / "store")
    return folder / "store"


def test_what_depends_on_the_types_of_a_history_is_found_with_them(run: Run) -> None:
    assert run.metrics["test.recall@1"] > 0.95


@pytest.mark.system
def test_what_depends_on_the_types_of_a_history_is_not_found_without_them() -> None:
    without = twotower.fit(shopping("type"), shop_schema(), shop_settings())
    assert without.metrics["test.recall@1"] < 0.7


def told(user: int, **more: Any) -> list[dict[str, Any]]:
    """The events of a user's history as JSON."""
    log = shopping("type")[2].filter(pl.col("user_id") == user, pl.col("part") == "train").sort("at")
    return [{"id": str(row["item_id"]), "event": row["type"]} | more for row in log.iter_rows(named=True)]


def test_requests_tell_types_in_python_and_over_http(run: Run, store: Path) -> None:
    retriever = twotower.retriever(store)
    stored = retriever.embed_request(Request("3"), 1).vector
    history = [Event(e["id"], type=e["event"]) for e in told(3)]
    np.testing.assert_allclose(retriever.embed_request(Request("3"), 2).vector, stored, atol=1e-4)
    np.testing.assert_allclose(retriever.embed_request(Request(None, history=history), 2).vector, stored, atol=1e-4)
    np.testing.assert_allclose(
        retriever.embed_request(Request.parse({"history": told(3)[:4], "events": told(3)[4:]}), 2).vector,
        stored,
        atol=1e-4,
    )
    with clients(store) as make:
        client = make()
        assert client.get("/v1/bundle").json()["events"] == ["view", "cart", "buy"]
        vector = client.post("/v1/embed/user", {"history": told(3)}).json()["vector"]
        np.testing.assert_allclose(vector, stored[0], atol=1e-4)
        for cart in (2, 5):
            for order in (1, -1):
                events = [{"id": str(i), "event": "cart" if i == cart else "view"} for i in (2, 5)][::order]
                reply = client.post("/v1/recommend", {"history": [*told(3), *events], "k": 1, "keep_seen": True}).json()
                assert reply["items"][0]["id"] == str(BROWSED + cart)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"id": "1", "event": "cartt"}, "no event type 'cartt'; did you mean 'cart'? (allowed: view, cart, buy)"),
        ({"id": "1", "event": "cart", "liked": True}, "has 'event' and 'liked', and a type says whether it is liked"),
        ({"id": "1", "event": "cart", "time": 1.7e12}, "has the time 1.7e+12, expected seconds since 1970"),
    ],
)
def test_types_that_the_bundle_does_not_know_are_refused(untrained: Path, event: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as e:
        twotower.retriever(untrained).embed_request(Request.parse({"events": [event]}), 2)
    assert words in str(e.value)
    with clients(untrained) as make:
        client = make()
        for path, body in (("/v1/recommend", {"events": [event]}), ("/v1/events", {"user_id": "1", "events": [event]})):
            assert words in problem(client.post(path, body), "invalid")["detail"]
        assert client.post("/v1/recommend", {"user_id": "1"}).json()["recent_events"] == 0


def test_a_sequence_of_types_needs_their_column() -> None:
    with pytest.raises(
        ValidationError, match="event sequence 'how' needs the types of events; name their column in schema.event"
    ):
        shop_schema(TYPES, event="", events={})


def test_a_label_still_says_which_interactions_a_history_holds() -> None:
    schema = shop_schema(events={"view": "negative", "cart": "input", "buy": 1})
    likes = Sequence(name="likes", side="user", interactions="positive", share_embedding=False)
    how = EventSequence(name="how", side="user", interactions="positive")
    schema = schema.model_copy(update={"features": (*schema.features, likes, how)})
    of = build_dataset(check(*shopping("type"), schema), schema, SPLIT)
    assert set(column(of, "user", "how").values.tolist()) == {CODES["buy"], CODES["cart"]}
    assert np.array_equal(column(of, "user", "how").offsets, column(of, "user", "likes").offsets)
