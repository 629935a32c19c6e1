"""A request is resolved once, and its way through the package is straight."""

from __future__ import annotations

from typing import Any

import pytest
from request_way import Way
from service_client import Client

HISTORY = ["i1", {"id": "i2", "liked": False}, "unheard of"]
EVENTS = ["i3", {"id": "i1", "liked": False}]
BODIES = [
    {"user_id": "u1"},
    {"user_id": "u1", "method": 2, "ban": ["i7"], "where": {"brand": "brand1"}},
    {"user_id": "u2", "features": {"age": 30}, "history": HISTORY, "events": EVENTS, "k": 5},
    {"history": HISTORY},
]


def way_of(client: Client, path: str, body: Any) -> Way:
    """The way of a request whose like was answered before."""
    assert client.post(path, body).status_code == 200
    way = Way()
    with way.traced():
        assert client.post(path, body).status_code == 200
    return way


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/embed/user", "/v1/console/explain"])
@pytest.mark.parametrize("body", BODIES, ids=["method 1", "method 2", "history", "new user"])
def test_a_request_is_resolved_once(shared: Client, path: str, body: dict[str, Any]) -> None:
    if "embed" in path:
        body = {name: value for name, value in body.items() if name not in ("k", "ban", "where")}
    way = way_of(shared, path, body)
    has_events = "history" in body or "events" in body
    assert [way.calls[name] for name in ("Service.resolve", "QueryReader.read", "EventTypes.read")] == [
        1, 1, int(has_events),
    ]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=["method 1", "method 2", "history", "new user"])
def test_a_request_goes_down_through_seven_rooms_and_enters_nothing_twice(shared: Client, body: dict[str, Any]) -> None:
    way = way_of(shared, "/v1/recommend", body)
    assert way.rooms[:2] == ["serve", "retrieval"]
    assert len(way.rooms) <= 7, way.rooms
    assert {name: n for name, n in way.entries.items() if n > 1} == {}


def test_recent_events_are_resolved_with_the_request(shared: Client) -> None:
    assert shared.post("/v1/events", {"user_id": "u3", "events": ["i4", "i5"]}).status_code == 202
    way = way_of(shared, "/v1/recommend", {"user_id": "u3", "events": EVENTS})
    assert [way.calls[name] for name in ("Service.resolve", "QueryReader.read", "EventTypes.read")] == [1, 1, 1]
    assert {name: n for name, n in way.entries.items() if n > 1} == {}
