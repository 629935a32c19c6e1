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
from service_client import Client, Make, bearer, fields, problem


def test_fault_D8_a_cancelled_request_gives_its_turn_back(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async def never(*_: Any) -> Any:
            await asyncio.sleep(30)

        monkeypatch.setattr(client.service, "resolve", never)
        async with client.http() as http:
            task = asyncio.create_task(http.post("/v1/recommend", json={}))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    client.run(go())
    assert client.service.admission._active_permits == 0
    assert "twotower_in_flight_requests 1.0" in client.get("/metrics").text


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


def test_fault_E1_more_than_can_be_answered_is_refused_at_once(make: Make) -> None:
    client = make(max_wait=1.0, target_wait=0.5)
    client.service.admission._first_service_time = 0.1

    async def go() -> list[httpx.Response]:
        async with client.http() as http:
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
        async with client.http() as http:
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
        async with client.http() as http:
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


def test_fault_G33_the_openapi_document_is_made_once_and_is_a_request_like_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, made = make(rate=0.001, burst=2), []
    dumps = orjson.dumps
    monkeypatch.setattr(orjson, "dumps", lambda value: made.append(value) or dumps(value))  # type: ignore[func-returns-value]
    replies = [client.get("/openapi.json") for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[0].content == replies[1].content
    assert len([value for value in made if "openapi" in value]) == 1
    assert 'requests_total{route="/openapi.json",status="200"} 2.0' in client.get("/metrics").text
    monkeypatch.setattr(client.service.admission, "overloaded", lambda *_: True)
    problem(client.get("/openapi.json"), "overload")
    assert client.get("/metrics").status_code == 200  # an operator needs them most in an overload


def test_fault_G33_only_health_checks_need_no_permit(client: Client) -> None:
    async def go() -> None:
        async with client.http() as http:
            async with client.service.admission.permit("another"):
                waiting = [asyncio.create_task(http.get(path)) for path in ("/metrics", "/openapi.json", "/", "/none")]
                for path in ("/livez", "/readyz") * 10:
                    assert (await http.get(path)).status_code == 200
                    await asyncio.sleep(0)
                assert not any(task.done() for task in waiting)
            assert [(await task).status_code for task in waiting] == [200, 200, 200, 404]

    client.run(go())
