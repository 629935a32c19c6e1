"""Timeouts of each step of a client, limits of heads and bodies (rows D2 and D7 of the faults)."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from server_process import Served, serving, wait_until


@pytest.fixture(scope="module")
def impatient(store: Path) -> Iterator[Served]:
    """A service of several tests, with short timeouts and a small limit of bodies."""
    times = ("--body-timeout", "0.6", "--keep-alive", "0.7")
    with serving(store) as start:
        yield start(*times, "--max-body", "100000", "--no-access-log").wait()


def test_fault_D7_a_head_that_does_not_end_is_cut_off_and_others_are_answered(impatient: Served) -> None:
    with contextlib.ExitStack() as opened:
        silent, slow, idle = (opened.enter_context(impatient.connect()) for _ in range(3))
        slow.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        idle.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in _received(idle, b"}")
        started = time.monotonic()
        for _ in range(5):
            assert httpx.post(impatient.url + "/v1/recommend", json={"user_id": "u1"}).status_code == 200
        for s in (silent, slow, idle):
            with contextlib.suppress(ConnectionResetError):
                assert s.recv(1000) == b""  # closed by the server
        assert time.monotonic() - started < 4


def test_fault_D7_a_body_that_does_not_come_is_408(impatient: Served) -> None:
    served = impatient
    with served.connect() as s:
        s.sendall(
            b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
            b"50\r\n\r\n{"
        )
        assert httpx.post(served.url + "/v1/recommend", json={}).status_code == 200
        assert b"408 Request Timeout" in s.recv(1000)


def test_fault_D7_a_body_in_drips_is_408(impatient: Served) -> None:
    served = impatient
    with served.connect() as s:
        s.sendall(
            b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
            b"50\r\n\r\n"
        )
        started = time.monotonic()
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() - started < 8:
                s.sendall(b" ")
                time.sleep(0.2)
        assert time.monotonic() - started < 6


def test_fault_D7_a_client_that_does_not_take_its_reply_keeps_nobody_waiting(impatient: Served) -> None:
    served = impatient
    body = b'{"k": 40, "keep_seen": true}'
    one = (
        b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.settimeout(0.5)
        s.connect(("127.0.0.1", served.port))
        with contextlib.suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
            for _ in range(3000):
                s.sendall(one)
        for _ in range(10):
            reply = httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"}, timeout=5)
            assert reply.status_code == 200
        wait_until(lambda: _connections(served) == 0)  # the server has closed it


def test_fault_D1_a_head_without_end_or_no_http_is_refused(impatient: Served) -> None:
    served = impatient
    for head in (
        b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000,
        b"\x16\x03\x01\x02\x00\x01",
        b"GET /%ff%00 HTTP/9.9\r\n\r\n",
    ):
        s = served.connect()
        try:
            s.sendall(head)
            reply = _received(s, b"}")
            assert reply == b"" or (reply[:12] == b"HTTP/1.1 400" and b"application/problem+json" in reply)
        except (ConnectionResetError, BrokenPipeError):
            pass
        s.close()
    assert httpx.get(served.url + "/readyz").status_code == 200


def test_fault_D2_memory_stays_flat_under_bodies_over_the_limit(impatient: Served) -> None:
    served = impatient

    def send(size: int) -> None:
        s = served.connect()
        try:
            s.sendall(
                b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            piece = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
            for _ in range(size // 65_536):
                s.sendall(piece)
            reply = s.recv(1000)
            assert b" 413 " in reply
        except (ConnectionResetError, BrokenPipeError):
            pass
        finally:
            s.close()

    send(1 << 20)
    before = served.resident()
    for _ in range(20):
        send(20 << 20)
    assert served.resident() - before < 30 << 20
    assert httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"}).status_code == 200


@pytest.mark.parametrize("id_", ["a\nb", "..", ".", "a/b?c#d%", "\x00", " x ", "\u2028", "é☃😀"], ids=ascii)
def test_fault_G14_strange_ids_over_the_wire(impatient: Served, id_: str) -> None:
    quoted = quote(id_, safe="")

    def ask(method: str, path: str) -> tuple[int, bytes]:
        """By a client that leaves the path as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", impatient.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path)
            reply = connection.getresponse()
            return reply.status, reply.read()

    for path in (f"/v1/events/{quoted}", f"/v1/events?user_id={quoted}"):
        assert httpx.post(impatient.url + "/v1/events", json={"user_id": id_, "events": ["i1"]}).status_code == 202
        assert ask("DELETE", path)[0] == 204
        assert httpx.post(impatient.url + "/v1/recommend", json={"user_id": id_}).json()["recent_events"] == 0
    for path in (f"/v1/items/{quoted}/similar", f"/v1/items/similar?item_id={quoted}"):
        status, body = ask("GET", path)
        assert (status, json.loads(body)["type"]) == (404, "/problems/unknown-item")
    assert ask("DELETE", "/v1/events/%FF")[0] == 422


def _received(s: socket.socket, end: bytes) -> bytes:
    """Receive up to `end`, or until the server closes."""
    got = b""
    while end not in got and (more := s.recv(1000)):
        got += more
    return got


def _connections(served: Served) -> int:
    """Count the established connections of the service's port."""
    lines = Path(f"/proc/{served.process.pid}/net/tcp").read_text().splitlines()[1:]
    here = f":{served.port:04X}"
    return sum(f[1].endswith(here) and f[3] == "01" for f in (line.split() for line in lines))
