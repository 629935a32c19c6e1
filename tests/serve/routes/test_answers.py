"""Routes of the service, called in this process: answers, and rows C and D of the faults."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from service_client import Client, Make, ids, problem

from twotower.retrieval.request import Method, Request
from twotower.retrieval.retriever import Retriever


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


def test_what_is_unknown_is_told_once_each_in_its_order(shared: Client) -> None:
    items = [f"x{n % 5_000}" for n in range(10_000)]
    reply = shared.post("/v1/recommend", {"user_id": "u1", "history": items, "features": {"city": "nowhere"}}).json()
    assert sorted(reply["unknown"]) == sorted(["city", *items[:5_000]])
    assert [u for u in reply["unknown"] if u != "city"] == items[:5_000]


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


@pytest.mark.parametrize("id_", ["7", 7, 2**64 - 1, "é☃", "a" * 512, "a/b?c#d", "\u0000", " "])
def test_fault_C8_an_id_of_any_kind_comes_through(shared: Client, id_: Any) -> None:
    reply = shared.post("/v1/recommend", {"user_id": id_, "history": [id_], "ban": [id_]})
    assert reply.status_code == 200
    assert reply.json()["unknown"] == [str(id_)]
    assert shared.post("/v1/events", {"user_id": id_, "events": [{"id": id_}]}).status_code == 202
    assert shared.post("/v1/recommend", {"user_id": id_}).json()["recent_events"] == 1


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
    broken = problem(client.post("/v1/recommend:batch", {"requests": [{"k": 3}, {"k": "3"}]}), "invalid")
    assert broken["errors"][0]["at"] == "body.requests.1.k", "a broken request fails all, and is named"


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
    assert client.service.admission._empty


def test_batches_beyond_the_bound_are_refused(client: Client) -> None:
    async def go() -> list[int]:
        async with client.http() as http:
            body = {"requests": [{"user_id": "u1"}] * 30}
            return [
                r.status_code
                for r in await asyncio.gather(*(http.post("/v1/recommend:batch", json=body) for _ in range(9)))
            ]

    statuses = client.run(go())
    assert statuses.count(503) == 5
    assert statuses.count(200) == 4
