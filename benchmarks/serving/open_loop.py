"""Open-loop HTTP load: each request is sent when it is due, independent of earlier answers, and timed from then.

    log = Generator(8000).run(schedule([(800, 60)], seed=0), requests, which)
    log.within(5, 60)

A service that pauses is charged for all requests due meanwhile (no coordinated omission). Latencies are those of 2xx replies; failures are
counted separately. Lag is the delay of the generator itself; latencies are invalid unless lag is small beside them. Used by load.py.
"""

from __future__ import annotations

import errno
import gc
import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.lib.machine import Numbers

Times = npt.NDArray[np.float64]  # seconds from the start of a run

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
IDLE = 2.0
"""Seconds after which an unused connection is not used again: the server may be closing it."""
PENDING, RESET, TIMEOUT, REFUSED, BROKEN = 0, -1, -2, -3, -4
"""Beside the status of HTTP: no answer, connection lost, none in time, no connection, not HTTP."""

# ---- the schedule


def schedule(pieces: Sequence[tuple[float, float]], seed: int, arrivals: str = "poisson") -> Times:
    """Return the due time of each request, rising, for successive phases of (requests per second, seconds)."""
    rng, start, due = np.random.default_rng(seed), 0.0, [np.zeros(0)]
    for rate, seconds in pieces:
        if arrivals == "constant":
            due.append(start + np.arange(round(rate * seconds)) / rate)
        else:  # so many, each at any time: a Poisson process
            due.append(np.sort(rng.uniform(start, start + seconds, rng.poisson(rate * seconds))))
        start += seconds
    return np.concatenate(due)


# ---- the wire


class Reply(NamedTuple):
    """The parts of a reply that the generator reads; `size` counts head and body."""

    status: int
    size: int
    retry_after: bool
    closes: bool


