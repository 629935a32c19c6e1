"""Requests before they are answered: keys, origins, bodies, limits, and permits between clients."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from service_client import AS_JSON, Client, Make, bearer, fields, problem


def test_a_page_of_another_site_cannot_ask_by_another_name(make: Make, key_file: tuple[Path, str, str]) -> None:
    client = make()
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert client.post("/v1/recommend", {}, headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80"):
        problem(client.get("/v1/console/users", headers={"host": host}), "foreign-host")
    file, key, _ = key_file
    kept = make(keys=file)
    assert kept.post("/v1/recommend", {}, headers={"host": "shop.example", **bearer(key)}).status_code == 200


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
    answer = client.service.recommender.answer

    def noted(body: Any, *rest: Any) -> Any:
        order.append("batch" if body.k == 9 else "single")
        time.sleep(0.002)
        return answer(body, *rest)

    monkeypatch.setattr(client.service.recommender, "answer", noted)

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
    parse, answer = orjson.loads, client.service.recommender.answer

    def parsed(data: bytes) -> Any:
        order.append("read" if len(data) > 100_000 else "ordinary")
        return parse(data)

    def answered(body: Any, *rest: Any) -> Any:
        order.append("batch" if body.k == 9 else "answer")
        return answer(body, *rest)

    monkeypatch.setattr(client.service.recommender, "answer", answered)

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
