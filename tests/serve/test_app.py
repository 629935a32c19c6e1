"""The service over HTTP, in this process: what a client may ask, what it is told, and rows C and D of the faults."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import hostile_towers
import httpx
import numpy as np
import orjson
import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

import twotower
from twotower.bundle import BundleError
from twotower.data.tables import check
from twotower.request import Method, Request
from twotower.retrieve import Retriever
from twotower.serve import api_keys, bundles
from twotower.serve.api_keys import ApiKeys
from twotower.serve.app import create_admin_app, create_app
from twotower.serve.bundles import BundleLimits, BundleManager
from twotower.serve.middleware import RequestMiddleware
from twotower.serve.problems import PROBLEMS
from twotower.serve.service import Service
from twotower.serve.settings import ServeSettings
from twotower.serve.user_events import InProcessEvents, RedisEvents
from twotower.store import Store

AS_JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def store(two_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the two bundles, for tests that change which is current and change it back."""
    return Path(shutil.copytree(two_bundles, tmp_path_factory.mktemp("served") / "store"))


class Client:
    """Sends requests to an application in this process."""

    def __init__(self, service: Service, app: RequestMiddleware, loop: asyncio.AbstractEventLoop) -> None:
        self.service, self.app, self.loop = service, app, loop

    def ask(self, method: str, path: str, body: Any = None, **more: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, **({"json": body} if body is not None else {}), **more)

        reply: httpx.Response = self.run(go())
        return reply

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.ask("POST", path, body, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.ask("GET", path, **more)


Make = Callable[..., Client]


@contextlib.contextmanager
def clients(store: Path) -> Iterator[Make]:
    """Make services with settings of their own, and stop them at the end."""
    loop = asyncio.new_event_loop()
    made: list[Service] = []

    def make(
        keys: Path | None = None,
        admin: bool = False,
        at: Path = store,
        load: bool = True,
        limits: BundleLimits = BundleLimits(),
        **more: Any,
    ) -> Client:
        service = Service(ServeSettings(store=at, keys=keys, **more), bundle_limits=limits)
        made.append(service)
        app = create_admin_app(service) if admin else create_app(service)
        client = Client(service, RequestMiddleware(app, service, ApiKeys(keys) if keys else None, admin), loop)
        if load:
            loop.run_until_complete(service.bundles.refresh())
        return client

    yield make
    for service in made:
        loop.run_until_complete(service.stop())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture
def make(store: Path) -> Iterator[Make]:
    """Services with settings of a test's own."""
    with clients(store) as make:
        yield make


@pytest.fixture
def client(make: Make) -> Client:
    """A service of a test's own, whose numbers begin at zero."""
    return make()


@pytest.fixture(scope="module")
def client_of_all(two_bundles: Path) -> Iterator[Client]:
    with clients(two_bundles) as make:
        yield make()


@pytest.fixture
def shared(client_of_all: Client) -> Client:
    """A service of all tests that neither change it nor read its numbers; without recent events."""
    service = client_of_all.service
    service.event_store = service._in_process = InProcessEvents()
    return client_of_all


@pytest.fixture(scope="module")
def retriever(store: Path) -> Retriever:
    return Retriever(Store(store).current())


def ids(reply: httpx.Response) -> list[str]:
    assert reply.status_code == 200, reply.text
    return [item["id"] for item in reply.json()["items"]]


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a line of the log."""
    found: dict[str, Any] = record.__dict__["fields"]
    return found


def problem(reply: httpx.Response, name: str) -> dict[str, Any]:
    """The problem, which has its one shape."""
    told: dict[str, Any] = reply.json()
    assert told["type"] == f"/problems/{name}", told
    status, title, _ = PROBLEMS[name]
    assert (reply.status_code, told["status"], told["title"]) == (status, status, title)
    assert reply.headers["content-type"] == "application/problem+json"
    assert told["instance"] == reply.headers["x-request-id"]
    assert told["detail"]
    return told


# ---- answers


@pytest.mark.parametrize("method", [1, 2])
def test_the_reply_is_what_the_retriever_answers(shared: Client, retriever: Retriever, method: Any) -> None:
    body = {"user_id": "u3", "k": 7, "method": method, "ban": ["i1"], "where": {"brand": "brand2"}}
    reply = shared.post("/v1/recommend", body).json()
    wanted = retriever.recommend(Request("u3"), 7, method, ban=["i1"], where={"brand": "brand2"})
    assert reply["items"] == [{"id": i.id, "score": i.score, "title": i.title} for i in wanted.items]
    assert reply["bundle_id"] == retriever.bundle.id
    assert (reply["method"], reply["source"], reply["recent_events"]) == (method, "model", 0)
    assert reply["truncated"] == wanted.truncated
    assert 0 < reply["milliseconds"] < 1000


def test_the_method_follows_from_what_is_new(shared: Client) -> None:
    def ask(**body: Any) -> Any:
        return shared.post("/v1/recommend", body).json()

    assert ask(user_id="u3")["method"] == 1
    assert ask(user_id="u3", features={"city": "city1"})["method"] == 2
    assert ask(user_id="u3", events=["i1"])["method"] == 2
    assert ask(user_id="nobody", features={"city": "city1"}, method=1)["method"] == 2  # nothing is stored of them
    assert ask(user_id="nobody", features={"city": "city1"})["source"] == "cold_start"
    assert ask(user_id="nobody")["source"] == "popular"
    assert ask()["source"] == "popular"


def test_a_feature_with_method_1_is_refused(shared: Client) -> None:
    told = problem(shared.post("/v1/recommend", {"user_id": "u3", "features": {"age": 3}, "method": 1}), "invalid")
    assert "ask by method 2" in told["detail"]


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


def test_what_is_unknown_is_told_once_each_in_its_order(shared: Client) -> None:
    items = [f"x{n % 5_000}" for n in range(10_000)]
    reply = shared.post("/v1/recommend", {"user_id": "u1", "history": items, "features": {"city": "nowhere"}}).json()
    assert sorted(reply["unknown"]) == sorted(["city", *items[:5_000]])
    assert [u for u in reply["unknown"] if u != "city"] == items[:5_000]


def test_recent_events_of_a_new_user_are_a_cold_start(shared: Client) -> None:
    shared.post("/v1/events", {"user_id": "new one", "events": ["i1", "i2"]})
    reply = shared.post("/v1/recommend", {"user_id": "new one"}).json()
    assert (reply["source"], reply["method"], reply["recent_events"]) == ("cold_start", 2, 2)


def test_a_batch_is_the_single_answers_and_problems_in_their_places(shared: Client) -> None:
    requests = [{"user_id": "u1"}, {"user_id": "u2", "k": 3, "method": 2}, {"features": {"citi": "x"}}, {"k": 5000}]
    replies = shared.post("/v1/recommend:batch", {"requests": requests}).json()["replies"]
    for body, reply in zip(requests[:2], replies[:2], strict=True):
        alone = shared.post("/v1/recommend", body).json()
        assert {k: v for k, v in reply.items() if k != "milliseconds"} == {
            k: v for k, v in alone.items() if k != "milliseconds"
        }
    assert "did you mean 'city'" in replies[2]["detail"]
    assert replies[3]["errors"] == [{"at": "body.k", "detail": "k is 5000, expected 1 to 1,000"}]


def test_a_vector_is_the_one_that_is_searched_with(shared: Client, retriever: Retriever) -> None:
    cases: list[tuple[dict[str, Any], Method]] = [
        ({"user_id": "u3"}, 1),
        ({"user_id": "u3", "method": 2}, 2),
        ({"history": ["i1"]}, 2),
    ]
    for body, method in cases:
        reply = shared.post("/v1/embed/user", body).json()
        request = Request(body.get("user_id"), history=[("i1", True)] if "history" in body else None)
        wanted, source, _ = retriever.embed_request(request, method)
        assert np.allclose(reply["vector"], wanted[0], rtol=1e-6)
        assert (reply["method"], reply["source"], reply["metric"]) == (method, source, retriever.index.metric)


def test_similar_items_and_an_item_nobody_knows(shared: Client, retriever: Retriever) -> None:
    assert ids(shared.get("/v1/items/i3/similar?k=5")) == [i.id for i in retriever.similar("i3", 5).items]
    problem(shared.get("/v1/items/none/similar"), "unknown-item")
    problem(shared.get("/v1/items/a/b/similar"), "unknown-item")
    problem(shared.get("/v1/items/i3/similar?k=x"), "invalid")
    problem(shared.get("/v1/items/i3/similar?k=0"), "invalid")


def test_search_by_words(shared: Client, retriever: Retriever) -> None:
    assert ids(shared.post("/v1/search", {"text": "more is more", "k": 5})) == [
        i.id for i in retriever.search("more is more", 5).items
    ]
    problem(shared.post("/v1/search", {"text": "..."}), "invalid")


def test_what_the_bundle_says_of_itself(shared: Client, retriever: Retriever) -> None:
    told = shared.get("/v1/bundle").json()
    assert told["bundle_id"] == retriever.bundle.id
    assert set(told["features"]["user"]) == {"city", "age", "income", "motto"}
    assert "brand" in told["features"]["item"]
    assert told["history"] is True
    assert told["search"] == ["motto"]
    assert told["limits"] == {"k": 1000, "list": 10000, "batch": 100, "body": 1 << 20}
    assert told["counts"] == {"users": 60, "items": 40}


def test_health_readiness_and_draining(client: Client) -> None:
    assert client.get("/livez").json()["status"] == "ok"
    assert client.get("/readyz").status_code == 200
    assert "twotower_ready 1.0" in client.get("/metrics").text
    client.service.drain()
    problem(client.get("/readyz"), "draining")
    assert "twotower_ready 0.0" in client.get("/metrics").text
    still = client.post("/v1/recommend", {"user_id": "u1"})
    assert still.status_code == 200
    assert still.headers["connection"] == "close"
    assert client.get("/livez").status_code == 200


def test_every_problem_has_its_page(shared: Client) -> None:
    for name, (status, title, what_to_do) in PROBLEMS.items():
        text = shared.get(f"/problems/{name}").text
        assert str(status) in text
        assert title in text
        assert what_to_do in text
    problem(shared.get("/problems/none"), "not-found")
    problem(shared.get("/v2/recommend"), "not-found")
    problem(shared.post("/v1/recommend/", {}), "not-found")
    problem(shared.get("/v1/recommend"), "method-not-allowed")


def test_an_error_nobody_thought_of_is_a_problem_and_is_in_the_log(
    client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(client.service, "answer", broken)
    reply = client.post("/v1/recommend", {}, headers={"x-request-id": "abc"})
    told = problem(reply, "internal-error")
    assert "secret" not in json.dumps(told)
    assert [fields(r)["id"] for r in caplog.records if r.message == "request failed"] == ["abc"]
    problem(client.post("/v1/recommend:batch", {"requests": [{}]}), "internal-error")
    assert client.service.admission.expected_wait == 0
    assert 'twotower_requests_total{route="/v1/recommend",status="500"} 1.0' in client.get("/metrics").text
    assert client.get("/livez").status_code == 200


def test_head_is_get_without_a_body(shared: Client) -> None:
    for path in ("/livez", "/readyz", "/", "/v1/bundle"):
        reply = shared.ask("HEAD", path)
        assert reply.status_code == 200
        assert int(reply.headers["content-length"]) > 0


def test_a_page_of_another_site_cannot_ask_by_another_name(make: Make, key_file: tuple[Path, str, str]) -> None:
    client = make()
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert client.post("/v1/recommend", {}, headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80"):
        problem(client.get("/v1/console/users", headers={"host": host}), "foreign-host")
    file, key, _ = key_file
    kept = make(keys=file)
    assert kept.post("/v1/recommend", {}, headers={"host": "shop.example", **bearer(key)}).status_code == 200


def test_metrics_tell_stages_bundles_recall_and_what_is_unknown(client: Client, retriever: Retriever) -> None:
    client.post("/v1/recommend", {"user_id": "u1", "features": {"city": "nowhere"}, "history": ["i1", "never seen"]})
    client.post("/v1/recommend", {"user_id": "u1", "k": 1000})
    client.get("/v1/items/none/similar")
    text = client.get("/metrics").text
    bundle = retriever.bundle.id
    for line in (
        f'twotower_bundle{{bundle="{bundle}"}} 1.0',
        f'twotower_bundle_recall{{bundle="{bundle}"}} 1.0',
        f'twotower_answers_total{{bundle="{bundle}",method="2",source="model"}} 1.0',
        'twotower_unknown_features_total{feature="city"} 1.0',
        "twotower_unknown_items_total 1.0",
        "twotower_truncated_answers_total 1.0",
        'twotower_requests_total{route="/v1/recommend",status="200"} 2.0',
        'twotower_requests_total{route="/v1/items/{item_id:path}/similar",status="404"} 1.0',
        'twotower_stage_seconds_count{stage="tower"} 1.0',
        'twotower_stage_seconds_count{stage="search"} 2.0',
        "twotower_in_flight_requests 1.0",  # this one
        "twotower_ready 1.0",
    ):
        assert line in text, line
    assert "never seen" not in text
    assert "u1" not in text


# ---- faults C and D


def test_fault_C3_unknown_values_are_served_and_counted(shared: Client) -> None:
    reply = shared.post("/v1/recommend", {"user_id": "u1", "features": {"city": "nowhere"}, "history": ["?"]})
    assert reply.status_code == 200
    assert sorted(reply.json()["unknown"]) == ["?", "city"]


@pytest.mark.parametrize("id_", ["7", 7, 2**64 - 1, "é☃", "a" * 512, "a/b?c#d", "\u0000", " "])
def test_fault_C8_an_id_of_any_kind_comes_through(shared: Client, id_: Any) -> None:
    reply = shared.post("/v1/recommend", {"user_id": id_, "history": [id_], "ban": [id_]})
    assert reply.status_code == 200
    assert reply.json()["unknown"] == [str(id_)]
    assert shared.post("/v1/events", {"user_id": id_, "events": [{"id": id_}]}).status_code == 202
    assert shared.post("/v1/recommend", {"user_id": id_}).json()["recent_events"] == 1


STRANGE = ["a\nb", "\n", "\r\n", "x\n", ".", "..", "/", "//", "a/b", "../../etc", "?", "#", "a?b#c", "%", "%2e%2e", "%0a", "+", "a b", " x ",
           "\x00", "\u2028", "\x85\u2029", "é☃😀", "i/similar", "similar", "&k=2", ";", "\ufffd", "'\"<", "u" * 512]  # fmt: skip


def by_path(client: Client, method: str, path: str, query: bytes = b"") -> tuple[int, Any]:
    """What a request for a percent-encoded path gets, which no client library has changed before."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": unquote(path), "raw_path": path.encode(), "query_string": query,
             "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http", "root_path": "",
             "http_version": "1.1"}  # fmt: skip
    client.run(client.app(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"] or b"null")


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


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@pytest.mark.parametrize("wrong", ["%FF", "%ED%A0%80", "%C0%AE", "a%E2%82", "%F5%80%80%80"])
def test_fault_G14_bytes_that_are_no_text_are_refused(shared: Client, wrong: str) -> None:
    shared.post("/v1/events", {"user_id": unquote(wrong), "events": ["i1"]})
    for method, path, query in (
        ("DELETE", f"/v1/events/{wrong}", ""), ("DELETE", "/v1/events", f"user_id={wrong}"), ("GET", f"/v1/items/{wrong}/similar", ""),
        ("GET", "/v1/console/users", f"query={wrong}"),
    ):  # fmt: skip
        status, told = by_path(shared, method, path, query.encode())
        assert (status, told["type"]) == (422, "/problems/invalid")
        assert "UTF-8" in told["detail"]
    assert shared.post("/v1/recommend", {"user_id": unquote(wrong)}).json()["recent_events"] == 1
    half = shared.ask("POST", "/v1/events", content=b'{"user_id": "\\ud800", "events": ["i1"]}', headers=AS_JSON)
    problem(half, "malformed")


MALFORMED = [
    b"",
    b"{",
    b'{"user_id": }',
    b"\xff\xfe",
    b'{"features": {"age": NaN}}',
    b'{"features": {"age": Infinity}}',
    b'{"features": {"age": 1e400}}',
    b'{"user_id": "\\ud800"}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
]
INVALID = [
    b"null",
    b"[]",
    b'"text"',
    b"12",
    b'{"user": "1"}',
    b'{"k": "10"}',
    b'{"k": 1.5}',
    b'{"k": true}',
    b'{"method": 3}',
    b'{"user_id": true}',
    b'{"user_id": ""}',
    b'{"user_id": 1.5}',
    b'{"user_id": ["1"]}',
    b'{"history": "1"}',
    b'{"history": [null]}',
    b'{"history": [{"item": "1"}]}',
    b'{"history": [{"id": "1", "liked": "yes"}]}',
    b'{"features": [1]}',
    b'{"features": {"age": {"a": 1}}}',
    b'{"features": {"age": [[1]]}}',
    b'{"features": {"age": "old"}}',
    b'{"features": {"colour": 1}}',
    b'{"where": {"colour": "red"}}',
    b'{"where": {"brand": 1}}',
    b'{"allow": "i1"}',
    b'{"keep_seen": 1}',
    json.dumps({"user_id": "u" * 513}).encode(),
    json.dumps({"features": {"motto": "x" * 10_001}}).encode(),
]


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_fault_D1_what_is_no_json_is_400(shared: Client, content: bytes) -> None:
    reply = shared.ask("POST", "/v1/recommend", content=content, headers=AS_JSON)
    assert reply.status_code in (400, 422)
    problem(reply, "malformed" if reply.status_code == 400 else "invalid")


@pytest.mark.parametrize("content", INVALID, ids=range(len(INVALID)))
def test_fault_D1_what_is_no_request_is_422_and_says_where(shared: Client, content: bytes) -> None:
    reply = shared.ask("POST", "/v1/recommend", content=content, headers=AS_JSON)
    problem(reply, "invalid")


def test_a_renamed_field_is_refused_with_its_new_name(shared: Client) -> None:
    told = problem(shared.post("/v1/recommend", {"user_id": "u1", "live": True}), "invalid")
    assert told["errors"] == [{"at": "body.live", "detail": "'live' is renamed to 'use_recent_events'"}]


def test_fault_D1_a_body_of_another_kind_is_415(shared: Client) -> None:
    for kind in ("text/plain", "application/jsonp", "application/x-www-form-urlencoded"):
        problem(
            shared.ask("POST", "/v1/recommend", content=b"{}", headers={"content-type": kind}), "unsupported-media-type"
        )
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    problem(shared.ask("POST", "/v1/recommend", content=b"{}", headers=packed), "unsupported-media-type")
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert shared.ask("POST", "/v1/recommend", content=b"{}", headers={"content-type": kind}).status_code == 200


def test_fault_D2_a_body_over_the_limit_is_413_with_and_without_its_length(make: Make) -> None:
    client = make(max_body=10_000)
    big = b'{"user_id": "' + b"u" * 20_000 + b'"}'
    told = problem(client.ask("POST", "/v1/recommend", content=big, headers=AS_JSON), "too-large")
    assert "10,000" in told["detail"]
    sent = 0

    async def pieces() -> Any:
        nonlocal sent
        for _ in range(1_000):
            sent += 1
            yield b"x" * 4_000

    problem(client.ask("POST", "/v1/recommend", content=pieces(), headers=AS_JSON), "too-large")
    assert sent <= 4  # the rest was never read
    lied = {"content-length": "1" * 30} | AS_JSON
    problem(client.ask("POST", "/v1/recommend", content=b"{}", headers=lied), "too-large")


def test_fault_D3_k_below_one_above_the_limit_and_above_the_catalogue(make: Make) -> None:
    client = make(max_k=200)
    for k in (0, -1, 201, 10**9, 2**63):
        problem(client.post("/v1/recommend", {"user_id": "u1", "k": k}), "invalid")
    reply = client.post("/v1/recommend", {"user_id": "u1", "k": 200, "keep_seen": True}).json()
    assert len(reply["items"]) == 40
    assert reply["truncated"] is True


def test_fault_D4_an_unknown_user_gets_popular_items_or_404(make: Make) -> None:
    reply = make().post("/v1/recommend", {"user_id": "nobody"}).json()
    assert reply["source"] == "popular"
    assert len(reply["items"]) == 10
    strict = make(unknown_user="404")
    problem(strict.post("/v1/recommend", {"user_id": "nobody"}), "unknown-user")
    assert strict.post("/v1/recommend", {"user_id": "nobody", "history": ["i1"]}).status_code == 200
    assert strict.post("/v1/recommend", {"user_id": "u1"}).status_code == 200
    assert strict.post("/v1/recommend", {}).status_code == 200


@pytest.mark.parametrize("method", [1, 2])
def test_fault_D5_filters_that_leave_few_or_none(shared: Client, method: int) -> None:
    few = shared.post(
        "/v1/recommend", {"user_id": "u1", "allow": ["i1", "i2", "none"], "keep_seen": True, "method": method}
    )
    assert sorted(ids(few)) == ["i1", "i2"]
    assert few.json()["truncated"] is True
    none = shared.post("/v1/recommend", {"user_id": "u1", "allow": [], "method": method})
    assert ids(none) == []
    assert none.json()["truncated"] is True
    nothing = shared.post("/v1/recommend", {"user_id": "u1", "where": {"brand": "no such"}, "method": method})
    assert ids(nothing) == []


def test_fault_D6_ten_thousand_banned_ids_and_still_k(make: Make) -> None:
    client = make()
    ban = [f"i{n}" for n in range(20)] + [f"x{n}" for n in range(9_980)]
    reply = client.post("/v1/recommend", {"user_id": "u1", "k": 10, "ban": ban, "keep_seen": True})
    assert len(ids(reply)) == 10
    assert not set(ids(reply)) & set(ban)
    told = problem(client.post("/v1/recommend", {"ban": [*ban, "one more"]}), "invalid")
    assert told["errors"][0]["at"] == "body.ban"
    for name in ("history", "events", "allow"):
        problem(client.post("/v1/recommend", {name: [*ban, "one more"]}), "invalid")
    problem(client.post("/v1/events", {"user_id": "u1", "events": [*ban, "one more"]}), "invalid")
    problem(client.post("/v1/recommend:batch", {"requests": [{}] * 101}), "invalid")


def test_fault_D8_a_client_that_goes_away_ends_its_batch_and_the_gauge_is_zero(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = []
    recommend = client.service.recommend

    async def counted(body: Any) -> Any:
        answered.append(1)
        return await recommend(body)

    monkeypatch.setattr(client.service, "recommend", counted)
    body = json.dumps({"requests": [{"user_id": "u1"}] * 100}).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        return

    scope = {"type": "http", "method": "POST", "path": "/v1/recommend:batch", "raw_path": b"/v1/recommend:batch",
             "query_string": b"", "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
             "server": ("127.0.0.1", 2), "scheme": "http", "root_path": "", "http_version": "1.1"}  # fmt: skip
    client.run(client.app(scope, receive, send))
    assert len(answered) < 20
    assert "twotower_in_flight_requests 1.0" in client.get("/metrics").text
    assert client.service.admission.expected_wait == 0


def test_fault_D8_a_client_that_goes_away_before_its_body_has_come_is_nobody(client: Client) -> None:
    messages = iter([{"type": "http.request", "body": b'{"k', "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/recommend", "raw_path": b"/v1/recommend",
             "query_string": b"", "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
             "server": ("127.0.0.1", 2), "scheme": "http", "root_path": "", "http_version": "1.1"}  # fmt: skip
    client.run(client.app(scope, receive, send))
    assert sent == []
    assert 'twotower_requests_total{route="gone",status="0"} 1.0' in client.get("/metrics").text


def test_fault_D8_a_cancelled_request_gives_its_turn_back(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async def never(body: Any) -> Any:
            await asyncio.sleep(30)

        monkeypatch.setattr(client.service, "recommend", never)
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            task = asyncio.create_task(http.post("/v1/recommend", json={}))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    client.run(go())
    assert client.service.admission._active_permits == 0
    assert "twotower_in_flight_requests 1.0" in client.get("/metrics").text


@pytest.fixture
def key_file(tmp_path: Path) -> tuple[Path, str, str]:
    """A file of keys, a key to ask with, and an admin's."""
    (ask, ask_lines), (boss, boss_lines) = api_keys.make_key("shop", False), api_keys.make_key("boss", True)
    (tmp_path / "keys.toml").write_text(ask_lines + boss_lines)
    return tmp_path / "keys.toml", ask, boss


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_fault_D9_without_a_valid_key_nothing_is_answered(
    make: Make, key_file: tuple[Path, str, str], caplog: pytest.LogCaptureFixture
) -> None:
    file, key, _ = key_file
    client = make(keys=file)
    caplog.set_level(logging.DEBUG)
    for headers in ({}, bearer(key[:-1]), bearer(""), {"authorization": f"Basic {key}"}, {"authorization": key}):
        reply = client.post("/v1/recommend", {"user_id": "u1"}, headers=headers)
        problem(reply, "unauthorized")
        assert reply.headers["www-authenticate"].startswith("Bearer")
        problem(client.get("/metrics", headers=headers), "unauthorized")
        problem(client.get("/v1/console/users/u1", headers=headers), "unauthorized")
    assert client.post("/v1/recommend", {"user_id": "u1"}, headers=bearer(key)).status_code == 200
    for path in ("/livez", "/readyz", "/openapi.json", "/"):
        assert client.get(path).status_code == 200
    assert key not in caplog.text
    assert key[:-1] not in caplog.text


def test_fault_D9_administration_is_elsewhere_and_needs_its_scope(
    make: Make, key_file: tuple[Path, str, str], store: Path
) -> None:
    file, key, boss = key_file
    client, admin = make(keys=file), make(keys=file, admin=True)
    for path in ("/v1/rollback", "/v1/reload"):
        problem(client.post(path, {}, headers=bearer(boss)), "not-found")
        problem(admin.post(path, {}), "unauthorized")
        problem(admin.post(path, {}, headers=bearer(key)), "key-scope")
    first, second = (b.id for b in Store(store).bundles())
    reply = admin.post("/v1/rollback", {"to": first, "reason": "a test"}, headers=bearer(boss))
    assert reply.json() == {"current": first, "serving": first}
    listed = admin.get("/v1/bundles", headers=bearer(boss)).json()
    assert [b["id"] for b in listed["bundles"] if b["current"]] == [first]
    assert listed["history"][-1]["reason"] == "a test"
    Store(store).rollback(first, reason="caf\udce9")
    assert admin.get("/v1/bundles", headers=bearer(boss)).json()["history"][-1]["reason"] == "caf?"
    assert admin.post("/v1/rollback", {"to": second}, headers=bearer(boss)).json()["serving"] == second
    problem(admin.post("/v1/rollback", {"to": "none"}, headers=bearer(boss)), "conflict")
    assert admin.post("/v1/reload", {}, headers=bearer(boss)).json() == {"serving": second, "refused": ""}
    told = problem(admin.post("/v1/rollback", {"to": "none"}, headers=bearer(boss)), "conflict")
    assert str(store) not in told["detail"]


def test_fault_D10_ids_of_requests_are_ours_or_harmless(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    good = client.post("/v1/recommend", {}, headers={"x-request-id": "abc-1.2_3"})
    assert good.headers["x-request-id"] == "abc-1.2_3"
    for bad in ("a b", "a" * 65, "a\tb", '"}{', "é", ""):
        reply = client.post("/v1/recommend", {}, headers={"x-request-id": bad.encode()})
        assert reply.headers["x-request-id"] not in ("", bad)
    client.post(
        "/v1/recommend", {"user_id": "secret person", "features": {"city": "secret city"}, "history": ["secret"]}
    )
    client.get("/v1/items/secret%0d%0aX-Evil:%201/similar")
    lines = [r for r in caplog.records if r.name == "twotower.access"]
    assert len(lines) == 9
    told = " ".join(json.dumps(fields(r)) for r in lines)
    assert "secret" not in told
    assert '"route": "/v1/recommend"' in told


# What a browser says of itself when a page of another origin asks, and of a page of this one.
FOREIGN = {
    "another site": {"origin": "http://evil.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    "another port of this machine": {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"},
    "a frame in a sandbox": {"origin": "null", "sec-fetch-site": "cross-site"},
    "no origin is told": {"sec-fetch-site": "cross-site"},
    "an old browser": {"origin": "http://evil.example"},
    "an old browser, another port": {"origin": "http://localhost:3000"},
    "an old browser, in a sandbox": {"origin": "null"},
    "a name that looks alike": {"origin": "http://localhost.evil.example"},
    "an extension": {"origin": "chrome-extension://localhost", "sec-fetch-site": "none"},
}
OWN = {
    "no browser": {},
    "the console": {"origin": "http://localhost", "sec-fetch-site": "same-origin"},
    "the console, what it only reads": {"sec-fetch-site": "same-origin"},
    "an address that was typed": {"sec-fetch-site": "none"},
    "an old browser": {"origin": "http://localhost"},
}
ASKED = [("POST", "/v1/recommend"), ("POST", "/v1/events"), ("GET", "/v1/console/users"), ("GET", "/metrics"),
         ("DELETE", "/v1/events/u1")]  # fmt: skip


@pytest.mark.parametrize("said", FOREIGN.values(), ids=FOREIGN)
def test_fault_G5_without_keys_a_page_of_another_origin_is_refused(shared: Client, said: dict[str, str]) -> None:
    body = {"user_id": "u1", "events": ["i1"]}
    for method, path in ASKED:
        problem(shared.ask(method, path, body if method == "POST" else None, headers=said), "foreign-origin")
    assert shared.post("/v1/recommend", {"user_id": "u1"}).json()["recent_events"] == 0
    for path in ("/", "/page/console.js", "/livez"):  # a link to the console works from anywhere
        assert shared.get(path, headers=said).status_code == 200


@pytest.mark.parametrize("said", OWN.values(), ids=OWN)
def test_fault_G5_the_console_and_programs_are_answered(shared: Client, said: dict[str, str]) -> None:
    for method, path in ASKED:
        body = {"user_id": "u1", "events": ["i1"]} if path == "/v1/events" else {} if method == "POST" else None
        assert shared.ask(method, path, body, headers=said).status_code in (200, 202, 204)


def test_fault_G5_the_console_works_by_any_name_and_behind_a_proxy(make: Make) -> None:
    client = make(host="0.0.0.0", insecure=True)

    def status(**said: str) -> int:
        return client.post("/v1/recommend", {}, headers={k.replace("_", "-"): v for k, v in said.items()}).status_code

    assert status(host="shop.lan:8000", origin="http://shop.lan:8000") == 200
    assert status(host="SHOP.lan", origin="https://shop.LAN") == 200  # TLS ends before
    assert status(host="shop.lan:443", origin="https://shop.lan") == 200
    assert status(host="[fd00::1]:8000", origin="http://[fd00::1]:8000") == 200
    assert status(host="10.0.0.7:8000", origin="https://shop.example", sec_fetch_site="same-origin") == 200
    assert status(host="10.0.0.7:8000", origin="https://shop.example") == 403  # the proxy has to pass the name on
    assert status(host="shop.lan:8000", origin="http://shop.lan") == 403
    assert status(host="shop.lan", origin="http://shop.lan:8000") == 403


def test_fault_G5_with_keys_the_key_is_what_counts(make: Make, key_file: tuple[Path, str, str]) -> None:
    file, key, _ = key_file
    client = make(keys=file)
    said = FOREIGN["another site"]
    problem(client.post("/v1/recommend", {}, headers=said), "unauthorized")
    assert client.post("/v1/recommend", {}, headers=said | bearer(key)).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain;charset=UTF-8", "application/x-www-form-urlencoded",
                                  "multipart/form-data; boundary=x", "text/plain; application/json", "application/json-seq"])  # fmt: skip
def test_fault_G5_every_body_says_that_it_is_json(
    make: Make, key_file: tuple[Path, str, str], kind: str | None
) -> None:
    file, _, boss = key_file
    body = b'{"user_id": "u1", "events": ["i1"]}'
    headers = {"content-type": kind} if kind else {}
    client, admin = make(), make(keys=file, admin=True)
    for path in ("/v1/events", "/v1/recommend", "/v1/recommend:batch", "/v1/console/explain"):
        problem(client.ask("POST", path, content=body, headers=headers), "unsupported-media-type")
    for path in ("/v1/rollback", "/v1/reload"):
        problem(admin.ask("POST", path, content=b"{}", headers=headers | bearer(boss)), "unsupported-media-type")
    assert client.post("/v1/recommend", {"user_id": "u1"}).json()["recent_events"] == 0


# ---- limits and overload


@pytest.mark.parametrize("second", ["2001:db8:0:1::2", "2001:db8:0:1:ffff::"])
def test_fault_E2_addresses_of_one_subscriber_are_one_client(make: Make, second: str) -> None:
    client = make(rate=0.001, burst=1)

    async def ask(whence: str) -> int:
        transport = httpx.ASGITransport(client.app, client=(whence, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return (await http.get("/v1/bundle")).status_code

    addresses = ("2001:db8:0:1::1", second, "2001:db8:0:2::1", "192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2")
    assert [client.run(ask(whence)) for whence in addresses] == [200, 429, 200, 200, 429, 200]


def test_fault_E2_a_client_above_its_rate_is_429_and_others_are_not(
    make: Make, key_file: tuple[Path, str, str]
) -> None:
    file, key, boss = key_file
    client = make(keys=file, rate=1, burst=3)
    replies = [client.post("/v1/recommend", {}, headers=bearer(key)) for _ in range(5)]
    assert [r.status_code for r in replies] == [200, 200, 200, 429, 429]
    problem(replies[-1], "rate-limit")
    assert int(replies[-1].headers["retry-after"]) >= 1
    assert client.post("/v1/recommend", {}, headers=bearer(boss)).status_code == 200
    assert client.get("/livez").status_code == 200


def test_fault_E1_more_than_can_be_answered_is_refused_at_once(make: Make) -> None:
    client = make(max_wait=1.0, target_wait=0.5)
    client.service.admission._first_service_time = 0.1

    async def go() -> list[httpx.Response]:
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await asyncio.gather(*(http.post("/v1/recommend", json={"user_id": "u1"}) for _ in range(20)))

    replies = client.run(go())
    statuses = [r.status_code for r in replies]
    assert set(statuses) == {200, 503}
    refused = next(r for r in replies if r.status_code == 503)
    problem(refused, "overload")
    assert refused.headers["retry-after"] == "1"
    assert client.post("/v1/recommend", {"user_id": "u1"}).status_code == 200
    assert 'twotower_refused_total{problem="overload"}' in client.get("/metrics").text


def test_fault_E6_single_requests_have_their_turns_between_those_of_a_batch(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    answer = client.service.answer

    def noted(body: Any, *rest: Any) -> Any:
        order.append("batch" if body.k == 9 else "single")
        time.sleep(0.002)
        return answer(body, *rest)

    monkeypatch.setattr(client.service, "answer", noted)

    async def go() -> None:
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            batch = asyncio.create_task(http.post("/v1/recommend:batch", json={"requests": [{"k": 9}] * 60}))
            while len(order) < 5:
                await asyncio.sleep(0.001)
            for _ in range(5):
                assert (await http.post("/v1/recommend", json={"k": 3})).status_code == 200
            assert not batch.done()
            assert len((await batch).json()["replies"]) == 60

    client.run(go())
    first, last = order.index("single"), len(order) - 1 - order[::-1].index("single")
    assert last - first < 40  # five singles, each after at most a few of the batch's
    assert order.count("batch") == 60


def test_fault_G16_the_large_batch_of_a_client_leaves_another_its_turns(
    make: Make, key_file: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the bodies of batches and looks are read in turns: one of each is read between two ordinary answers."""
    file, key, boss = key_file
    client = make(keys=file, max_wait=60_000.0, target_wait=60_000.0)
    order: list[str] = []
    parse, answer = orjson.loads, client.service.answer

    def parsed(data: bytes) -> Any:
        order.append("read" if len(data) > 100_000 else "ordinary")
        return parse(data)

    def answered(body: Any, *rest: Any) -> Any:
        order.append("batch" if body.k == 9 else "answer")
        return answer(body, *rest)

    monkeypatch.setattr(client.service, "answer", answered)

    async def go() -> None:
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as http:
            entries = [f"i{n % 40}" for n in range(1_000)]
            large = {"requests": [{"k": 9, "history": entries}] * 20}
            explain = {"k": 9, "ban": [f"{n:0>20}" for n in range(9_000)]}
            busy = [
                asyncio.create_task(http.post("/v1/recommend:batch", json=large, headers=bearer(key))) for _ in range(4)
            ]
            busy += [
                asyncio.create_task(http.post("/v1/console/explain", json=explain, headers=bearer(key)))
                for _ in range(4)
            ]
            while "read" not in order:
                await asyncio.sleep(0)
            for _ in range(10):
                assert (await http.post("/v1/recommend", json={"k": 3}, headers=bearer(boss))).status_code == 200
            assert not all(task.done() for task in busy)
            assert {(await task).status_code for task in busy} <= {200, 503}

    with monkeypatch.context() as patch:
        patch.setattr(orjson, "loads", parsed)
        client.run(go())
    ordinary = [place for place, what in enumerate(order) if what == "ordinary"]
    between = [order[a:b].count("read") for a, b in itertools.pairwise([0, *ordinary])]
    assert max(between) <= 2
    assert order.count("read") > 2


def test_looks_beyond_the_bound_are_refused_and_do_not_count_as_answers(client: Client) -> None:
    async def go() -> list[int]:
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            asked = (http.post("/v1/console/explain", json={"user_id": "u1"}) for _ in range(40))
            return [r.status_code for r in await asyncio.gather(*asked)]

    statuses = client.run(go())
    assert statuses.count(200) == 8
    assert statuses.count(503) == 32
    assert client.post("/v1/console/explain", {"user_id": "u1"}).status_code == 200
    assert "twotower_answers_total{" not in client.get("/metrics").text


def test_batches_beyond_the_bound_are_refused(client: Client) -> None:
    async def go() -> list[int]:
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            body = {"requests": [{"user_id": "u1"}] * 30}
            return [
                r.status_code
                for r in await asyncio.gather(*(http.post("/v1/recommend:batch", json=body) for _ in range(9)))
            ]

    statuses = client.run(go())
    assert statuses.count(503) == 5
    assert statuses.count(200) == 4


@pytest.mark.parametrize("event_store", ["memory", "redis://127.0.0.1:1/0"])
def test_fault_G6_who_goes_for_want_of_room_is_counted_and_others_are_remembered(make: Make, event_store: str) -> None:
    client = make(event_memory=20_000, event_store=event_store)
    for n in range(100):
        events = [*("i1" for _ in range(50)), *(f"{n}/{place}/{'x' * 500}" for place in range(21))]
        added = client.post("/v1/events", {"user_id": f"{n}{'u' * 400}", "events": events})
        assert added.json()["recent_events"] == 70  # twenty of items that nobody knows
    last = client.post("/v1/recommend", {"user_id": f"99{'u' * 400}"}).json()
    assert (last["recent_events"], last["method"]) == (70, 2)
    assert client.post("/v1/recommend", {"user_id": f"0{'u' * 400}"}).json()["recent_events"] == 0
    text = client.get("/metrics").text
    assert 'twotower_events_dropped_total{what="event"} 100.0' in text
    dropped, taken = (
        float(next(line for line in text.splitlines() if line.startswith(f"twotower_event{name} ")).rpartition(" ")[2])
        for name in (r's_dropped_total{what="user"}', "_memory_bytes")
    )
    assert dropped >= 98
    assert 0 < taken <= 20_000


def test_events_that_other_workers_would_not_see_are_refused(make: Make) -> None:
    client = make(workers=2)
    told = problem(client.post("/v1/events", {"user_id": "u1", "events": ["i1"]}), "conflict")
    assert "--event-store redis://" in told["detail"]


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


# ---- the store


def test_fault_A8_current_that_points_nowhere_is_alive_and_not_ready(store: Path, make: Make, tmp_path: Path) -> None:
    broken = tmp_path / "store"
    shutil.copytree(store, broken)
    (broken / "CURRENT").write_text("20200101T000000Z-abcdef\n")
    client = make(at=broken)
    assert client.get("/livez").status_code == 200
    told = problem(client.get("/readyz"), "no-bundle")
    assert "available: " in told["detail"]
    problem(client.post("/v1/recommend", {}), "no-bundle")
    assert 'twotower_bundle_load_failures_total{reason="missing"} 1.0' in client.get("/metrics").text
    Store(broken).rollback(Store(broken).bundles()[0].id)
    client.run(client.service.bundles.refresh())
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize("name", ["CURRENT", "HISTORY.jsonl", "MANIFEST.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "huge", "link"])
@pytest.mark.parametrize("cold", [True, False])
def test_fault_G7_what_is_no_file_of_a_store_changes_nothing_but_a_counter(
    store: Path, make: Make, tmp_path: Path, name: str, kind: str, cold: bool
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    first, second = (b.id for b in Store(copy).bundles())
    Store(copy).rollback(first)
    client = make(at=copy, load=not cold)
    path = copy / "bundles" / second / name if name == "MANIFEST.json" else copy / name
    (copy / "CURRENT").write_text(second + "\n")
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 30)
    client.run(asyncio.wait_for(client.service.bundles.refresh(), 60))
    assert client.get("/livez").status_code == 200
    if name == "HISTORY.jsonl":  # tells where live events may be, and no more
        assert client.get("/v1/bundle").json()["bundle_id"] == second
    else:
        if cold:
            assert str(tmp_path) not in problem(client.get("/readyz"), "no-bundle")["detail"]
        else:
            assert client.get("/v1/bundle").json()["bundle_id"] == first
            assert len(client.post("/v1/recommend", {"user_id": "u1"}).json()["items"]) == 10
        assert "twotower_bundle_load_failures_total{reason=" in client.get("/metrics").text
    listed = client.get("/v1/console/bundles")
    if name == "CURRENT":
        assert "CURRENT: cannot be read" in problem(listed, "bundle-store")["detail"]
    else:
        assert [b["id"] for b in listed.json()["bundles"]] == [first, second]


def until_free(bundles: BundleManager) -> None:
    """Wait until no thread is at the store."""
    while bundles.busy:
        time.sleep(0.01)


def test_fault_G7_a_store_that_hangs_holds_one_thread_and_the_old_bundle_answers(
    store: Path, make: Make, monkeypatch: pytest.MonkeyPatch, key_file: tuple[Path, str, str]
) -> None:
    limits = BundleLimits(check_timeout=0.2, retry_pauses=(0.0,))
    client = make(limits=limits)
    go_on, hanging, plain = threading.Event(), threading.Event(), os.open

    def hangs(path: Any, *more: Any, **named: Any) -> int:
        if str(path).endswith("CURRENT"):
            hanging.set()
            go_on.wait(60)
        return plain(path, *more, **named)

    admin = make(keys=key_file[0], admin=True, limits=limits)
    before = threading.active_count()
    monkeypatch.setattr("os.open", hangs)
    try:
        for _ in range(5):
            assert not client.run(client.service.bundles.refresh())
        assert hanging.is_set()
        assert client.service.bundles.last_error == "the store does not answer"
        assert 'twotower_bundle_load_failures_total{reason="store"} 5.0' in client.get("/metrics").text
        assert client.get("/readyz").status_code == 200
        assert len(client.post("/v1/recommend", {"user_id": "u1"}).json()["items"]) == 10
        problem(client.get("/v1/console/bundles"), "bundle-store")
        problem(client.post("/v1/console/explain?bundle=20200101T000000Z-abcdef", {"user_id": "u1"}), "unknown-bundle")
        for method, path in (("GET", "/v1/bundles"), ("POST", "/v1/rollback"), ("POST", "/v1/reload")):
            told = admin.ask(method, path, {} if method == "POST" else None, headers=bearer(key_file[2]))
            problem(told, "bundle-store")
        assert threading.active_count() <= before + 2  # of each service one
        assert client.service.bundles.busy
    finally:
        go_on.set()
    until_free(client.service.bundles)
    client.run(client.service.bundles.refresh())
    assert client.service.bundles.last_error == ""
    assert client.get("/v1/console/bundles").status_code == 200


def test_fault_A3_a_damaged_bundle_is_refused_counted_and_the_old_one_answers(
    store: Path, make: Make, tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    first, second = (b.id for b in Store(copy).bundles())
    Store(copy).rollback(first)
    client = make(at=copy)
    assert client.get("/v1/bundle").json()["bundle_id"] == first
    file = copy / "bundles" / second / "index" / "vectors.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (copy / "CURRENT").write_text(second + "\n")
    client.run(client.service.bundles.refresh())
    assert client.get("/v1/bundle").json()["bundle_id"] == first
    assert client.get("/readyz").status_code == 200
    assert 'twotower_bundle_load_failures_total{reason="checksum"} 1.0' in client.get("/metrics").text
    client.run(client.service.bundles.refresh())  # not at every look
    assert 'twotower_bundle_load_failures_total{reason="checksum"} 1.0' in client.get("/metrics").text
    data[-1] ^= 1
    file.write_bytes(data)
    (copy / "CURRENT").touch()
    client.run(client.service.bundles.refresh())
    assert client.get("/v1/bundle").json()["bundle_id"] == second


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hostile_towers.subgraph, "the operator 'If'"),
        (hostile_towers.endless_loop, "the operator 'Loop'"),
        (hostile_towers.years, "seconds"),
        (hostile_towers.bomb_at_load, "MB"),
    ],
)  # fmt: skip
def test_fault_G1_G2_a_foreign_tower_is_refused_counted_and_the_old_bundle_answers(
    change: Any, said: str, store: Path, make: Make, key_file: tuple[Path, str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    (copy / hostile_towers.SECRET).write_bytes(bytes(400))
    monkeypatch.chdir(copy)
    old = Store(copy).current().id
    forged = hostile_towers.forged(copy, {"user_tower.onnx": hostile_towers.of(change)})
    file, key, boss = key_file
    admin = make(at=copy, keys=file, admin=True, limits=BundleLimits(inspect_seconds=0.3))
    service = admin.service
    client = Client(service, RequestMiddleware(create_app(service), service, ApiKeys(file), False), admin.loop)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = admin.post("/v1/rollback", {"to": forged}, headers=bearer(boss))
    assert told.json() == {"current": forged, "serving": old}
    told = admin.post("/v1/reload", {}, headers=bearer(boss)).json()
    assert told["serving"] == old
    assert said in told["refused"]
    assert 'twotower_bundle_load_failures_total{reason="tower"} 2.0' in client.get("/metrics", headers=bearer(key)).text
    assert [fields(r)["reason"] for r in caplog.records if r.getMessage() == "bundle refused"] == ["tower"] * 2
    reply = client.post("/v1/recommend", {"user_id": "u1", "method": 2}, headers=bearer(key))
    assert reply.json()["bundle_id"] == old
    assert admin.post("/v1/rollback", {"to": old}, headers=bearer(boss)).json() == {"current": old, "serving": old}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_fault_G2_a_tower_that_asks_for_gigabytes_only_for_some_users_costs_an_error_and_no_memory(
    store: Path, make: Make, tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    forged = hostile_towers.forged(copy, {"user_tower.onnx": hostile_towers.of(hostile_towers.bomb_at_a_code)})
    Store(copy).rollback(forged)
    client = make(at=copy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asked = [client.post("/v1/recommend", {"user_id": f"u{i}", "method": 2}) for i in (0, 59, 1)]
    assert [reply.status_code for reply in asked] == [200, 500, 200]
    problem(asked[1], "internal-error")
    assert asked[2].json()["bundle_id"] == forged
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 << 20  # KiB


def test_fault_E5_a_bundle_that_does_not_fit_the_memory_is_refused(store: Path, make: Make) -> None:
    client = make(memory_limit=1_000_000)
    told = problem(client.get("/readyz"), "no-bundle")
    assert "MB are free" in told["detail"]
    assert 'twotower_bundle_load_failures_total{reason="memory"} 1.0' in client.get("/metrics").text


def test_fault_E5_the_limit_of_every_control_group_counts(tmp_path: Path) -> None:
    proc, root = tmp_path / "cgroup", tmp_path / "sys"
    inner = root / "system.slice" / "twotower.service"
    inner.mkdir(parents=True)
    proc.write_text("0::/system.slice/twotower.service\n")
    for folder, most in ((inner, "max"), (inner.parent, "1000000")):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text("400000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    groups = bundles.control_groups(proc, root)
    assert groups == [inner, inner.parent, root]
    assert [bundles.free_in_group(group) for group in groups] == [None, 700_000, None]
    old = root / "memory" / "docker"
    old.mkdir(parents=True)
    proc.write_text("7:cpu:/docker\n5:memory:/docker\n")
    (old / "memory.limit_in_bytes").write_text("500")
    (old / "memory.usage_in_bytes").write_text("100")
    (old / "memory.stat").write_text("total_inactive_file 7\n")
    assert bundles.control_groups(proc, root) == [old, old.parent]
    assert bundles.free_in_group(old) == 407


def test_fault_E5_workers_share_the_memory() -> None:
    bundles.check_memory(600, 0, 1, available=lambda: 1_000)
    with pytest.raises(BundleError, match="MB are free"):
        bundles.check_memory(600, 0, 2, available=lambda: 1_000)


def test_a_bundle_that_was_compared_with_goes_at_the_next_swap(client: Client, store: Path) -> None:
    first, second = (b.id for b in Store(store).bundles())
    client.get(f"/v1/console/map?bundle={first}")
    other = client.service.bundles._comparison
    assert other is not None
    Store(store).rollback(first)
    client.run(client.service.bundles.refresh())
    assert client.service.bundles.retriever is other  # it was loaded already
    assert client.service.bundles._comparison is None
    client.get(f"/v1/console/map?bundle={second}")
    Store(store).rollback(second)
    client.run(client.service.bundles.refresh())
    assert client.service.bundles._comparison is None


def test_whoever_looks_for_bundles_goes_on_looking(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    async def broken(again: bool = False) -> bool:
        looked.append(1)
        raise ValueError("nobody thought of it")

    monkeypatch.setattr(client.service.bundles, "refresh", broken)

    async def go() -> None:
        task = asyncio.create_task(client.service.bundles.watch(0.001))
        while len(looked) < 3:
            await asyncio.sleep(0.001)
        task.cancel()

    client.run(go())


def test_recent_events_outlive_a_swap(store: Path, make: Make) -> None:
    first, second = (b.id for b in Store(store).bundles())
    client = make()
    client.post("/v1/events", {"user_id": "u1", "events": ["i1"]})
    Store(store).rollback(first)
    client.run(client.service.bundles.refresh())
    reply = client.post("/v1/recommend", {"user_id": "u1"}).json()
    assert (reply["bundle_id"], reply["recent_events"]) == (first, 1)
    Store(store).rollback(second)
    client.run(client.service.bundles.refresh())
    reply = client.post("/v1/recommend", {"user_id": "u1"}).json()
    assert (reply["bundle_id"], reply["recent_events"]) == (second, 1)


# ---- the console's data


def test_the_console_finds_users_and_items(shared: Client, retriever: Retriever) -> None:
    found = shared.get("/v1/console/users?query=u1&limit=3").json()
    assert [u["id"] for u in found["users"]] == ["u1", "u10", "u11"]
    assert found["total"] == 11
    assert shared.get("/v1/console/users").json()["total"] == 60
    items = shared.get("/v1/console/items?query=ITEM%203").json()
    assert [i["title"] for i in items["items"]][:1] == ["Item 3"]
    assert items["total"] == 11
    assert shared.get("/v1/console/items?query=i7").json()["items"] == [{"id": "i7", "title": "Item 7"}]
    user = shared.get("/v1/console/users/u3").json()
    assert user["features"]["city"] == "city3"
    assert [(e["id"], e["title"], e["liked"]) for e in user["history"]] == retriever.history("u3", 100)
    problem(shared.get("/v1/console/users/none"), "unknown-user")


def test_the_console_explains_an_answer(shared: Client, retriever: Retriever) -> None:
    body = {"user_id": "u3", "k": 5, "events": ["i1"], "ban": ["i2"], "where": {"brand": "brand1"}}
    told = shared.post("/v1/console/explain", body).json()
    assert told["reply"]["items"] == shared.post("/v1/recommend", body).json()["items"]
    assert told["history"][-1] == {"id": "i1", "title": "Item 1", "liked": True}
    met = set(retriever.seen_items("u3")) | {"i1"}
    assert told["filtered"]["seen"] == len(met)
    assert told["filtered"]["banned"] == 1
    assert told["filtered"]["where"] == 8
    assert {i["id"] for i in told["filtered"]["items"]} <= met | {"i2"}
    whole = retriever.recommend(Request("u3", events=[("i1", True)]), 40, 2, where={"brand": "brand1"}, keep_seen=True)
    given = {i["id"] for i in told["reply"]["items"]}
    out = [i.id for i in whole.items if i.id not in given]  # one brand has eight items: all that was met was left out
    assert [i["id"] for i in told["filtered"]["items"]] == out
    kept = shared.post("/v1/console/explain", {**body, "ban": [], "keep_seen": True}).json()["filtered"]
    assert (kept["seen"], kept["items"]) == (0, [])
    assert shared.post("/v1/console/explain", {"ban": ["zzz", "i1"]}).json()["filtered"]["banned"] == 1
    (gate,) = told["gates"]
    assert gate["name"] == "pair 1"
    assert len(gate["fields"]) == len(gate["weights"])
    assert "city" in gate["fields"]
    assert all(-3 <= x <= 3 for x in told["point"])
    changed = shared.post("/v1/console/explain", {**body, "features": {"city": "city1"}}).json()
    assert changed["gates"][0]["weights"] != gate["weights"]
    assert changed["point"] != told["point"]
    nobody = shared.post("/v1/console/explain", {}).json()
    assert nobody["point"] is None
    assert nobody["gates"] == []


def test_the_console_maps_the_items(shared: Client) -> None:
    told = shared.get("/v1/console/map?column=tags").json()
    assert set(told["columns"]) == {"brand", "tags"}
    assert sorted(told["ids"]) == sorted(f"i{n}" for n in range(40))
    assert told["groups"] == ["t0"]
    by_id = {i: g for i, (_, _, g) in zip(told["ids"], told["points"], strict=True)}
    assert [by_id[f"i{n}"] for n in range(4)] == [-1, 0, 0, 0]
    points = np.array([p[:2] for p in told["points"]])
    assert (np.abs(points) <= 1).mean() > 0.95
    assert points.std() > 0.05
    assert len(shared.get("/v1/console/map?limit=7").json()["ids"]) == 7
    problem(shared.get("/v1/console/map?column=colour"), "invalid")


def test_the_console_asks_another_bundle(client: Client, store: Path) -> None:
    first, second = (b.id for b in Store(store).bundles())
    listed = client.get("/v1/console/bundles").json()["bundles"]
    assert [(b["id"], b["current"]) for b in listed] == [(first, False), (second, True)]
    told = client.post(f"/v1/console/explain?bundle={first}", {"user_id": "u1"}).json()
    assert told["reply"]["bundle_id"] == first
    assert told["reply"]["items"] == [
        {"id": i.id, "score": i.score, "title": i.title}
        for i in Retriever(Store(store).open(first)).recommend(Request("u1"), 10).items
    ]
    assert client.get("/v1/bundle").json()["bundle_id"] == second
    assert client.get(f"/v1/console/map?bundle={first}").json()["bundle_id"] == first
    client.post("/v1/events", {"user_id": "u1", "events": ["i1"]})
    client.post("/v1/recommend", {"user_id": "u1"})  # keeps a vector of the current bundle
    told = client.post(f"/v1/console/explain?bundle={first}", {"user_id": "u1"}).json()["reply"]
    wanted = Retriever(Store(store).open(first)).recommend(Request("u1", events=[("i1", True)]), 10, 2)
    assert [(i["id"], i["score"]) for i in told["items"]] == [(i.id, i.score) for i in wanted.items]
    problem(client.get("/v1/console/map?bundle=none"), "unknown-bundle")
    problem(client.post("/v1/console/explain?bundle=../../etc", {}), "unknown-bundle")


def test_the_page_is_there_with_a_strict_policy_and_can_be_left_out(make: Make) -> None:
    client = make()
    reply = client.get("/")
    assert reply.status_code == 200
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    problem(client.get("/page/none.js"), "not-found")
    problem(client.get("/page/..%2fapp.py"), "not-found")
    without = make(console=False)
    for path in ("/", "/page/console.js", "/v1/console/users", "/v1/console/map"):
        problem(without.get(path), "not-found")
