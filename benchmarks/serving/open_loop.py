"""Open-loop HTTP load: each request is sent when it is due, independent of earlier answers, and timed from then.

    log = Generator(8000).run(schedule([(800, 60)], seed=0), requests, which)
    log.within(5, 60)

A service that pauses is charged for all requests due meanwhile (no coordinated omission). Latencies are those of 2xx
replies; failures are counted separately. Lag is the delay of the generator itself; latencies are invalid unless lag is
small beside them. Used by load.py.
"""

import gc
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.lib.machine import Numbers
from twotower.arrays.types import Ints

Times = npt.NDArray[np.float64]  # seconds from the start of a run
Windows = Sequence[tuple[float, float | None, int]]  # start, p99 in ms and failures
QUANTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}
IDLE = 2.0  # seconds after which an unused connection is not used again: the server may be closing it
PENDING, RESET, TIMEOUT, REFUSED, BROKEN = 0, -1, -2, -3, -4
"""Beside the status of HTTP: no answer, connection lost, none in time, no connection, not HTTP."""


def schedule(pieces: Sequence[tuple[float, float]], seed: int = 0) -> Times:
    """Return the due time of each request, a Poisson process of successive phases of (requests per second, seconds)."""
    rng, start, due = np.random.default_rng(seed), 0.0, [np.zeros(0)]
    for rate, seconds in pieces:
        due.append(np.sort(rng.uniform(start, start + seconds, rng.poisson(rate * seconds))))
        start += seconds
    return np.concatenate(due)


class Reply(NamedTuple):
    """The parts of a reply that the generator reads; `size` counts head and body."""

    status: int
    size: int
    retry_after: bool
    closes: bool


def parse(data: bytes) -> Reply | None:
    """Parse the reply at the start of `data`; None if it is incomplete. Raises ValueError for other bytes."""
    end = data.find(b"\r\n\r\n")
    if not data.startswith(b"HTTP/1.1 "[: len(data)]) or (end < 0 and len(data) > 65_536):
        raise ValueError("not an answer of HTTP/1.1")
    if end < 0:
        return None
    head, status, size = data[:end].lower(), int(data[9:12]), end + 4
    if (at := head.find(b"\r\ncontent-length:")) >= 0:
        size += int(head[at + 17 :].split(b"\r\n", 1)[0])
    elif status not in (204, 304):
        raise ValueError("an answer without Content-Length")
    if len(data) < size:
        return None
    return Reply(status, size, b"\r\nretry-after:" in head, b"\r\nconnection: close" in head)


@dataclass
class Log:
    """(n,) arrays over requests: time due, time taken up, time answered (NaN: never), status, a Retry-After header."""

    due: Times
    taken: Times
    done: Times
    status: npt.NDArray[np.int16]
    retry_after: npt.NDArray[np.bool_]
    cpu: float = 0.0  # seconds of the generator
    wall: float = 0.0

    def within(self, start: float, stop: float) -> Numbers:
        """Return counts and latencies of the requests due from `start` to `stop`, and reply rates in that time."""
        here, then = ((of >= start) & (of < stop) for of in (self.due, self.done))
        good = (self.status >= 200) & (self.status < 300)
        status, count, ok = self.status[here], int(here.sum()), int((here & good).sum())
        turned_away = {str(code): int((status == code).sum()) for code in (503, 429)}
        lag, latency = (
            percentiles((of - self.due)[which]) for of, which in ((self.taken, here), (self.done, here & good))
        )
        offered, goodput = count / (stop - start), float((then & good).sum() / (stop - start))
        found: Numbers = {"offered": offered, "goodput": goodput, "ok": ok, "unanswered": count - ok}
        found |= turned_away | {"other": int((status > 0).sum()) - sum(turned_away.values()) - ok}
        found["errors"] = int((status <= 0).sum())
        found["retry_after_missing"] = int((np.isin(status, (503, 429)) & ~self.retry_after[here]).sum())
        return found | latency | {"lag": lag["p99"], "lag_ok": lag_is_small(lag["p99"], latency["p99"])}

    def windows(self, start: float, stop: float, width: float) -> Windows:
        """Return start, p99 in ms and failures of the requests due in each window of `width` seconds."""
        starts = [start + n * width for n in range(round((stop - start) / width))]
        found = [self.within(at, at + width) for at in starts]
        return [(at, one["p99"], one["unanswered"]) for at, one in zip(starts, found, strict=True)]


def percentiles(seconds: Times) -> dict[str, float | None]:
    """Return percentiles by nearest rank, in ms; None for an empty array."""
    if not len(seconds):
        return dict.fromkeys(QUANTILES)
    found = np.quantile(seconds, list(QUANTILES.values()), method="inverted_cdf") * 1e3
    return dict(zip(QUANTILES, np.round(found, 3).tolist(), strict=True))


def lag_is_small(lag: float | None, latency: float | None) -> bool:
    """Return True if a generator lag (p99, ms) is small beside latencies with this p99 (ms)."""
    return lag is None or lag <= max(1.0, 0.1 * (latency or 0.0))


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    number: int = -1  # of the request that waits on it
    buffer: bytes = b""  # the part of its reply that was read
    since: float = 0.0  # when it became idle


