"""Connections of a service (rows G3 and G4 of the faults): each has an end, and all together have a bound."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import resource
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest
from server_process import Served, Start, serving

from twotower.serve import api_keys
from twotower.serve.connections import LOG_INTERVAL, RepeatedWarning
from twotower.store.store import Store

SHORT = ("--body-timeout", "0.6", "--keep-alive", "0.6", "--no-access-log")
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def quick(store: Path) -> Iterator[Served]:
    """A service with short timeouts."""
    with serving(store) as start:
        yield start(*SHORT, "--max-body", "100000", "--max-batch", "5000").wait()


@pytest.fixture(scope="module")
def usual(store: Path) -> Iterator[Served]:
    """A service with default settings."""
    with serving(store) as start:
        yield start("--no-access-log").wait()


@pytest.fixture(scope="module")
def refusing(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, bytes]]:
    """A service with short timeouts that refuses requests without a key, and as overloaded those with its key."""
    key, lines = api_keys.make_key("shop", False)
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(lines)
    overloaded = (
        "from twotower.serve.admission import AdmissionController\n"
        "AdmissionController.overloaded = lambda self, client, *weight: client == 'shop'\n"
        "import sys\nfrom twotower.__main__ import main\nsys.argv[0] = 'twotower'\nmain()"
    )
    with serving(store) as start:
        yield start(*SHORT, "--keys", str(file), code=overloaded).wait(), key.encode()


def test_the_last_counts_of_a_repeated_warning_are_logged_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr("twotower.serve.connections.time.monotonic", lambda: now)
    warning = RepeatedWarning(logging.getLogger("twotower"), "refused")
    for reason in ("full", "full", "slow"):
        warning.count(reason)
    warning.flush()
    assert [vars(line)["fields"] for line in caplog.records] == [{"full": 1}]
    now += LOG_INTERVAL
    warning.flush()
    warning.flush()
    assert [vars(line)["fields"] for line in caplog.records] == [{"full": 1}, {"full": 1, "slow": 1}]


def reply(s: socket.socket, head: bool = False) -> tuple[int, dict[str, str], bytes]:
    """Receive the next reply of a connection: status, headers and body, which a reply to HEAD does not have."""
    got = b""
    while b"\r\n\r\n" not in got:
        more = s.recv(1)
        assert more, got
        got += more
    lines = got.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    body = b""
    while len(body) < int(headers.get("content-length", 0)) and not head:
        more = s.recv(int(headers["content-length"]) - len(body))
        assert more, got + body
        body += more
    return int(lines[0].split()[1]), headers, body


def drip(s: socket.socket, piece: bytes, seconds: float = 10) -> float:
    """Send a piece again and again; return the seconds until the server closes, at most `seconds`."""
    s.settimeout(0.1)
    started = time.monotonic()
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while time.monotonic() - started < seconds:
            s.sendall(piece)
            with contextlib.suppress(TimeoutError):
                if not s.recv(10_000):
                    break
    return time.monotonic() - started


def test_fault_G3_line_breaks_after_a_reply_do_not_keep_a_connection(quick: Served) -> None:
    with quick.connect() as s:
        s.sendall(LIVEZ)
        assert reply(s)[0] == 200
        s.sendall(b"\r\n")
        assert drip(s, b"\r\n") < 5
    with quick.connect() as s:
        assert drip(s, b"\r\n") < 5


@pytest.mark.parametrize(
    ("status", "head"),
    [
        (401, POST + b"Content-Length: 9999\r\n\r\n"),
        (421, POST.replace(b"localhost", b"elsewhere") + b"Content-Length: 9999\r\n\r\n"),
        (415, POST.replace(b"/json", b"/xml") + b"Content-Length: 9999\r\n\r\n"),
        (415, POST.replace(b"/json", b"/xml") + b"Transfer-Encoding: chunked\r\n\r\n"),
        (503, POST + b"Content-Length: 9999\r\n\r\n"),
    ],
)
def test_fault_G3_a_body_in_drips_after_its_refusal_has_an_end(
    quick: Served, refusing: tuple[Served, bytes], status: int, head: bytes
) -> None:
    served = quick
    if status in (401, 503):
        served, key = refusing
        if status == 503:
            head = head.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer " + key + b"\r\n\r\n")
    with served.connect() as s:
        s.sendall(head)
        assert reply(s)[0] == status
        assert drip(s, b"1\r\nx\r\n" if b"chunked" in head else b"x") < 5


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE", b"OPTIONS"])
def test_fault_G3_a_body_behind_any_method_has_the_limits_of_a_post(quick: Served, method: bytes) -> None:
    start = method + b" /livez HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with quick.connect() as s:
        s.sendall(start + b"Content-Length: 9999\r\n\r\n")
        assert drip(s, b" ") < 5
    with quick.connect() as s:
        s.sendall(start + b"Content-Length: 100001\r\n\r\n")
        assert reply(s, method == b"HEAD")[0] == 413
    with quick.connect() as s:
        s.sendall(start + b"Content-Length: 2\r\n\r\n{}")
        assert reply(s, method == b"HEAD")[0] in (200, 405)


@pytest.mark.parametrize(
    ("piece", "before"),
    [(b"x", b"1;x="), (b"x", b"0\r\nX-Trailer: "), (b"X: y\r\n", b"0\r\n"), (b"1\r\n \r\n", b"")],
    ids=["chunk extension", "trailer", "trailers", "chunks"],
)
def test_fault_G3_chunks_without_an_end_have_one(quick: Served, piece: bytes, before: bytes) -> None:
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    with quick.connect() as s:
        s.sendall(head + before)
        assert drip(s, piece) < 5


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\nX-Endless: ",
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Endless: ",
        POST.replace(b"/json", b"/xml") + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n",
    ],
    ids=["head", "trailer", "a body that is refused"],
)
def test_fault_G3_what_belongs_to_nothing_is_not_kept_in_memory(usual: Served, start: bytes) -> None:
    sent = 0
    with usual.connect() as s, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        s.sendall(start)
        while sent < 64 << 20:
            s.sendall(b"x" * 65_536)
            sent += 65_536
    assert sent < 32 << 20  # what the system's own buffers take is not the service's


def test_fault_G3_a_head_in_drips_after_a_reply_has_an_end(quick: Served) -> None:
    with quick.connect() as s:
        s.sendall(LIVEZ)
        assert reply(s)[0] == 200
        assert drip(s, b"G") < 5


@pytest.mark.parametrize(
    "ahead", [LIVEZ, LIVEZ * 1_000, b"GET", POST + b"Content-Length: 100000\r\n\r\n" + b" " * 99_000, b"\x16\x03"]
)
def test_fault_G3_a_request_sent_ahead_of_a_reply_ends_the_connection_after_it(usual: Served, ahead: bytes) -> None:
    body = orjson.dumps({"requests": [{"user_id": "u1"}] * 50})
    with usual.connect() as s:
        batch = POST.replace(b"recommend", b"recommend:batch") + b"Content-Length: %d\r\n\r\n" % len(body)
        s.sendall(batch + body + ahead)
        status, headers, got = reply(s)
        assert (status, headers.get("connection"), len(orjson.loads(got)["replies"])) == (200, "close", 50)
        with contextlib.suppress(ConnectionResetError):
            assert s.recv(1) == b""
    assert httpx.get(usual.url + "/livez").status_code == 200


def test_fault_G3_a_body_that_asks_for_leave_is_not_waited_for_after_a_refusal(usual: Served) -> None:
    ask = b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    with usual.connect() as s:
        s.sendall(POST + ask)
        assert s.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(b"{}")
        status, headers, _ = reply(s)
        assert (status, headers.get("connection")) == (200, "close")
    with usual.connect() as s:
        s.sendall(POST.replace(b"/json", b"/xml") + ask)
        status, headers, _ = reply(s)
        assert (status, headers.get("connection")) == (415, "close")
        assert s.recv(1) == b""


def test_fault_G3_a_last_reply_that_is_not_taken_keeps_no_connection(quick: Served) -> None:
    served = quick
    page = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n"
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.settimeout(0.3)
        s.connect(("127.0.0.1", served.port))
        with contextlib.suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
            for _ in range(15):
                s.sendall(page + b"\r\n")
            s.sendall(page + b"Connection: close\r\n\r\n")
        until = time.monotonic() + 15
        while connections(served) > 1:  # the one that asks
            assert time.monotonic() < until
            time.sleep(0.1)


def connections(served: Served) -> float:
    """Return the open connections, as the service counts them."""
    text = httpx.get(served.url + "/metrics").text
    found = re.search(r"^twotower_connections (\S+)", text, re.M)
    assert found is not None
    return float(found[1])


def ended(served: Served) -> dict[str, float]:
    """Return the connections that were closed or refused, by reason, without those that ask for it and are refused
    because others are still being closed."""
    own, until = 0, time.monotonic() + 60
    while (answer := httpx.get(served.url + "/metrics")).status_code == 503 and time.monotonic() < until:
        own += 1
        time.sleep(0.05)
    found = re.findall(r'^twotower_connections_ended_total\{reason="(\w+)"\} (\S+)', answer.text, re.M)
    return {reason: float(count) - own * (reason == "refused") for reason, count in found}


@pytest.mark.parametrize(
    ("files", "crowd", "addresses"),
    [
        (128, 200, 1),
        (128, 200, 8),
        pytest.param(1024, 1_020, 1, marks=pytest.mark.system),
        pytest.param(1024, 1_020, 8, marks=pytest.mark.system),
    ],
)
def test_fault_G4_more_connections_than_files_silence_nobody(
    serve: Start, store: Path, files: int, crowd: int, addresses: int
) -> None:
    served = serve("--poll", "0.05", "--no-access-log", limits={resource.RLIMIT_NOFILE: (files, files)}).wait()
    bundles = itertools.cycle(b.id for b in Store(store).bundles())
    for says in (b"", LIVEZ, LIVEZ + b"\r\n", b"GET", POST + b"Content-Length: 9999\r\n\r\n{"):
        with contextlib.ExitStack() as opened:
            for n in range(crowd):
                s = opened.enter_context(served.connect(f"127.0.0.{2 + n % addresses}"))
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    s.sendall(says)
            asked = [opened.enter_context(asking(served, whence)) for whence in ("127.0.0.1", "127.0.0.2")]
            for one in asked:
                answered(one)
            to = next(bundles)
            Store(store).rollback(to)  # it is loaded, which opens files
            until = time.monotonic() + 20
            while answered(asked[0]).json()["bundle_id"] != to:
                assert time.monotonic() < until
                time.sleep(0.02)
            assert answered(asked[0]).status_code == 200
    code, log = served.end()
    assert code == 0
    assert "bundle refused" not in log
    assert "too many connections" in log


def asking(served: Served, whence: str) -> httpx.Client:
    transport = httpx.HTTPTransport(local_address=whence, limits=httpx.Limits(max_keepalive_connections=0))
    return httpx.Client(base_url=served.url, transport=transport)


def answered(client: httpx.Client) -> httpx.Response:
    """Ask /livez by new connections until one is answered: those opened just before are safe for a second."""
    until = time.monotonic() + 5
    while True:
        with contextlib.suppress(httpx.ReadError):
            reply = client.get("/livez")
            if reply.status_code == 200:
                return reply
            assert reply.json()["type"] == "/problems/too-many-connections"
        assert time.monotonic() < until
        time.sleep(0.02)


def test_fault_G4_a_refused_connection_is_told_why_and_the_bounds_are_as_told(serve: Start) -> None:
    served = serve("--max-connections", "6", "--max-per-address", "2", "--trusted-proxies", "127.0.0.9").wait()
    time.sleep(0.1)
    under_way = POST + b"Content-Length: 9999\r\n\r\n{"
    with contextlib.ExitStack() as opened:

        def connect(whence: str) -> socket.socket:
            s: socket.socket = opened.enter_context(served.connect(whence))
            s.sendall(under_way)
            return s

        for whence in ("127.0.0.2", "127.0.0.2"):
            connect(whence)
        status, headers, body = reply(connect("127.0.0.2"))
        assert status == 503
        assert (headers["retry-after"], headers["connection"]) == ("1", "close")
        assert headers["content-type"] == "application/problem+json"
        assert json.loads(body)["type"] == "/problems/too-many-connections"
        for _ in range(4):
            connect("127.0.0.9")  # a proxy speaks for many
        assert reply(connect("127.0.0.3"))[0] == 503  # there are six
    assert ended(served)["refused"] == 2
    log = served.end()[1]
    assert "too many connections" in log


def test_fault_G4_the_idle_connection_used_least_lately_makes_room(serve: Start) -> None:
    served = serve("--max-connections", "3", "--max-per-address", "3", "--no-access-log").wait()
    with contextlib.ExitStack() as opened:
        a, b, c = (opened.enter_context(served.connect()) for _ in range(3))
        for s in (a, b, c, a):
            s.sendall(LIVEZ)
            assert reply(s)[0] == 200
        d = opened.enter_context(served.connect())
        d.sendall(LIVEZ)
        assert reply(d)[0] == 200
        assert b.recv(1) == b""
        for s in (a, c, d):
            s.sendall(LIVEZ)
            assert reply(s)[0] == 200


def test_fault_G4_the_soft_limit_of_open_files_is_raised(serve: Start) -> None:
    served = serve("--workers", "2", limits={resource.RLIMIT_NOFILE: (200, -1)}).wait()
    for pid in (served.process.pid, *served.workers()):
        text = Path(f"/proc/{pid}/limits").read_text()
        found = re.search(r"Max open files\s+(\d+)\s+(\d+)", text)
        assert found is not None
        soft, hard = found.groups()
        assert int(soft) == min(int(hard), 65_536)


def test_fault_G4_no_file_left_to_accept_with_is_no_work(serve: Start, tmp_path: Path) -> None:
    """Something else in the process has every file: connections that wait are not tried again and again."""
    hungry = (
        "import os, pathlib, sys, threading, time\nfrom twotower.__main__ import main\n"
        "def eat(start, full):\n"
        "    while not start.exists(): time.sleep(0.05)\n"
        "    try:\n"
        "        while True: os.open('/dev/null', os.O_RDONLY)\n"
        "    except OSError: full()\nthreading.Thread(target=eat, "
        f"args=(pathlib.Path({str(tmp_path / 'eat')!r}), lambda: print('full', flush=True)), daemon=True).start()\n"
        "sys.argv[0] = 'twotower'\nmain()"
    )
    served = serve("--poll", "100", code=hungry, limits={resource.RLIMIT_NOFILE: (200, 200)}).wait()
    (tmp_path / "eat").touch()
    assert served.process.stdout is not None
    assert served.process.stdout.readline() == "full\n"

    def spent() -> float:
        fields = Path(f"/proc/{served.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = spent()
    with contextlib.ExitStack() as opened:
        for _ in range(20):
            opened.enter_context(served.connect())
        time.sleep(1.5)
    assert spent() - before < 0.5


def test_fault_G4_stalled_bodies_are_bounded_together(serve: Start) -> None:
    served = serve("--body-memory", str(8 << 20), "--body-timeout", "8", "--no-access-log").wait()
    httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"})
    before = served.resident()
    large = b"{" + b" " * ((1 << 20) - 2)
    with contextlib.ExitStack() as opened:
        started = time.monotonic()
        stalled = []
        for n in range(600):
            s = opened.enter_context(served.connect(f"127.0.0.{2 + n % 4}"))
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                s.sendall(POST + b"Content-Length: %d\r\n\r\n" % (1 << 20) + large)
            stalled.append(s)
        assert served.resident() - before < 60 << 20
        # Nobody who sends an ordinary request is refused.
        assert httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"}).status_code == 200
        statuses = [reply(s)[:2] for s in stalled[100:120]]
        assert {status for status, _ in statuses} == {503}
        assert all(headers["retry-after"] == "1" for _, headers in statuses)
        while True:  # and those that stall hold it no longer than they may
            body = json.dumps({"user_id": "u1", "history": ["i1"] * 5_000}).encode()
            got = httpx.post(served.url + "/v1/recommend", content=body, headers={"Content-Type": "application/json"})
            if got.status_code == 200:
                break
            assert got.status_code == 503
            assert time.monotonic() - started < 40
            time.sleep(0.2)


def test_fault_G4_replies_that_are_not_taken_are_bounded_together(serve: Start) -> None:
    served = serve("--body-memory", "500000", "--max-batch", "1500", "--no-access-log").wait()
    body = json.dumps({"requests": [{"user_id": "u1", "k": 40, "keep_seen": True}] * 1_500}).encode()
    batch = POST.replace(b"recommend", b"recommend:batch") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    statuses = []
    with contextlib.ExitStack() as opened:
        for _ in range(5):
            s = opened.enter_context(socket.socket())
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.settimeout(60)
            s.connect(("127.0.0.1", served.port))
            s.sendall(batch)
            statuses.append(s.recv(12)[-3:])  # the reply has begun, and the rest of it is never taken
        assert statuses == [b"200", *[b"503"] * 4]
        assert httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"}).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nhOST: evil\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: user@localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost, evil\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost evil\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost:port\r\n\r\n",
        b"GET http://evil/livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost@evil/livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET ftp://localhost/livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_fault_G23_a_request_has_one_host(usual: Served, head: bytes) -> None:
    with usual.connect() as s:
        s.sendall(head)
        status, headers, body = reply(s)
        assert (status, headers["content-type"]) == (400, "application/problem+json")
        assert json.loads(body)["type"] == "/problems/bad-request"
        assert "Host" in json.loads(body)["detail"]
        assert s.recv(1) == b""


def test_fault_G3_a_client_that_leaves_with_requests_sent_ahead_is_no_error(serve: Start) -> None:
    served = serve("--no-access-log").wait()
    body = json.dumps({"requests": [{"user_id": "u1", "k": 100}] * 100}).encode()
    batch = POST.replace(b"recommend", b"recommend:batch") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for _ in range(3):
        with served.connect() as s:
            s.sendall(batch + LIVEZ)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert httpx.get(served.url + "/livez", timeout=30).status_code == 200
    code, log = served.end()
    assert code == 0
    assert "error" not in log