def parse(data: bytes) -> Reply | None:
    """Parse the reply at the start of `data`; None if it is incomplete. Raises ValueError for other bytes."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if not data.startswith(b"HTTP/1.1 "[: len(data)]) or len(data) > 65_536:
            raise ValueError("not an answer of HTTP/1.1")
        return None
    if not data.startswith(b"HTTP/1.1 "):
        raise ValueError("not an answer of HTTP/1.1")
    head, status, size = data[:end].lower(), int(data[9:12]), end + 4
    if (at := head.find(b"\r\ncontent-length:")) >= 0:
        size += int(head[at + 17 :].split(b"\r\n", 1)[0])
    elif status not in (204, 304):
        raise ValueError("an answer without Content-Length")
    if len(data) < size:
        return None
    return Reply(status, size, b"\r\nretry-after:" in head, b"\r\nconnection: close" in head)


_BUNDLE = re.compile(rb'"bundle_id"\s*:\s*"([^"]*)"')

# ---- the generator


@dataclass
class Log:
    """(n,) arrays over requests: time due, time taken up, time answered (NaN: never), status, a Retry-After header, and the
    index into `bundles` of the bundle that answered (-1: not recorded)."""

    due: Times
    taken: Times
    done: Times
    status: npt.NDArray[np.int16]
    retry_after: npt.NDArray[np.bool_]
    bundle: npt.NDArray[np.int16]
    bundles: list[str]
    connections: int  # most at one time
    cpu: float  # seconds of the generator
    wall: float

    def within(self, start: float, stop: float) -> Numbers:
        """Return counts and latencies of the requests due from `start` to `stop`, and rates of the replies in that time."""
        here = (self.due >= start) & (self.due < stop)
        then = (self.done >= start) & (self.done < stop)
        good = (self.status >= 200) & (self.status < 300)
        status, seconds = self.status[here], stop - start
        lag = percentiles((self.taken - self.due)[here])
        latency = percentiles((self.done - self.due)[here & good])
        found: Numbers = {
            "count": int(here.sum()),
            "offered": float(here.sum() / seconds),
            "goodput": float((then & good).sum() / seconds),
            "ok": int((here & good).sum()),
            "503": int((status == 503).sum()),
            "429": int((status == 429).sum()),
            "other": int(((status > 0) & (status != 503) & (status != 429)).sum() - (here & good).sum()),
            "errors": int((status <= 0).sum()),
            "timeouts": int((status == TIMEOUT).sum()),
            "retry_after_missing": int((((self.status == 503) | (self.status == 429)) & ~self.retry_after)[here].sum()),
            **latency,
            "lag": lag,
        }
        found["unanswered"] = found["count"] - found["ok"]
        found["lag_ok"] = lag_is_small(lag["p99"], latency["p99"])
        return found

    def windows(self, start: float, stop: float, width: float) -> list[tuple[float, float | None, int]]:
        """Return start, p99 in ms and failures of the requests due in each window of `width` seconds."""
        out = []
        for n in range(round((stop - start) / width)):
            found = self.within(start + n * width, start + (n + 1) * width)
            out.append((start + n * width, found["p99"], found["unanswered"]))
        return out


def percentiles(seconds: Times) -> dict[str, float | None]:
    """Return percentiles by nearest rank, in ms; None for an empty array."""
    if not len(seconds):
        return dict.fromkeys(QUANTILES)
    found = np.quantile(seconds, list(QUANTILES.values()), method="inverted_cdf") * 1e3
    return dict(zip(QUANTILES, np.round(found, 3).tolist(), strict=True))


def lag_is_small(lag: float | None, latency: float | None) -> bool:
    """Return True if a generator lag (p99, ms) is small beside latencies with this p99 (ms)."""
    return lag is None or lag <= max(1.0, 0.1 * (latency or 0.0))


class _Connection:
    __slots__ = ("buffer", "fd", "number", "out", "since", "socket")

    def __init__(self, sock: socket.socket) -> None:
        self.socket, self.fd = sock, sock.fileno()
        self.number = -1  # of the request that waits on it
        self.out = self.buffer = b""  # not yet sent; read, but not a whole answer
        self.since = 0.0  # idle


class Generator:
    """Sends requests when they are due, over at most `most` kept connections.

    A request that finds all connections busy waits for one; its latency includes the wait. One thread; bodies of
    replies are not parsed.
    """

    def __init__(self, port: int, most: int = 512, timeout: float = 10.0, bundles: bool = False) -> None:
        """`timeout`: seconds from the due time of a request. `bundles`: record the bundle of every reply."""
        self.address = ("127.0.0.1", port)
        self.most, self.timeout, self.look = most, timeout, bundles

    def run(
        self,
        due: Times,
        pool: Sequence[bytes],
        which: npt.NDArray[np.integer[Any]],
        stop: Callable[[], bool] = lambda: False,
    ) -> Log:
        """Send `pool[which[n]]` at `due[n]` and wait for the last reply; after `stop()` is true, send nothing more."""
        n = len(due)
        self._pool, self._which, self._due = pool, which.tolist(), due.tolist()
        self._taken, self._done = [float("nan")] * n, [float("nan")] * n
        self._status, self._retry, self._bundle = [PENDING] * n, [False] * n, [-1] * n
        self._known: dict[bytes, int] = {}
        self._connections: dict[int, _Connection] = {}
        self._free: list[_Connection] = []
        self._waiting: deque[int] = deque()  # for a connection
        self._asked: deque[tuple[int, _Connection]] = deque()  # in the order of sending; some are answered
        self._left = 0  # taken up and not answered
        self._peak = 0
        self._epoll = select.epoll()
        gc.collect()
        gc.disable()  # a collection stops the generator for milliseconds
        cpu, self._zero = time.process_time(), time.perf_counter() + 0.02
        try:
            sent = self._loop(stop)
        finally:
            gc.enable()
            for connection in self._connections.values():
                connection.socket.close()
            self._epoll.close()
        wall = time.perf_counter() - self._zero
        return Log(
            due[:sent],
            np.array(self._taken[:sent]),
            np.array(self._done[:sent]),
            np.array(self._status[:sent], np.int16),
            np.array(self._retry[:sent], bool),
            np.array(self._bundle[:sent], np.int16),
            [name.decode() for name in self._known],
            self._peak,
            time.process_time() - cpu,
            wall,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    def _loop(self, stop: Callable[[], bool]) -> int:
        """Run the event loop. Returns the number of requests sent."""
        due, taken, poll, epoll = self._due, self._taken, self._epoll.poll, self._epoll.fileno()
        number, last, checked = 0, len(due), 0.0
        while number < last or self._left:
            now = self._now()
            burst = min(last, number + 32)  # then answers are read, however late it is
            while number < burst and due[number] <= now:
                taken[number] = now
                self._left += 1
                self._send(number)
                number += 1
                now = self._now()
            if now > checked + 0.05:
                checked = now
                self._expire(now)
                if stop():
                    last = number
            wait = min(0.05, due[number] - now) if number < last else 0.05
            if wait > 0:
                select.select([epoll], [], [], wait)  # to the microsecond; epoll itself waits whole milliseconds
            for fd, event in poll(0, 64):
                if (connection := self._connections.get(fd)) is not None:
                    self._handle(connection, event)
        return number

    def _send(self, number: int) -> None:
        connection = None
        while self._free and connection is None:  # the last used first, so that those in excess fall idle
            connection = self._free.pop()
            if self._now() - connection.since > IDLE:
                self._close(connection)
                connection = None
        if connection is None:
            if len(self._connections) >= self.most:
                self._waiting.append(number)
                return
            connection = self._connect()
            if connection is None:
                self._answer(number, REFUSED)
                return
        self._ask(connection, number)

    def _connect(self) -> _Connection | None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sock.connect_ex(self.address) not in (0, errno.EINPROGRESS):
            sock.close()
            return None
        connection = _Connection(sock)
        self._connections[connection.fd] = connection
        self._peak = max(self._peak, len(self._connections))
        self._epoll.register(connection.fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        return connection

    def _ask(self, connection: _Connection, number: int) -> None:
        connection.number, connection.out = number, self._pool[self._which[number]]
        self._asked.append((number, connection))
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        try:
            connection.out = connection.out[connection.socket.send(connection.out) :]
        except BlockingIOError:
            pass  # the epoll tells when there is room
        except OSError as e:
            self._fail(connection, REFUSED if isinstance(e, ConnectionRefusedError) else RESET)

    def _handle(self, connection: _Connection, event: int) -> None:
        if event & select.EPOLLOUT and connection.out:
            self._flush(connection)
        if not event & ~select.EPOLLOUT or self._connections.get(connection.fd) is not connection:
            return
        try:
            data = connection.socket.recv(262_144)
        except BlockingIOError:
            return
        except OSError as e:
            self._fail(connection, REFUSED if isinstance(e, ConnectionRefusedError) else RESET)
            return
        if not data:
            self._fail(connection, RESET)
            return
        data = connection.buffer + data
        try:
            reply = parse(data)
            if reply is not None and (connection.number < 0 or len(data) > reply.size):
                raise ValueError("more than was asked")
        except ValueError:
            self._fail(connection, BROKEN)
            return
        if reply is None:
            connection.buffer = data
            return
        connection.buffer = b""
        number, connection.number = connection.number, -1
        if self.look and (found := _BUNDLE.search(data)):
            self._bundle[number] = self._known.setdefault(found[1], len(self._known))
        self._retry[number] = reply.retry_after
        self._answer(number, reply.status)
        if reply.closes:
            self._close(connection)
        self._offer(None if reply.closes else connection)

    def _answer(self, number: int, status: int) -> None:
        self._done[number], self._status[number] = self._now(), status
        self._left -= 1

    def _offer(self, connection: _Connection | None) -> None:
        """Give a free connection (None: a new one is possible) to a waiting request, or keep it."""
        if self._waiting:
            number = self._waiting.popleft()
            connection = connection or self._connect()
            if connection is None:
                self._answer(number, REFUSED)
            else:
                self._ask(connection, number)
        elif connection is not None:
            connection.since = self._now()
            self._free.append(connection)

    def _fail(self, connection: _Connection, status: int) -> None:
        number, connection.number = connection.number, -1
        self._close(connection)
        if number >= 0:
            self._answer(number, status)
            self._offer(None)
        else:
            with suppress(ValueError):
                self._free.remove(connection)

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.fd]
        connection.socket.close()  # which takes it out of the epoll

    def _expire(self, now: float) -> None:
        """Fail requests past their timeout."""
        while self._waiting and self._due[self._waiting[0]] + self.timeout < now:
            self._answer(self._waiting.popleft(), TIMEOUT)
        while self._asked:
            number, connection = self._asked[0]
            if connection.number == number:
                if self._due[number] + self.timeout >= now:
                    break
                self._fail(connection, TIMEOUT)
            self._asked.popleft()


def recovery(
    usual: Sequence[tuple[float, float | None, int]], after: Sequence[tuple[float, float | None, int]]
) -> tuple[float | None, float]:
    """Return the seconds from the first window of `after` until two in a row are normal (None: never), and the bound (ms).

    Normal: no failure, and a p99 of at most twice that of the worst window of `usual`. Windows are those of `Log.windows`.
    """
    bound = 2 * max((p99 for _, p99, _ in usual if p99 is not None), default=0.0)
    normal = [p99 is not None and p99 <= bound and not failed for _, p99, failed in after]
    for n in range(len(normal) - 1):
        if normal[n] and normal[n + 1]:
            return after[n][0] - after[0][0], bound
    return None, bound