class Generator:
    """Sends requests when they are due, over at most `most` kept connections, on one thread.

    A request that finds all connections busy waits for one; its latency includes the wait. `timeout`: seconds from due.
    """

    def __init__(self, port: int, most: int = 512, timeout: float = 10.0) -> None:
        self.address, self.most, self.timeout = ("127.0.0.1", port), most, timeout

    def run(self, due: Times, pool: Sequence[bytes], which: Ints, stop: Callable[[], bool] = bool) -> Log:
        """Send `pool[which[n]]` at `due[n]` and wait for the last reply; after `stop()` is true, send nothing more."""
        n, never = len(due), np.full(len(due), np.nan)
        self._log = log = Log(due, never, never.copy(), np.full(n, PENDING, np.int16), np.zeros(n, bool))
        self._pool, self._which, self._due = pool, which.tolist(), due.tolist()
        self._connections: dict[int, _Connection] = {}  # by their file
        self._free: list[_Connection] = []
        self._waiting: deque[int] = deque()  # for a connection
        self._left = 0  # taken up and not answered
        gc.collect()
        gc.disable()  # a collection stops the generator for milliseconds
        cpu, self._zero = time.process_time(), time.perf_counter() + 0.02
        with select.epoll() as self._epoll:
            try:
                sent = self._loop(stop)
            finally:
                gc.enable()
                for connection in self._connections.values():
                    connection.socket.close()
        log.cpu, log.wall = time.process_time() - cpu, self._now()
        for name in ("due", "taken", "done", "status", "retry_after"):
            setattr(log, name, getattr(log, name)[:sent])
        return log

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    def _loop(self, stop: Callable[[], bool]) -> int:
        """Run the event loop. Returns the number of requests sent."""
        due, taken, poll, epoll = self._due, self._log.taken, self._epoll.poll, self._epoll.fileno()
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
            for file, _ in poll(0, 64):
                if (connection := self._connections.get(file)) is not None:
                    self._read(connection)
        return number

    def _send(self, number: int) -> None:
        """Send a request over the connection used last, so that those in excess fall idle, or a new one."""
        while self._free:
            connection = self._free.pop()
            if self._now() - connection.since <= IDLE:
                self._ask(connection, number)
                return
            self._close(connection)
        if len(self._connections) < self.most:
            self._connect(number)
        else:
            self._waiting.append(number)

    def _connect(self, number: int) -> None:
        sock = socket.socket()
        sock.settimeout(1)  # at once, on this machine
        try:
            sock.connect(self.address)
        except OSError:
            sock.close()
            self._answer(number, REFUSED)
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self._connections[sock.fileno()] = _Connection(sock)
        self._epoll.register(sock, select.EPOLLIN)
        self._ask(connection, number)

    def _ask(self, connection: _Connection, number: int) -> None:
        connection.number = number
        try:
            connection.socket.sendall(self._pool[self._which[number]])  # less than its buffer
        except OSError:
            self._fail(connection, RESET)

    def _read(self, connection: _Connection) -> None:
        try:
            if not (data := connection.socket.recv(262_144)):
                raise ConnectionResetError
            connection.buffer += data
            reply = parse(connection.buffer)
            if reply is not None and (connection.number < 0 or len(connection.buffer) > reply.size):
                raise ValueError("more than was asked")
        except BlockingIOError:  # the event was of a closed connection with the same number
            return
        except (OSError, ValueError) as e:
            self._fail(connection, BROKEN if isinstance(e, ValueError) else RESET)
            return
        if reply is None:
            return
        number, connection.number, connection.buffer = connection.number, -1, b""
        self._log.retry_after[number] = reply.retry_after
        self._answer(number, reply.status)
        if reply.closes:
            self._replace(connection)
        elif self._waiting:
            self._ask(connection, self._waiting.popleft())
        else:
            connection.since = self._now()
            self._free.append(connection)

    def _answer(self, number: int, status: int) -> None:
        self._log.done[number], self._log.status[number] = self._now(), status
        self._left -= 1

    def _fail(self, connection: _Connection, status: int) -> None:
        if connection.number < 0:
            self._free.remove(connection)
        else:
            self._answer(connection.number, status)
            connection.number = -1
        self._replace(connection)

    def _replace(self, connection: _Connection) -> None:
        """Close a connection; the request that has waited longest is sent over a new one."""
        self._close(connection)
        if self._waiting:
            self._connect(self._waiting.popleft())

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.socket.fileno()]
        connection.socket.close()  # which takes it out of the epoll

    def _expire(self, now: float) -> None:
        """Fail requests past their timeout."""
        while self._waiting and self._due[self._waiting[0]] + self.timeout < now:
            self._answer(self._waiting.popleft(), TIMEOUT)
        for connection in [*self._connections.values()]:
            if connection.number >= 0 and self._due[connection.number] + self.timeout < now:
                self._fail(connection, TIMEOUT)


def recovery(usual: Windows, after: Windows) -> float | None:
    """Return the seconds from the first window of `after` until two in a row are normal; None: never.

    Normal: no failure, and a p99 of at most twice the worst one of `usual`. `Log.windows` gives the windows.
    """
    bound = 2 * max((p99 for _, p99, _ in usual if p99 is not None), default=0.0)
    normal = [p99 is not None and p99 <= bound and not failed for _, p99, failed in after]
    first = next((n for n in range(len(normal) - 1) if normal[n] and normal[n + 1]), None)
    return None if first is None else after[first][0] - after[0][0]
