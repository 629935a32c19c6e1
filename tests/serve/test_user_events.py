"""Recent events: in memory, in a real server of the Redis protocol, and when that fails (rows F of the faults)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis as client
from hypothesis import given
from hypothesis import strategies as st

from twotower.errors import ConfigError
from twotower.retrieval.event import Event
from twotower.serve.redis_events import RedisEvents
from twotower.serve.settings import ServeSettings
from twotower.serve.user_events import EventStore, InProcessEvents, UserState, history_digest, latest

pytestmark = pytest.mark.anyio
SERVER = """
import sys
from fakeredis import TcpFakeServer
TcpFakeServer.allow_reuse_address = True
server = TcpFakeServer(("127.0.0.1", int(sys.argv[1])), server_type="redis")
print("ready", flush=True)
server.serve_forever()
"""


def liked_of(state: UserState) -> list[tuple[str, bool]]:
    """Item and label of each event."""
    return [(e.item, e.liked) for e in state.events]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """A process that speaks the Redis protocol on loopback; killed and started at will."""

    def __init__(self, start: bool = True) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[str] | None = None
        if start:
            self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER, str(self.port)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready"

    def kill(self) -> None:
        if self.process is not None:
            assert self.process.stdout is not None
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.fixture
def server(running: Server) -> Server:
    """A server that no test kills, emptied."""
    with client.Redis.from_url(running.url) as connection:
        connection.flushall()
    return running


@pytest.fixture
def mortal() -> Iterator[Server]:
    """A server of a test's own, which the test kills."""
    server = Server()
    yield server
    server.kill()


def redis(url: str, timeout: float = 0.5, **more: Any) -> RedisEvents:
    return RedisEvents(url, timeout=timeout, **more)


