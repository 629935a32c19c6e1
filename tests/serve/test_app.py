"""Routes of the service, called in this process: answers, and rows C and D of the faults."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import httpx
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from service_client import AS_JSON, Client, Make, bearer, by_path, fields, ids, problem
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

import twotower
from twotower.data.tables import check
from twotower.retrieval.request import Method, Request
from twotower.retrieval.retriever import Retriever
from twotower.serve.problems import PROBLEMS
from twotower.serve.redis_events import RedisEvents
from twotower.store.store import Store


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
    assert "use method 2" in told["detail"]


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
