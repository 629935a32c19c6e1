"""The protocol of one connection: uvicorn's, with bounds on what a client sends and a step for each timeout."""

from __future__ import annotations

import asyncio
import re
import weakref
from collections import deque
from enum import Enum
from typing import ClassVar, NoReturn

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from twotower.serve.connections import CLOSE_DELAY, Connections, TimeoutQueue
from twotower.serve.problems import Problem
from twotower.serve.request_body import UNCOUNTED_BYTES

MAX_HEAD_BYTES = 32 << 10
"""Largest head of a request in bytes, and most bytes in a row that belong neither to a head nor to a body."""
MAX_HEADERS = 128
"""Most headers of a request."""
MAX_PIPELINED = 16
"""Most requests that a client may send before the reply to an earlier one."""
_HOST = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._%-]+)?\])(?::\d{1,5})?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)


class MalformedRequest(Exception):
    """Bytes that are no valid request; ends the parser."""


class ParserState(Enum):
    """Part of a request that the parser of a connection is in."""

    NONE, HEAD, BODY = range(3)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with a timeout for every step of a client: the rest of a head, of a body (also after its
    refusal), reading the reply, the next request. Invalid HTTP is answered with a problem."""

    all_connections: ClassVar[Connections]
    max_body: ClassVar[int]
    queue: TimeoutQueue | None = None
    counted = False
    address = ""
    _state = ParserState.NONE
    _head_ended = False
    """True if a head has ended since the last `_update_queue`."""
    _head_bytes = _headers = _stray_bytes = _unread_bytes = 0
    """Bytes and headers of the head; consecutive bytes outside head and body; bytes of a body after its refusal."""
    _host: bytes | None = None
    _valid_host: bytes | None = None
    _error = "the bytes are not a valid HTTP/1.1 request"
    _keep_alive_after_continue: bool | None = None
    """With `Expect: 100-continue`: whether the connection stays open if the body arrives; None otherwise."""
    _stopping = _lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unanswered: deque[RequestResponseCycle] = deque()
        self.address = self.all_connections.address(self.client[0]) if self.client else ""
        if self.all_connections.admit(self):
            self._update_queue()
        else:
            self.all_connections.refuse(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self.all_connections.remove(self)
        super().connection_lost(exc)  # it notifies the latest request only
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self._unanswered.clear()

    def data_received(self, data: bytes) -> None:
        if self.queue is self.all_connections.refused:
            self.transport.close()
            return
        self._stray_bytes += len(data)
        super().data_received(data)
        if self._stray_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._error = f"more than {MAX_HEAD_BYTES:,} bytes belong to no head and no body"
            self.send_400_response("")
        self._update_queue()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._update_queue()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._update_queue()

    def on_response_complete(self) -> None:
        if self._unanswered:
            self._unanswered.popleft()
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
        queue: TimeoutQueue | None = None
        all_connections = self.all_connections
        cycle = self._latest
        if self.transport.is_closing() or self.flow.write_paused:
            queue = all_connections.reply
        elif cycle is not None and not cycle.response_complete:
            queue = all_connections.body if self._state is ParserState.BODY and not self.pipeline else None
        elif self._state is ParserState.HEAD or cycle is None:
            queue = all_connections.head
        else:
            queue = all_connections.body if self._state is ParserState.BODY else all_connections.idle
        all_connections.move(self, queue, restart=self._head_ended)
        self._head_ended = False

    def shutdown(self) -> None:
        """Close the connection; without a request so far, after CLOSE_DELAY, because its request may be on the way."""
        self._stopping = True
        cycle = self._latest
        if cycle is None:
            self.loop.call_later(CLOSE_DELAY, self._close_if_unused)
        else:
            super().shutdown()

    def _close_if_unused(self) -> None:
        cycle = self._latest
        if cycle is None or cycle.response_complete:
            self.transport.close()
        else:
            cycle.keep_alive = False

    # ---- callbacks of the parser

    def send_400_response(self, msg: str) -> None:
        cycle = self._latest
        # In the middle of a reply, or before the reply to an earlier request, the client would take it for that reply.
        if (
            cycle is None
            or cycle.response_complete
            or (self._state is ParserState.BODY and not self.pipeline and not cycle.response_started)
        ):
            self.transport.write(Problem("bad-request", self._error).last_reply())
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._state = ParserState.HEAD
        self._head_bytes = self._headers = self._unread_bytes = 0
        self._host, self._keep_alive_after_continue = None, None

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head_bytes(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head_bytes(len(name) + len(value) + 4)
        if self._state is ParserState.BODY:
            return  # a trailer is no header of its request
        super().on_header(name, value)
        self._headers += 1
        if self._headers > MAX_HEADERS:
            self._refuse(f"the request has more than {MAX_HEADERS} headers")
        if len(name) == 4 and name.lower() == b"host":
            if self._host is not None:
                self._refuse("the request has more than one Host header")
            self._host = value

    def on_headers_complete(self) -> None:
        self._check_host()
        self._state, self._stray_bytes, self._head_ended = ParserState.BODY, 0, True
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        self.scope["state"]["cycle"] = weakref.ref(self.cycle)  # which holds the scope
        if len(self.pipeline) > MAX_PIPELINED:
            self._refuse(f"more than {MAX_PIPELINED} requests came before the reply to the first")
        if self.expect_100_continue and not self._stopping:
            # A client that is refused before 100 Continue may, or may not, send its body.
            self._keep_alive_after_continue, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_body(self, body: bytes) -> None:
        self._stray_bytes = 0
        if self.cycle.response_complete:
            self._unread_bytes += len(body)
            if self._unread_bytes > self.max_body:
                self.all_connections.close(self)
            return
        if self._keep_alive_after_continue is not None:
            self.cycle.keep_alive, self._keep_alive_after_continue = (
                self._keep_alive_after_continue and not self._stopping,
                None,
            )
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > UNCOUNTED_BYTES:
            self._refuse("a large body came before the reply to an earlier request")

    def on_message_complete(self) -> None:
        self._state, self._stray_bytes = ParserState.NONE, 0
        super().on_message_complete()

    def _check_host(self) -> None:
        """Refuse a request with two hosts, or none: a proxy in front may read another request than this server."""
        host = self._host
        if host is None:
            if self.parser.get_http_version() != "1.0":
                self._refuse("the request has no Host header")
        elif host != self._valid_host:
            if not _HOST.fullmatch(host):
                self._refuse(f"the Host header is {host.decode('latin-1')[:80]!r}, expected NAME or NAME:PORT")
            self._valid_host = host
        if not self.url.startswith(b"/"):
            target = _ABSOLUTE.match(self.url)
            if target is None or target[1].lower() != (host or b"").lower():
                self._refuse("the request target names another host than the Host header")

    def _count_head_bytes(self, n: int) -> None:
        self._head_bytes += n
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(f"the head has more than {MAX_HEAD_BYTES:,} bytes")

    def _refuse(self, error: str) -> NoReturn:
        self._error = error
        raise MalformedRequest(error)
