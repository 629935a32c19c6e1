"""Bodies of requests and their limits (rows D1, D2, D8 and G5 of the faults)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from service_client import AS_JSON, Client, Make, bearer, problem


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


@pytest.mark.parametrize("kind", [None, "text/plain;charset=UTF-8", "application/x-www-form-urlencoded",
                                  "multipart/form-data; boundary=x", "text/plain; application/json",
                                  "application/json-seq"])  # fmt: skip
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
