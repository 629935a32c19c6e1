"""Access to a service: keys, hosts, origins and rates (rows D9, E2 and G5 of the faults)."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest
from clock import Clock
from hypothesis import given, settings
from hypothesis import strategies as st
from service_client import Client, Make, bearer, problem

from twotower.serve.access_policy import RateLimiter
from twotower.serve.problems import Problem

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


def test_a_page_of_another_site_cannot_ask_by_another_name(make: Make, key_file: tuple[Path, str, str]) -> None:
    client = make()
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert client.post("/v1/recommend", {}, headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80"):
        problem(client.get("/v1/console/users", headers={"host": host}), "foreign-host")
    file, key, _ = key_file
    kept = make(keys=file)
    assert kept.post("/v1/recommend", {}, headers={"host": "shop.example", **bearer(key)}).status_code == 200


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


@pytest.mark.parametrize("second", ["2001:db8:0:1::2", "2001:db8:0:1:ffff::"])
def test_fault_E2_addresses_of_one_subscriber_are_one_client(make: Make, second: str) -> None:
    client = make(rate=0.001, burst=1)

    async def ask(whence: str) -> int:
        async with client.http(client=(whence, 1)) as http:
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


def test_a_client_has_its_rate_and_its_burst() -> None:
    clock = Clock()
    limiter = RateLimiter(rate=2, burst=3, clients=2, clock=clock)
    for _ in range(3):
        limiter.take("a")
    limiter.take("b")
    with pytest.raises(Problem, match="more than 2 requests a second") as refused:
        limiter.take("a")
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
    clock.now += 0.5
    limiter.take("a")
    with pytest.raises(Problem):
        limiter.take("a")
    limiter.take("c")  # the third client; b is the one that was quiet longest
    assert len(limiter._full) == 2
    assert "b" not in limiter._full


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.1, 20), st.integers(1, 20))
def test_no_client_gets_more_than_its_burst_and_its_rate(gaps: list[float], rate: float, burst: int) -> None:
    clock = Clock()
    limiter = RateLimiter(rate, burst, clock=clock)
    let_in = 0
    for gap in gaps:
        clock.now += gap
        with contextlib.suppress(Problem):
            limiter.take("a")
            let_in += 1
    assert let_in <= burst + rate * sum(gaps) + 1e-6
