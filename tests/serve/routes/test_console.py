"""The page of the console."""

from __future__ import annotations

from service_client import Make, problem


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