@pytest.fixture(params=["memory", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(kind: str, request: pytest.FixtureRequest, **more: Any) -> EventStore:
    if kind == "memory":
        return InProcessEvents(**more)
    server: Server = request.getfixturevalue("server")
    return redis(server.url, **more)


async def test_events_are_appended_read_and_forgotten(kind: str, request: pytest.FixtureRequest) -> None:
    store = make(kind, request, events=4)
    assert liked_of(await store.fetch(["b1"], "u")) == []
    assert (await store.add(["b1"], "u", [("1", True), ("2", False)]))[0] == 2
    assert (await store.add(["b1"], "u", [("3", True), ("é☃", True), ("5", True)]))[0] == 4
    assert liked_of(await store.fetch(["b1"], "u")) == [("2", False), ("3", True), ("é☃", True), ("5", True)]
    assert liked_of(await store.fetch(["b1"], "v")) == []
    await store.forget(["b1"], "u")
    assert liked_of(await store.fetch(["b1"], "u")) == []
    await store.close()


async def test_swaps_and_rollbacks_keep_the_order_of_what_came(kind: str, request: pytest.FixtureRequest) -> None:
    store = make(kind, request)
    await store.add(["b1"], "u", [("1", True)])
    await store.add(["b1", "b2"], "u", [("2", True), ("3", False)])
    assert (await store.add(["b2", "b1"], "u", [("4", True)]))[0] == 4  # back to the first
    told = [("1", True), ("2", True), ("3", False), ("4", True)]
    for bundles in (["b1", "b2"], ["b2", "b1"], ["b2", "b1", "b3"]):
        assert liked_of(await store.fetch(bundles, "u")) == told
    assert liked_of(await store.fetch(["b2"], "u")) == told[1:3]
    assert await store.forget(["b1", "b2"], "u")
    assert liked_of(await store.fetch(["b1", "b2"], "u")) == []
    await store.close()


async def test_fault_F4_a_vector_of_another_bundle_or_another_history_is_a_miss(
    kind: str, request: pytest.FixtureRequest
) -> None:
    store, vector = make(kind, request), np.arange(6, dtype=np.float32)[None]
    await store.add(["b1"], "u", [("1", True)])
    events = (await store.fetch(["b1"], "u")).events
    await store.save_vector(["b1"], "u", events, vector)
    kept = (await store.fetch(["b1"], "u")).vector
    assert kept is not None
    assert kept.shape == (1, 6)
    assert (kept == vector).all()
    assert (await store.fetch(["b1", "b2"], "u")).vector is None  # the bundle is another
    await store.add(["b1"], "u", [("2", True)])
    assert (await store.fetch(["b1"], "u")).vector is None  # the history is another
    await store.close()


async def test_a_vector_that_is_made_while_its_user_is_forgotten_is_not_kept() -> None:
    store = InProcessEvents()
    await store.add(["b1"], "u", [("1", True)])
    events = (await store.fetch(["b1", "b2"], "u")).events
    await store.save_vector(["b1", "b2"], "u", events, np.zeros((1, 6), np.float32))
    assert (await store.fetch(["b1", "b2"], "u")).vector is not None  # the events are under the bundle before
    await store.forget(["b1", "b2"], "u")
    await store.save_vector(["b1", "b2"], "u", events, np.zeros((1, 6), np.float32))
    assert store.size == 0


async def test_memory_forgets_what_is_old_and_who_was_quiet_longest() -> None:
    now = 0.0

    one = InProcessEvents()
    await one.add(["b"], "a", [("1", True)])
    store = InProcessEvents(seconds=10, limit=int(2.5 * one.size), clock=lambda: now)
    for user in "abc":
        await store.add(["b"], user, [("1", True)])
    assert [liked_of(await store.fetch(["b"], user)) for user in "abc"] == [[], [("1", True)], [("1", True)]]
    now = 9.0
    await store.add(["b"], "c", [("2", True)])
    now = 12.0
    assert liked_of(await store.fetch(["b"], "b")) == []
    assert len((await store.fetch(["b"], "c")).events) == 2


async def test_fault_G6_many_users_with_long_histories_stay_within_the_bytes_and_who_goes_is_counted() -> None:
    dropped = Counter[str]()

    limit, vector = 1 << 19, np.zeros((1, 64), np.float32)
    catalogue = [f"{n:>512}" for n in range(240)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        store = InProcessEvents(events=100, limit=limit, on_drop=lambda what, n: dropped.update({what: n}))
        for n in range(240):
            user = f"{n}{'u' * 500}"
            known = [(catalogue[(n * 7 + place) % 240], True) for place in range(100)]
            more = [(f"{n}/{place}{'é' * 500}", False) for place in range(40 if n % 2 else 0)]
            await store.add(["b"], user, known)
            await store.add(["b"], user, more)
            told = [*known, *more][-100:]
            assert liked_of(await store.fetch(["b"], user)) == told
            await store.save_vector(["b"], user, told, vector)
            assert store.size <= limit
            if n == 120:  # full since long
                full = tracemalloc.get_traced_memory()[0] - before
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert store.size / 1.5 < taken < store.size * 1.5
    assert taken < full * 1.2
    assert dropped["user"] > 120


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "put", "get", "keep", "forget", "take", "later"]),
            st.sampled_from(["a", "b", "ü" * 90, "\ud800"]),
            st.sampled_from([["1"], ["2"], ["1", "2"]]),
            st.lists(st.tuples(st.text(max_size=40), st.booleans(), st.none() | st.text()), max_size=12),
        ),
        max_size=60,
    )
)
def test_fault_G6_what_is_kept_is_what_a_plain_store_keeps_and_its_bytes_add_up(steps: list[Any]) -> None:
    """A naive twin keeps every event; the store with a bound of bytes keeps no others."""
    now, dropped = 0.0, list[int]()
    whole = InProcessEvents(8, 10.0, 1 << 30, clock=lambda: now)
    small = InProcessEvents(8, 10.0, 4_000, lambda what, n: dropped.append(n), clock=lambda: now)
    twin: dict[tuple[str, str], tuple[float, list[Event]]] = {}

    async def step(what: str, user: str, bundles: list[str], events: list[Event]) -> None:
        for kept in (whole, small):
            if what == "put":
                kept.put(bundles[-1], user, events)
            elif what == "keep":
                await kept.save_vector(bundles, user, [("1", True)], np.zeros((1, len(events)), np.float32))
            elif what == "take":
                kept.take(bundles, user)
            elif what == "forget":
                await kept.forget(bundles, user)
        if what == "put":
            until, before = twin.get((user, bundles[-1]), (0.0, []))
            twin[user, bundles[-1]] = (now + 10.0, [*(before if until >= now else []), *events[-8:]][-8:])
        for bundle in {"take": bundles, "forget": ["1", "2"]}.get(what, []):
            twin.pop((user, bundle), None)
        told = [e for b in bundles for until, more in [twin.get((user, b), (0.0, []))] if until >= now for e in more]
        assert whole.get(bundles, user) == latest(told, 8)
        assert {*small.get(bundles, user)} <= {*told}
        assert small.size <= 4_000

    for what, user, bundles, events in steps:
        now += 6.0 if what == "later" else 0.001
        told = [Event(item, liked, kind, now) for item, liked, kind in events]
        asyncio.run(step(what, user, bundles, told))
    for kept in (whole, small):
        for user in ("a", "b", "ü" * 90, "\ud800"):
            asyncio.run(kept.forget(["1", "2"], user))
        assert kept.size == 0, "bytes add up"


