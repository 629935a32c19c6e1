"""Errors of routes (rows D1 and G14 of the faults)."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

import pytest
from service_client import AS_JSON, Client, by_path, fields, problem


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
    assert client.service.admission._empty
    assert 'twotower_requests_total{route="/v1/recommend",status="500"} 1.0' in client.get("/metrics").text
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize("wrong", ["%FF", "%ED%A0%80", "%C0%AE", "a%E2%82", "%F5%80%80%80"])
def test_fault_G14_bytes_that_are_no_text_are_refused(shared: Client, wrong: str) -> None:
    shared.post("/v1/events", {"user_id": unquote(wrong), "events": ["i1"]})
    for method, path, query in (
        ("DELETE", f"/v1/events/{wrong}", ""), ("DELETE", "/v1/events", f"user_id={wrong}"),
        ("GET", f"/v1/items/{wrong}/similar", ""),
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
    b'{"method": true}',
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
    b'{"where": {"year": "MCMXCIII"}}',
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


FORMS = (
    "expected an item id (text or a whole number), or an object with id and, where the model reads them, liked or "
    "event, and time"
)


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ({"events": [None]}, [("events.0", f"found null, {FORMS}")]),
        ({"history": ["i1", True, ["i1"]]}, [("history.1", f"found true, {FORMS}"), ("history.2",
            f'found ["i1"], {FORMS}')]),
        ({"events": [[1] * 30]}, [("events.0", f"found [{'1, ' * 13}…, {FORMS}")]),
        ({"events": [{"id": "i1", "liked": "yes"}]}, [("events.0.liked", "Input should be a valid boolean")]),
        ({"events": [{"item": "i1"}]}, [("events.0.id", "Field required"), ("events.0.item", "Extra inputs are not "
            "permitted")]),
        ({"features": {"age": {}}}, [("features.age", "found an object, expected text, a number, true, false, null, or "
            "a list of these")]),
        ({"features": {"age": [1, [2]]}}, [("features.age", "found a list in a list, expected text, a number, true, "
            "false, null, or a list of these")]),
    ],
)  # fmt: skip
def test_a_value_of_several_forms_is_refused_once_with_what_is_allowed(
    shared: Client, body: dict[str, Any], errors: list[tuple[str, str]]
) -> None:
    told = problem(shared.post("/v1/recommend", {"user_id": "u1", **body}), "invalid")
    assert [(error["at"], error["detail"]) for error in told["errors"]] == [(f"body.{at}", d) for at, d in errors]
    assert told["detail"].startswith(f"body.{errors[0][0]}: {errors[0][1]}")
