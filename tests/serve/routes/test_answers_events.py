"""Recent events of users over HTTP (rows F1, G6 and G14 of the faults)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from service_client import Client, Make, by_path, problem
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

import twotower
from twotower.data.tables import check
from twotower.features.schema import Schema
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.serve.redis_events import RedisEvents


def test_recent_events_change_the_next_answer_and_can_be_deleted(shared: Client, retriever: Retriever) -> None:
    before = shared.post("/v1/recommend", {"user_id": "u3"}).json()
    events = [before["items"][0]["id"], {"id": before["items"][1]["id"], "liked": False}]
    added = shared.post("/v1/events", {"user_id": "u3", "events": events})
    assert added.status_code == 202
    assert added.json() == {"recent_events": 2, "shared": False}
    after = shared.post("/v1/recommend", {"user_id": "u3"}).json()
    assert (after["method"], after["recent_events"]) == (2, 2)
    told = [(before["items"][0]["id"], True), (before["items"][1]["id"], False)]
    wanted = retriever.recommend(Request("u3", events=told), 10, 2)
    assert [i["id"] for i in after["items"]] == [i.id for i in wanted.items]
    assert not {i for i, _ in told} & {i["id"] for i in after["items"]}
    assert shared.post("/v1/recommend", {"user_id": "u3", "use_recent_events": False}).json()["recent_events"] == 0
    assert shared.ask("DELETE", "/v1/events/u3").status_code == 204
    assert shared.post("/v1/recommend", {"user_id": "u3"}).json()["items"] == before["items"]


def test_the_vector_of_recent_events_is_computed_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.post("/v1/events", {"user_id": "u3", "events": ["i1"]})
    made: list[int] = []
    vector = Retriever.embed_request

    def counted(*values: Any) -> Any:
        made.append(1)
        return vector(*values)

    monkeypatch.setattr(Retriever, "embed_request", counted)
    first, second = (client.post("/v1/recommend", {"user_id": "u3"}).json() for _ in range(2))
    assert len(made) == 1
    assert first["items"] == second["items"]
    client.post("/v1/events", {"user_id": "u3", "events": ["i2"]})
    third = client.post("/v1/recommend", {"user_id": "u3"}).json()
    assert len(made) == 2
    assert third["items"] != first["items"]
    client.post("/v1/recommend", {"user_id": "u3", "features": {"city": "city1"}})
    assert len(made) == 3


def test_unknown_recent_events_are_named_in_every_reply(client: Client) -> None:
    client.post("/v1/events", {"user_id": "u3", "events": ["nonsense", "i1", "nonsense"]})
    replies = [client.post("/v1/recommend", {"user_id": "u3"}).json() for _ in range(2)]
    assert [r["unknown"] for r in replies] == [["nonsense"], ["nonsense"]]
    assert "twotower_unknown_items_total 2.0" in client.get("/metrics").text


def test_recent_events_of_a_new_user_are_a_cold_start(shared: Client) -> None:
    shared.post("/v1/events", {"user_id": "new one", "events": ["i1", "i2"]})
    reply = shared.post("/v1/recommend", {"user_id": "new one"}).json()
    assert (reply["source"], reply["method"], reply["recent_events"]) == ("cold_start", 2, 2)


@pytest.mark.parametrize("duplicates", ["keep", "last"])
def test_events_that_the_log_of_a_new_bundle_holds_count_once(make: Make, tmp_path: Path, duplicates: str) -> None:
    """A service hears of purchases, and runs on while the next log, which has most of them, is trained and
    published."""
    now = int(time.time())
    features = [
        {"side": "user", "kind": "sequence", "name": "bought", "pooling": "decay"},
        {"side": "item", "kind": "categorical", "name": "item_id"},
    ]
    schema = Schema.model_validate({"time": "at", "duplicates": duplicates, "features": features})
    config = settings(
        split={"kind": "column", "column": "part", "ordered": True, "validation": 0}, loss={"kind": "softmax"},
        negatives={"full": True},
        train={"epochs": 1, "history_scope": "causal"}, evaluation={"repeats": "exclude"},
    )  # fmt: skip
    rows = [(f"u{n % 7}", f"i{n * 5 % 11}", now - 90_000 + 60 * n, "train") for n in range(150)]
    rows += [(f"u{n}", f"i{n + 1}", now - 70_000 + n, "test") for n in range(1, 7)]

    def publish(name: str, rows: list[tuple[str, str, int, str]]) -> None:
        log = pl.DataFrame(rows, ["user_id", "item_id", "at", "part"], orient="row")
        twotower.publish(
            twotower.fit((None, None, log), schema, config, folder=tmp_path / name), tmp_path / "store", force=True
        )

    publish("monday", rows)
    client = make(at=tmp_path / "store")
    heard = [("i1", now - 2_000), ("i2", now - 1_990), ("i1", now - 1_500), ("i3", now - 1_000)]
    client.post("/v1/events", {"user_id": "u0", "events": [{"id": i, "time": t} for i, t in heard]})
    in_log = [(i, t) for i, t in heard if i != "i2"]  # the log lacks one, and has what the service did not hear of
    publish("tuesday", [*rows, *(("u0", i, t, "train") for i, t in [*in_log, ("i9", now - 60)])])
    client.run(client.service.bundles.refresh())
    reply = client.post("/v1/embed/user", {"user_id": "u0", "method": 2}).json()
    assert reply["recent_events"] == 1
    log = [(i, t) for u, i, t, _ in rows if u == "u0"] + heard + [("i9", now - 60)]
    whole = [{"id": i, "time": t} for i, t in log]
    told = client.post("/v1/embed/user", {"user_id": "u0", "history": whole, "use_recent_events": False}).json()
    assert reply["vector"] == pytest.approx(told["vector"], abs=1e-5)
    asked = {"user_id": "u0", "k": 20, "keep_seen": False}
    assert "i2" not in {item["id"] for item in client.post("/v1/recommend", asked).json()["items"]}
    publish("wednesday", [*rows, *(("u0", i, t, "train") for i, t in [*heard, ("i9", now - 60)])])
    client.run(client.service.bundles.refresh())
    answers = [client.post("/v1/recommend", asked | more).json() for more in ({}, {"use_recent_events": False})]
    assert [(a["method"], a["recent_events"]) for a in answers] == [(1, 0), (1, 0)]
    assert answers[0]["items"] == answers[1]["items"]


STRANGE = ["a\nb", "\n", "\r\n", "x\n", ".", "..", "/", "//", "a/b", "../../etc", "?", "#", "a?b#c", "%", "%2e%2e",
    "%0a", "+", "a b", " x ",
           "\x00", "\u2028", "\x85\u2029", "é☃😀", "i/similar", "similar", "&k=2", ";", "\ufffd", "'\"<",
           "u" * 512]  # fmt: skip


def is_asked_and_forgotten(client: Client, id_: str) -> None:
    """Whether a user or item of an id is found by it, by path and by query, and a user is forgotten."""
    quoted = quote(id_, safe="")
    as_query = b"user_id=" + quoted.encode()
    for path, query in ((f"/v1/events/{quoted}", b""), ("/v1/events", as_query)):
        assert client.post("/v1/events", {"user_id": id_, "events": ["i1"]}).status_code == 202
        for status, told in (by_path(client, "GET", f"/v1/console/users/{quoted}"),
                             by_path(client, "GET", "/v1/console/user", as_query)):  # fmt: skip
            assert (status, told["id"], len(told["recent_events"])) == (200, id_, 1)
        assert by_path(client, "DELETE", path, query)[0] == 204
        assert client.post("/v1/recommend", {"user_id": id_}).json()["recent_events"] == 0
    for status, told in (by_path(client, "GET", f"/v1/items/{quoted}/similar"),
                         by_path(client, "GET", "/v1/items/similar", b"item_id=" + quoted.encode())):  # fmt: skip
        assert (status, told["type"]) == (404, "/problems/unknown-item")
        assert id_ in told["detail"]


@pytest.mark.parametrize("id_", STRANGE, ids=ascii)
def test_fault_G14_a_strange_id_is_asked_and_forgotten_by_its_address(shared: Client, id_: str) -> None:
    is_asked_and_forgotten(shared, id_)


@hypothesis_settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.text(min_size=1, max_size=30) | st.text("\n\r/.?#%&+; \x00\u2028a", min_size=1, max_size=8))
def test_fault_G14_any_id_is_asked_and_forgotten_by_its_address(shared: Client, id_: str) -> None:
    is_asked_and_forgotten(shared, id_)


def test_fault_G14_items_and_users_of_strange_ids_are_found(make: Make, tmp_path: Path) -> None:
    users, items, actions = (
        table.with_columns(
            pl.col(name).replace_strict(list(range(len(STRANGE))), STRANGE)
            for name in table.columns
            if name.endswith("_id")
        )
        for table in checkerboard(len(STRANGE), len(STRANGE))
    )
    tables = check(users, items, actions, CHECKERBOARD_SCHEMA)
    run = twotower.fit(tables, CHECKERBOARD_SCHEMA, settings(train={"epochs": 1}), folder=tmp_path / "run")
    twotower.publish(run, tmp_path / "store")
    client = make(at=tmp_path / "store")
    for id_ in STRANGE:
        quoted = quote(id_, safe="")
        status, told = by_path(client, "GET", f"/v1/items/{quoted}/similar", b"k=3")
        assert (status, len(told["items"])) == (200, 3)
        assert (
            by_path(client, "GET", "/v1/items/similar", b"k=3&item_id=" + quoted.encode())[1]["items"] == told["items"]
        )
        assert by_path(client, "GET", f"/v1/console/users/{quoted}")[1]["events"] > 0
        assert by_path(client, "GET", "/v1/console/items", b"query=" + quoted.encode())[1]["items"][0]["id"] == id_


@pytest.mark.parametrize("event_store", ["memory", "redis://127.0.0.1:1/0"])
def test_fault_G6_who_goes_for_want_of_room_is_counted_and_others_are_remembered(make: Make, event_store: str) -> None:
    client = make(event_memory=20_000, event_store=event_store)
    for n in range(100):
        events = [*("i1" for _ in range(50)), *(f"{n}/{place}/{'x' * 500}" for place in range(21))]
        added = client.post("/v1/events", {"user_id": f"{n}{'u' * 400}", "events": events})
        assert added.json()["recent_events"] == 71
    last = client.post("/v1/recommend", {"user_id": f"99{'u' * 400}"}).json()
    assert (last["recent_events"], last["method"]) == (71, 2)
    assert client.post("/v1/recommend", {"user_id": f"0{'u' * 400}"}).json()["recent_events"] == 0
    text = client.get("/metrics").text
    dropped, taken = (
        float(next(line for line in text.splitlines() if line.startswith(f"twotower_event{name} ")).rpartition(" ")[2])
        for name in (r's_dropped_total{what="user"}', "_memory_bytes")
    )
    assert dropped >= 98
    assert 0 < taken <= 20_000


def test_events_that_other_workers_would_not_see_are_refused(make: Make) -> None:
    client = make(workers=2)
    told = problem(client.post("/v1/events", {"user_id": "u1", "events": ["i1"]}), "conflict")
    assert "event_store = redis://" in told["detail"]


def test_fault_F1_an_event_store_that_fails_is_no_error(make: Make) -> None:
    client = make(event_store="redis://127.0.0.1:1/0")
    assert isinstance(client.service.event_store, RedisEvents)
    assert client.post("/v1/recommend", {"user_id": "u1"}).status_code == 200
    added = client.post("/v1/events", {"user_id": "u1", "events": ["i1"]})
    assert added.status_code == 202
    assert added.json() == {"recent_events": 1, "shared": False}
    reply = client.post("/v1/recommend", {"user_id": "u1"}).json()
    assert (reply["recent_events"], reply["method"]) == (1, 2)
    assert 'twotower_event_store_errors_total{operation="read"}' in client.get("/metrics").text
    problem(client.ask("DELETE", "/v1/events/u1"), "event-store")