async def test_keys_carry_the_bundle(server: Server) -> None:
    store = redis(server.url, seconds=77)
    await store.add(["20260101T000000Z-abcdef"], "u:1", [("1", True)])
    await store.save_vector(["20260101T000000Z-abcdef"], "u:1", [("1", True)], np.zeros((1, 2), np.float32))
    keys = sorted(await store._client.keys("*"))
    assert keys == [b"20260101T000000Z-abcdef:events:u:1", b"20260101T000000Z-abcdef:vector:u:1"]
    for key in keys:
        assert 0 < await store._client.ttl(key) <= 77
    await store.close()


async def test_what_is_no_event_of_ours_is_left_out(server: Server) -> None:
    store = redis(server.url)
    await store._client.rpush(
        "b:events:u",
        b"\xff",
        b"[1, true, 1.0]",
        b'["2", true, 1.5]',
        b'{"a": 1}',
        b'["3", true]',
        b'["4", true, 1e300]',
        b'["5", true, -2.0]',
    )
    await store._client.set("b:vector:u", history_digest([Event("2", time=1.5)]) + b"123")  # cut short
    found = await store.fetch(["b"], "u")
    assert liked_of(found) == [("2", True)]
    assert found.vector is None
    digest = history_digest([Event("2", time=1.5)])
    for numbers in ([1.0, np.nan], [np.inf, 1.0]):
        await store._client.set("b:vector:u", digest + np.array(numbers, "<f4").tobytes())
        assert (await store.fetch(["b"], "u")).vector is None
    await store._client.set("b:vector:u", digest + np.array([1, 2], "<f4").tobytes())
    assert (await store.fetch(["b"], "u")).vector is not None
    await store.close()


async def test_fault_G6_what_another_program_pushed_costs_no_more_than_the_latest_events(server: Server) -> None:
    store = redis(server.url, timeout=5, events=5)
    asked: list[Any] = []
    pipeline = store._client.pipeline

    def watched(**more: Any) -> Any:
        pipe = pipeline(**more)
        execute = pipe.execute

        async def kept(**more: Any) -> Any:
            asked.append(await execute(**more))
            return asked[-1]

        pipe.execute = kept  # type: ignore[method-assign, assignment]
        return pipe

    store._client.pipeline = watched  # type: ignore[method-assign, assignment]
    await store._client.rpush(
        "b:events:u", *(f'["{n}", true, 1.5]' for n in range(1000)), f'["{"x" * 9000}", true, 1.5]'
    )
    assert liked_of(await store.fetch(["b"], "u")) == [(str(n), True) for n in range(996, 1000)]
    assert len(asked[-1][0]) == 5
    assert await store.add(["b"], "u", [(str(n), True) for n in range(10_000)]) == (5, True)
    assert asked[-1][0] == 1000 + 1 + 5  # no more was sent than is kept
    await store.close()


async def test_fault_F1_a_store_that_is_down_at_the_start_makes_answers_colder_and_comes_back() -> None:
    server = Server(start=False)
    failures: list[str] = []
    store = redis(server.url, on_failure=failures.append)
    store.breaker.pause = 0.05
    assert liked_of(await store.fetch(["b"], "u")) == []
    assert await store.add(["b"], "u", [("1", True)]) == (1, False)  # kept here
    assert liked_of(await store.fetch(["b"], "u")) == [("1", True)]
    assert failures
    assert set(failures) == {"read", "write"}
    server.start()
    try:
        for _ in range(100):
            if (await store.add(["b"], "u", [("2", True)]))[1]:
                break
            await asyncio.sleep(0.02)
        other = redis(server.url)  # what was kept here went there, first things first
        events = (await other.fetch(["b"], "u")).events
        assert events[0][:2] == ("1", True)
        assert events[-1][:2] == ("2", True)
        assert store.breaker.closed
        await other.close()
    finally:
        await store.close()
        server.kill()


async def test_fault_F1_a_store_that_is_killed_in_the_middle_costs_a_bounded_time_and_then_none(mortal: Server) -> None:
    store = redis(mortal.url, timeout=10)
    await store.add(["b"], "u", [("1", True)])
    store.timeout = 0.1
    mortal.kill()
    started = time.perf_counter()
    for _ in range(50):
        assert liked_of(await store.fetch(["b"], "u")) == []
    # Two or three failures, then nobody asks any more.
    assert time.perf_counter() - started < 4 * 0.1 + 0.5
    assert not store.breaker.closed
    await store.close()


