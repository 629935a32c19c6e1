"""Connections of one worker: their number, their number per address, and the time each client has for its next step.

A connection is in one of two timeout queues while the worker waits for its client: `idle` for the next request,
`stalled` for the rest of a body or for the client to read. It is in none while its request is answered. All connections
of a queue have the same timeout, so the first one has waited longest: it is the next to time out, and the next to be
closed for a new connection. uvicorn parses and answers; these limits hold without a proxy in front.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import itertools
import logging
import re
import time
import weakref
from collections import Counter
from typing import ClassVar, NoReturn

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from twotower.errors import ConfigError
from twotower.serve.metrics import ServeMetrics
from twotower.serve.problems import Problem
from twotower.serve.settings import ServeSettings, client_address

MAX_OPEN_FILES, RESERVED_FILES = 65_536, 96
"""Highest limit of open files that the process sets; files reserved for bundles, logs, other stores and processes."""
DEFAULT_MAX_CONNECTIONS = 4_096
"""Default number of connections of one worker, if the limit of open files allows it."""
MAX_REFUSED_OPEN = 16
"""Most refused connections that stay open at once so that their clients can read the reply."""
EVICTION_GRACE = 1.0
"""Seconds that a connection in `stalled` is safe from being closed for a new connection."""
CLOSE_DELAY = 0.5
"""Seconds for a connection opened just before shutdown to send its request, and for a refused one to read the reply."""
CLOSE_STEPS = 5
"""Timers in a row that make up CLOSE_DELAY at shutdown."""
BODY_REPLY_SLACK = 1.0
"""Seconds after `body_timeout` in which the middleware answers 408 before the connection is closed."""
LOG_INTERVAL = 1.0
"""Least seconds between two log lines of the same warning."""
UNCOUNTED_BYTES = 16 << 10
"""Bytes of each body and of each reply that are not counted, so that large requests never make an ordinary one refused.
The number of connections bounds their sum."""
MAX_HEAD_BYTES = 32 << 10
"""Largest head of a request in bytes, and most bytes in a row that end no head and belong to no body."""
MAX_HEADERS = 128
"""Most headers of a request."""
_HOST = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._%-]+)?\])(?::\d{1,5})?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)
REFUSAL = Problem("too-many-connections").last_reply()
log = logging.getLogger("twotower.connections")


def connection_limits(max_connections: int, max_per_address: int) -> tuple[int, int]:
    """Raise the soft limit of open files, and return the most connections of one worker and of one address.

    0 asks for the default: what the limit of open files allows, up to DEFAULT_MAX_CONNECTIONS, and half of that for an
    address. Raises ConfigError if the limit of open files does not allow the numbers."""
    files = _raise_open_files()
    available = files - RESERVED_FILES
    remedy = "raise it with ulimit -n, or LimitNOFILE in a systemd unit"
    if available < MAX_REFUSED_OPEN + 8:
        raise ConfigError(
            f"the limit of open files is {files}, at least {RESERVED_FILES + MAX_REFUSED_OPEN + 8} are needed; {remedy}"
        )
    available -= MAX_REFUSED_OPEN
    if max_connections > available:
        raise ConfigError(
            f"`max_connections` is {max_connections:,}, but the limit of open files, {files:,}, leaves {available:,}; "
            f"{remedy}"
        )
    max_connections = max_connections or min(available, DEFAULT_MAX_CONNECTIONS)
    if max_per_address > max_connections:
        raise ConfigError(
            f"`max_per_address` is {max_per_address:,}, expected at most the {max_connections:,} of `max_connections`"
        )
    return max_connections, max_per_address or -(-max_connections // 2)


def _raise_open_files() -> int:
    """Raise the soft limit of open files up to MAX_OPEN_FILES; return the limit, MAX_OPEN_FILES without one."""
    try:
        import resource
    except ImportError:  # Windows
        return MAX_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(hard, MAX_OPEN_FILES) if hard != resource.RLIM_INFINITY else MAX_OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= files:
        return soft if soft != resource.RLIM_INFINITY else MAX_OPEN_FILES
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    except (OSError, ValueError):  # the system sets a lower bound
        return soft
    return files


class RepeatedWarning:
    """A warning that is logged at most every LOG_INTERVAL seconds, with the number of its events since the last line.

    Logging each refusal would add to an overload."""

    def __init__(self, log: logging.Logger, message: str) -> None:
        self._log, self._message = log, message
        self._counts, self._logged = Counter[str](), float("-inf")

    def count(self, what: str) -> None:
        self._counts[what] += 1
        self.flush()

    def flush(self) -> None:
        """Log what was counted since the last line, if that is long enough ago."""
        now = time.monotonic()
        if self._counts and now - self._logged >= LOG_INTERVAL:
            self._log.warning(self._message, extra={"fields": dict(self._counts)})
            self._counts.clear()
            self._logged = now


class TimeoutQueue(dict["Connection", float]):
    """Connections that wait for the same step of their clients, each with the time since when, longest first.

    `reason` labels the metric of ended connections, `timeout` and `grace` are in seconds."""

    def __init__(self, reason: str, timeout: float, grace: float = 0.0) -> None:
        super().__init__()
        self.reason, self.timeout, self.grace = reason, timeout, grace

    def timed_out(self, now: float) -> list[Connection]:
        """Return the connections whose time is over."""
        return [c for c, _ in itertools.takewhile(lambda item: now - item[1] >= self.timeout, self.items())]


class Connections:
    """All connections of one worker, on both ports."""

    def __init__(self, settings: ServeSettings, metrics: ServeMetrics) -> None:
        s = settings
        self.max_connections, self.max_per_address = s.max_connections, s.max_per_address
        self.max_body = max(s.max_body, MAX_HEAD_BYTES)
        self.idle = TimeoutQueue("idle", s.keep_alive)
        self.stalled = TimeoutQueue("stalled", s.body_timeout + BODY_REPLY_SLACK, EVICTION_GRACE)
        self.refused = TimeoutQueue("refused", CLOSE_DELAY)
        self._open, self._open_by_address = 0, Counter[str]()
        self._open_gauge, self._ended_counter = metrics.connections, metrics.connections_ended
        self._warning = RepeatedWarning(log, "too many connections")
        self.check_interval = max(0.05, min(CLOSE_DELAY, s.keep_alive, s.body_timeout) / 5)
        """Seconds between two checks for timed out connections."""
        proxies = [ipaddress.ip_network(a.strip(), strict=False) for a in filter(None, s.trusted_proxies.split(","))]
        self.address = functools.lru_cache(4_096)(lambda host: client_address(host, proxies))

    def admit(self, connection: Connection) -> bool:
        """Count a new connection, closing an older one if the limit is reached; return False if none can be closed."""
        address = connection.address
        if (
            address
            and self._open_by_address[address] >= self.max_per_address
            and not self._make_room(connection, address)
        ):
            return False
        if self._open >= self.max_connections and not self._make_room(connection):
            return False
        connection.counted = True
        self._open += 1
        self._open_by_address[address] += 1
        return True

    def move(self, connection: Connection, queue: TimeoutQueue | None) -> None:
        """Put a connection into a queue, or into none. Its time starts again in another queue."""
        if queue is connection.queue:
            return
        if connection.queue is not None:
            del connection.queue[connection]
        connection.queue = queue
        if queue is not None:
            queue[connection] = connection.loop.time()

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed, or is about to be."""
        self.move(connection, None)
        if connection.counted:
            connection.counted = False
            self._open -= 1
            self._open_by_address[connection.address] -= 1
            if not self._open_by_address[connection.address]:
                del self._open_by_address[connection.address]

    def refuse(self, connection: Connection) -> None:
        """Send a 503 reply, and close the connection once the client has had time to read it."""
        self._ended_counter.labels("refused").inc()
        self._warning.count("refused")
        connection.transport.write(REFUSAL)
        if len(self.refused) >= MAX_REFUSED_OPEN:
            self.close(next(iter(self.refused)))
        self.move(connection, self.refused)

    def close(self, connection: Connection) -> None:
        """Close a connection at once, dropping what its client has not read."""
        self.remove(connection)
        if connection.transport.get_write_buffer_size():
            connection.transport.abort()
        else:
            connection.transport.close()

    async def watch(self) -> None:
        """Close connections that time out, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.check_interval)
            now = loop.time()
            for queue in (self.idle, self.stalled, self.refused):
                for connection in queue.timed_out(now):
                    if queue is not self.refused:
                        self._ended_counter.labels(queue.reason).inc()
                    self.close(connection)
            self._open_gauge.set(self._open)
            self._warning.flush()

    def _make_room(self, newcomer: Connection, address: str = "") -> bool:
        """Close the connection that has waited longest, of one address or of all, idle ones first.

        Return False if none may be closed."""
        now = newcomer.loop.time()
        for queue in (self.idle, self.stalled):
            for connection, since in queue.items():
                if now - since < queue.grace:
                    break
                if not address or connection.address == address:
                    self._ended_counter.labels("room").inc()
                    self._warning.count("closed_for_others")
                    self.close(connection)
                    return True
        return False


class Connection(HttpToolsProtocol):
    """A connection to one client: uvicorn's protocol, with a time for every step of the client and without pipelining:
    a request sent before the reply to an earlier one ends the connection after that reply. Invalid HTTP is answered
    with a problem."""

    all_connections: ClassVar[Connections]
    queue: TimeoutQueue | None = None
    counted = False
    """True while the connection counts as open."""
    address = ""
    """Address of the client, as `settings.client_address` counts it."""
    _in_head = False
    """True while the parser is in the head of a request."""
    _stray_bytes = 0
    """Bytes received since a head, or a part of a body that is still expected."""
    _valid_host: bytes | None = None
    _error = "the bytes are not a valid HTTP/1.1 request"
    _lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.all_connections.address(self.client[0]) if self.client else ""
        if self.all_connections.admit(self):
            self._update_queue()
        else:
            self.all_connections.refuse(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self.all_connections.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.queue is self.all_connections.refused:
            self.transport.close()
            return
        self._stray_bytes += len(data)
        super().data_received(data)
        is_refused = not self._in_head and self._latest is not None and self._latest.response_complete
        most = self.all_connections.max_body if is_refused else MAX_HEAD_BYTES  # the rest of a refused body may come
        if self._stray_bytes > most and not self.transport.is_closing():
            self._error = f"more than {most:,} bytes end no head and belong to no body"
            self.send_400_response("")
        self._update_queue()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._update_queue()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._update_queue()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # its timer would close the connection at any byte
        self._update_queue()

    @property
    def _latest(self) -> RequestResponseCycle | None:
        """The latest request and its reply; None before the first."""
        return self.cycle

    def _update_queue(self) -> None:
        """Move the connection to the queue of the client's next step."""
        if self._lost:
            return
        cycle, queue = self._latest, None
        is_answered = cycle is None or cycle.response_complete
        if self.transport.is_closing() or self.flow.write_paused or (not is_answered and self.cycle.more_body):
            queue = self.all_connections.stalled
        elif is_answered:
            queue = self.all_connections.idle
        self.all_connections.move(self, queue)

    def shutdown(self) -> None:
        """Close the connection; without a request so far, after CLOSE_DELAY, because its request may be on the way."""
        self._close_in(CLOSE_STEPS if self._latest is None else 0)

    def _close_in(self, steps: int) -> None:
        """Close after some steps: a process that stood still for all of CLOSE_DELAY reads before the next one."""
        if steps and self._latest is None:
            self.loop.call_later(CLOSE_DELAY / CLOSE_STEPS, self._close_in, steps - 1)
        else:
            super().shutdown()

    # ---- callbacks of the parser

    def send_400_response(self, msg: str) -> None:
        cycle = self._latest
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            cycle.keep_alive = False  # the reply to the request before is the last
            self.flow.pause_reading()
            return
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(Problem("bad-request", self._error).last_reply())
        self.transport.close()

    def on_message_begin(self) -> None:
        if self._latest is not None and not self._latest.response_complete:
            self._refuse("a request came before the reply to an earlier one")
        super().on_message_begin()
        self._in_head, self._stray_bytes = True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # a trailer is no header of its request
            super().on_header(name, value)
            if len(self.headers) > MAX_HEADERS:
                self._refuse(f"the request has more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse(f"the head has more than {MAX_HEAD_BYTES:,} bytes")
        self._check_host()
        self._in_head, self._stray_bytes = False, 0
        super().on_headers_complete()
        self.scope["state"]["cycle"] = weakref.ref(self.cycle)  # which holds the scope
        if self.expect_100_continue:  # a client that is refused before 100 Continue may, or may not, send its body
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if not self.cycle.response_complete:
            self._stray_bytes = 0
        super().on_body(body)

    def _check_host(self) -> None:
        """Refuse a request with two hosts, or none: a proxy in front may read another request than this server."""
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1:
            self._refuse("the request has more than one Host header")
        if not hosts and self.parser.get_http_version() != "1.0":
            self._refuse("the request has no Host header")
        host = hosts[0] if hosts else None
        if host is not None and host != self._valid_host:
            if not _HOST.fullmatch(host):
                self._refuse(f"the Host header is {host.decode('latin-1')[:80]!r}, expected NAME or NAME:PORT")
            self._valid_host = host
        if not self.url.startswith(b"/"):
            target = _ABSOLUTE.match(self.url)
            if target is None or target[1].lower() != (host or b"").lower():
                self._refuse("the request target names another host than the Host header")

    def _refuse(self, error: str) -> NoReturn:
        self._error = error
        raise ValueError(error)  # which ends the parser
