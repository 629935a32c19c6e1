"""Data of the console, over HTTP in this process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from service_client import Client, problem

from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever, stored_history, stored_items
from twotower.store.store import Store


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
    assert [(e["id"], e["title"], e["liked"]) for e in user["history"]] == stored_history(retriever, "u3", 100)
    problem(shared.get("/v1/console/users/none"), "unknown-user")


def test_the_console_explains_an_answer(shared: Client, retriever: Retriever) -> None:
    body = {"user_id": "u3", "k": 5, "events": ["i1"], "ban": ["i2"], "where": {"brand": "brand1"}}
    told = shared.post("/v1/console/explain", body).json()
    assert told["reply"]["items"] == shared.post("/v1/recommend", body).json()["items"]
    assert told["history"][-1] == {"id": "i1", "title": "Item 1", "liked": True}
    met = set(stored_items(retriever, "u3")) | {"i1"}
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


def test_looks_beyond_the_bound_are_refused_and_do_not_count_as_answers(client: Client) -> None:
    async def go() -> list[int]:
        async with client.http() as http:
            asked = (http.post("/v1/console/explain", json={"user_id": "u1"}) for _ in range(40))
            return [r.status_code for r in await asyncio.gather(*asked)]

    statuses = client.run(go())
    assert statuses.count(200) == 8
    assert statuses.count(503) == 32
    assert client.post("/v1/console/explain", {"user_id": "u1"}).status_code == 200
    assert "twotower_answers_total{" not in client.get("/metrics").text