async def test_fault_F1_a_store_that_answers_too_slowly_is_left_alone() -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1000):
                await asyncio.sleep(30)
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()

    slow = await asyncio.start_server(never, "127.0.0.1", 0)
    port = slow.sockets[0].getsockname()[1]
    store = redis(f"redis://127.0.0.1:{port}/0", timeout=0.05)
    started = time.perf_counter()
    for _ in range(20):
        assert liked_of(await store.fetch(["b"], "u")) == []
    assert time.perf_counter() - started < 1.0
    assert not store.breaker.closed
    await store.close()
    slow.close()


@pytest.mark.parametrize(
    "said", [b"+OK\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"*1\r\n:1\r\n", b":x\r\n", b"$x\r\n", b"\xff\n"]
)
async def test_fault_F1_a_server_that_is_no_redis_is_down(said: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(10_000):
                writer.write(said * 20)
        writer.close()

    other = await asyncio.start_server(talk, "127.0.0.1", 0)
    failed: list[str] = []
    store = redis(f"redis://127.0.0.1:{other.sockets[0].getsockname()[1]}/0", on_failure=failed.append)
    assert await store.add(["b"], "u", [("1", True)]) == (1, False)
    assert liked_of(await store.fetch(["b"], "u")) == [("1", True)]
    assert failed == ["write", "read", "read"]
    assert not store.breaker.closed
    await store.close()
    other.close()


async def test_fault_F1_the_broken_keys_of_one_user_leave_the_store_to_others(server: Server) -> None:
    store = redis(server.url)
    await store._client.set("b:events:u", "no list")
    await store._client.rpush("b:vector:v", "no text")
    await store.add(["b"], "v", [("2", True)])
    for _ in range(5):
        assert (await store.add(["b"], "u", [("1", True)]))[1] is False
    assert ("1", True) in liked_of(await store.fetch(["b"], "u"))  # from this process
    found = await store.fetch(["b"], "v")
    assert (liked_of(found), found.vector) == ([("2", True)], None)
    assert store.breaker.closed
    await store.close()


async def test_what_was_not_forgotten_for_certain_is_told(mortal: Server) -> None:
    store = redis(mortal.url, timeout=0.1)
    await store.add(["b"], "u", [("1", True)])
    mortal.kill()
    assert not await store.forget(["b"], "u")
    await store.close()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1",
        "redis://",
        "redis://host:x/0",
        "redis://host/abc",
        "redis://:s3cret@host/abc",
        "s3cret",
        "unix:",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="`event_store`") as refused:
        ServeSettings(store=tmp_path, event_store=url)
    assert "s3cret@" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["memory", "redis://host", "redis://:pw@host:1/3", "rediss://host/0", "unix:///run/valkey"]
)
def test_addresses_that_can_be(tmp_path: Path, url: str) -> None:
    ServeSettings(store=tmp_path, event_store=url)


@pytest.mark.system
async def test_fault_F1_a_real_valkey_is_killed_slowed_and_comes_back(tmp_path: Path) -> None:
    port = free_port()

    def start() -> subprocess.Popen[bytes]:
        found = subprocess.Popen(
            ["valkey-server", "--port", str(port), "--save", "", "--bind", "127.0.0.1", "--dir", str(tmp_path)],
            stdout=subprocess.DEVNULL,
        )
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return found
            time.sleep(0.05)
        raise AssertionError("valkey does not start")

    process = start()
    store = redis(f"redis://127.0.0.1:{port}/0", timeout=0.1)
    store.breaker.pause = 0.1
    try:
        assert await store.add(["b"], "u", [("1", True)]) == (1, True)
        assert liked_of(await store.fetch(["b"], "u")) == [("1", True)]
        await store._client.execute_command("CLIENT", "PAUSE", "2000")  # type: ignore[no-untyped-call]  # a hundred times slower than usual
        started = time.perf_counter()
        assert liked_of(await store.fetch(["b"], "u")) == []
        assert time.perf_counter() - started < 0.5
        await asyncio.sleep(2.5)
        assert liked_of(await store.fetch(["b"], "u")) == [("1", True)]
        process.kill()
        process.wait()
        assert (await store.add(["b"], "u", [("2", True)]))[1] is False
        process = start()
        await asyncio.sleep(0.5)
        assert (await store.add(["b"], "u", [("3", True)])) == (2, True)  # its memory was empty, ours was not
        assert liked_of(await store.fetch(["b"], "u")) == [("2", True), ("3", True)]
    finally:
        await store.close()
        process.kill()
        process.wait()
