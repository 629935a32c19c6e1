"""Connections of one worker: how many there may be, of whom, and how long each may keep it waiting.

A connection is in one of four lanes while its client has something to do (`idle`: ask again, `head` and `body`: send the
rest of that, `reply`: take it), and in none while it is answered. A lane has one time limit, so its first connection is
the one that has waited longest: it is the next to run out of time, and the next to make room for another.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import itertools
import logging
import re
import resource
from collections import Counter, deque
from enum import Enum
from typing import Any, ClassVar, NoReturn

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from twotower.errors import ConfigError
from twotower.serve.body_memory import UNCOUNTED_BYTES
from twotower.serve.metrics import ServeMetrics
from twotower.serve.problems import Problem
from twotower.serve.settings import ServeSettings, client_address

MAX_HEAD_BYTES = 32 << 10
"""Bytes that the head of a request may have, and that may come without being one or belonging to a body."""
MAX_HEADERS = 128
"""Headers that a request may have."""
MAX_PIPELINED = 16
"""Requests that may be sent before the reply to an earlier one."""
MAX_OPEN_FILES, RESERVED_FILES = 65_536, 96
"""Open files that the process asks for at most; those that are kept for bundles, logs, other stores and processes."""
DEFAULT_MAX_CONNECTIONS = 4_096
"""Connections of one worker where nothing else is said and the limit of open files allows it."""
EVICTION_GRACE = 1.0
"""Seconds that a client who is asked for something has for it before the connection may make room for another."""
CLOSE_DELAY = 0.5
"""Seconds that a connection made just before the end has for its request, and a refused one to be told so."""
MAX_REFUSED_OPEN = 16
"""Refused connections that may be open at once, so that their clients can read why."""
BODY_REPLY_SLACK = 1.0
"""Seconds that a body has beyond its time, in which its request is answered with 408."""
LOG_INTERVAL = 1.0
"""Seconds between two lines that say how many were refused."""

log = logging.getLogger("twotower.connections")


def connection_limits(wanted: int, each: int) -> tuple[int, int]:
    """Connections of one worker and of one address, after the limit of open files is raised; 0 is what it allows, and
    half of that. Raises ConfigError if there are not so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(hard, MAX_OPEN_FILES) if hard != resource.RLIM_INFINITY else MAX_OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < files:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
        except (OSError, ValueError):  # the system has a bound of its own
            files = soft
    else:
        files = soft if soft != resource.RLIM_INFINITY else MAX_OPEN_FILES
    left = files - RESERVED_FILES
    more = "raise it with ulimit -n, or LimitNOFILE of the unit"
    if left < MAX_REFUSED_OPEN + 8:
        raise ConfigError(
            f"the limit of open files is {files}, at least {RESERVED_FILES + MAX_REFUSED_OPEN + 8} are needed; {more}"
        )
    left -= MAX_REFUSED_OPEN
    if wanted > left:
        raise ConfigError(
            f"--max-connections is {wanted:,}, but the limit of open files, {files:,}, leaves {left:,}; {more}"
        )
    wanted = wanted or min(left, DEFAULT_MAX_CONNECTIONS)
    if each > wanted:
        raise ConfigError(f"--max-per-address is {each:,}, expected at most the {wanted:,} of --max-connections")
    return wanted, each or -(-wanted // 2)


class TimeoutQueue(dict["HttpProtocol", float]):
    """Connections whose clients have the same thing to do, and since when; the longest first."""

    def __init__(self, reason: str, limit: float, patience: float = EVICTION_GRACE) -> None:
        super().__init__()
        self.reason, self.limit, self.patience = reason, limit, patience

    def late(self, now: float) -> list[HttpProtocol]:
        """Connections that are out of time."""
        return [one for one, _ in itertools.takewhile(lambda found: now - found[1] >= self.limit, self.items())]


class Connections:
    """All of one worker, on whichever port."""

    def __init__(self, settings: ServeSettings, metrics: ServeMetrics) -> None:
        s = settings
        self.most, self.most_each = s.max_connections, s.max_per_address
        self.idle = TimeoutQueue("idle", s.keep_alive, 0.0)
        self.head = TimeoutQueue("head", s.head_timeout)
        self.body = TimeoutQueue("body", s.body_timeout + BODY_REPLY_SLACK)
        self.reply = TimeoutQueue("reply", s.body_timeout)
        self.leaving = TimeoutQueue("refused", CLOSE_DELAY)
        self._lanes = (self.idle, self.head, self.body, self.reply)
        self._open, self._each = 0, Counter[str]()
        self._gauge, self._count = metrics.connections, metrics.connections_ended
        self._said: Counter[str] = Counter()
        limits = [lane.limit for lane in (*self._lanes, self.leaving)]
        self.pause = max(0.05, min(1.0, *limits) / 5)
        """Seconds between two looks at who is out of time."""
        proxies = [ipaddress.ip_network(a.strip(), strict=False) for a in filter(None, s.trusted_proxies.split(","))]
        self.address = functools.lru_cache(4_096)(lambda host: client_address(host, proxies))

    def admit(self, one: HttpProtocol) -> bool:
        """Make room for a new connection, by ending an older one if need be; false if there is none."""
        whose = one.address
        if whose and self._each[whose] >= self.most_each and not self._make_room(one, whose):
            return False
        if self._open >= self.most and not self._make_room(one):
            return False
        one.counted = True
        self._open += 1
        self._each[whose] += 1
        return True

    def wait(self, one: HttpProtocol, lane: TimeoutQueue | None, anew: bool = False) -> None:
        """The client has something else to do, or the same once more."""
        if lane is one.lane and not anew:
            return
        if one.lane is not None:
            del one.lane[one]
        one.lane = lane
        if lane is not None:
            lane[one] = one.loop.time()

    def leave(self, one: HttpProtocol) -> None:
        """A connection is gone, or will be at once."""
        self.wait(one, None)
        if one.counted:
            one.counted = False
            self._open -= 1
            self._each[one.address] -= 1
            if not self._each[one.address]:
                del self._each[one.address]

    def refuse(self, one: HttpProtocol) -> None:
        """Tell the client so, and close when it has read that."""
        self.ended("refused")
        one.transport.write(_REFUSAL)
        if len(self.leaving) >= MAX_REFUSED_OPEN:
            self.close(next(iter(self.leaving)))
        self.wait(one, self.leaving)

    def close(self, one: HttpProtocol) -> None:
        """Close at once: what a client does not take is not kept for it."""
        self.leave(one)
        if one.transport.get_write_buffer_size():
            one.transport.abort()
        else:
            one.transport.close()

    def ended(self, reason: str) -> None:
        self._count.labels(reason).inc()
        self._said[reason] += 1

    async def watch(self) -> None:
        """Close connections that are out of time; say now and then how many there was no room for."""
        loop = asyncio.get_running_loop()
        said = loop.time() - LOG_INTERVAL
        try:
            while True:
                await asyncio.sleep(self.pause)
                now = loop.time()
                for lane in (*self._lanes, self.leaving):
                    for one in lane.late(now):
                        if lane is not self.leaving:
                            self.ended(lane.reason)
                        self.close(one)
                self._gauge.set(self._open)
                if now - said >= LOG_INTERVAL and self._say():
                    said = now
        finally:
            self._say()

    def _say(self) -> bool:
        told = {"refused": self._said["refused"], "closed_for_others": self._said["room"]}
        self._said.clear()
        if any(told.values()):
            log.warning("too many connections", extra={"fields": told})
        return any(told.values())

    def _make_room(self, newcomer: HttpProtocol, whose: str = "") -> bool:
        """Close the connection that has waited longest, of an address or of all; those without a request under way
        first."""
        now = newcomer.loop.time()
        for lane in self._lanes:
            for one, since in lane.items():
                if now - since < lane.patience:
                    break
                if not whose or one.address == whose:
                    self.ended("room")
                    self.close(one)
                    return True
        return False


class MalformedRequest(Exception):
    """The error for bytes that are no request. The parser ends with it."""


class ParserState(Enum):
    """The part of a request that a connection's parser is in."""

    NONE, HEAD, BODY = range(3)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, in which whatever a client does not do has an end: the rest of a head, of a body, also of one that nobody
    reads any more, the reply, the next request. What is no HTTP is told so as a problem."""

    lanes: ClassVar[Connections]
    most_body: ClassVar[int]
    lane: TimeoutQueue | None = None
    counted = False
    """True once the connection is counted among the open ones."""
    client_address = ""
    _part = ParserState.NONE
    _began = False
    """True if a head has ended since the last look."""
    _size = _headers = _quiet = _unread = 0
    """Bytes and headers of the head; bytes since the last that belonged to anything; bytes of a body that nobody reads."""
    _host: bytes | None = None
    _good_host: bytes | None = None
    _why = "this is no HTTP/1.1"
    _alive: bool | None = None
    """True if the connection stays open should the body come that the client asks leave to send."""
    _stopping = _gone = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._unanswered: deque[Any] = deque()
        self.address = self.lanes.address(self.client[0]) if self.client else ""
        if self.lanes.admit(self):
            self._settle()
        else:
            self.lanes.refuse(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self.lanes.leave(self)
        super().connection_lost(exc)  # which tells the latest request alone
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self._unanswered.clear()

    def data_received(self, data: bytes) -> None:
        if self.lane is self.lanes.leaving:
            self.transport.close()
            return
        self._quiet += len(data)
        super().data_received(data)
        if self._quiet > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._why = f"more than {MAX_HEAD_BYTES:,} bytes are no head and no body"
            self.send_400_response("")
        self._settle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._settle()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._settle()

    def on_response_complete(self) -> None:
        if self._unanswered:
            self._unanswered.popleft()
        super().on_response_complete()
        self._unset_keepalive_if_required()  # any byte would end it
        self._settle()

    def _settle(self) -> None:
        """Wait for whatever the client has to do now."""
        if self._gone:
            return
        lane: TimeoutQueue | None = None
        lanes = self.lanes
        cycle: Any = self.cycle  # None at first
        if self.transport.is_closing() or self.flow.write_paused:
            lane = lanes.reply
        elif cycle is not None and not cycle.response_complete:
            lane = lanes.body if self._part is ParserState.BODY and not self.pipeline else None
        elif self._part is ParserState.HEAD or cycle is None:
            lane = lanes.head
        else:
            lane = lanes.body if self._part is ParserState.BODY else lanes.idle
        lanes.wait(self, lane, self._began)
        self._began = False

    def shutdown(self) -> None:
        """Close the connection; one that was made just now, when its request may be on the way, a moment later."""
        self._stopping = True
        cycle: Any = self.cycle
        if cycle is None:
            self.loop.call_later(CLOSE_DELAY, self._last_word)
        else:
            super().shutdown()

    def _last_word(self) -> None:
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.close()
        else:
            cycle.keep_alive = False

    # ---- what the parser finds

    def send_400_response(self, msg: str) -> None:
        cycle: Any = self.cycle
        answering = cycle is not None and not cycle.response_complete
        # In the middle of a reply, or before that to an earlier request, it would be taken for that.
        if not answering or (self._part is ParserState.BODY and not self.pipeline and not cycle.response_started):
            body = Problem("http", self._why).body()
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part = ParserState.HEAD
        self._size = self._headers = self._unread = 0
        self._host, self._alive = None, None

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._grow(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._grow(len(name) + len(value) + 4)
        if self._part is ParserState.BODY:
            return  # what comes after a body is no header of its request
        super().on_header(name, value)
        self._headers += 1
        if self._headers > MAX_HEADERS:
            self._refuse(f"it has more than {MAX_HEADERS} headers")
        if len(name) == 4 and name.lower() == b"host":
            if self._host is not None:
                self._refuse("it has more than one header Host")
            self._host = value

    def on_headers_complete(self) -> None:
        self._check_host()
        self._part, self._quiet, self._began = ParserState.BODY, 0, True
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        if len(self.pipeline) > MAX_PIPELINED:
            self._refuse(f"more than {MAX_PIPELINED} requests came before the reply to the first")
        if self.expect_100_continue and not self._stopping:
            # A client that is refused before it was let send its body may, or may not, send it.
            self._alive, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_body(self, body: bytes) -> None:
        self._quiet = 0
        if self.cycle.response_complete:
            self._unread += len(body)
            if self._unread > self.most_body:
                self.lanes.close(self)
            return
        if self._alive is not None:
            self.cycle.keep_alive, self._alive = self._alive and not self._stopping, None
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > UNCOUNTED_BYTES:
            self._refuse("a large body came before the reply to an earlier request")

    def on_message_complete(self) -> None:
        self._part, self._quiet = ParserState.NONE, 0
        super().on_message_complete()

    def _check_host(self) -> None:
        """A request that names two hosts, or none, is read as one thing here and as another by a proxy in front."""
        host = self._host
        if host is None:
            if self.parser.get_http_version() != "1.0":
                self._refuse("it has no header Host")
        elif host != self._good_host:
            if not _HOST.fullmatch(host):
                self._refuse(f"its header Host is {host.decode('latin-1')[:80]!r}, expected NAME or NAME:PORT")
            self._good_host = host
        if not self.url.startswith(b"/"):
            target = _ABSOLUTE.match(self.url)
            if target is None or target[1].lower() != (host or b"").lower():
                self._refuse("its target is of another host than its header Host")

    def _grow(self, n: int) -> None:
        self._size += n
        if self._size > MAX_HEAD_BYTES:
            self._refuse(f"its head has more than {MAX_HEAD_BYTES:,} bytes")

    def _refuse(self, why: str) -> NoReturn:
        self._why = why
        raise MalformedRequest(why)


_HOST = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._%-]+)?\])(?::\d{1,5})?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)


def _refusal() -> bytes:
    body = Problem("connections").body()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nretry-after: 1\r\n"
        b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    )


_REFUSAL = _refusal()
