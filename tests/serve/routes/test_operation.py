"""Health, metrics and the pages of problems."""

from __future__ import annotations

from service_client import Client, problem

from twotower.retrieval.retriever import Retriever
from twotower.serve.problems import PROBLEMS


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
    assert "_created" not in text
    assert "never seen" not in text
    assert "u1" not in text


def test_fault_C3_unknown_values_are_served_and_counted(shared: Client) -> None:
    reply = shared.post("/v1/recommend", {"user_id": "u1", "features": {"city": "nowhere"}, "history": ["?"]})
    assert reply.status_code == 200
    assert sorted(reply.json()["unknown"]) == ["?", "city"]
