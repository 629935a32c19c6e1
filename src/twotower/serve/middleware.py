"""ASGI middleware of every request: request id, API key, rate limit, body, admission, access log.

Plain ASGI, because a refused request must cost nearly nothing. A body is read within its limits before its request gets
a permit. A reply is built while its request holds the permit and sent after the permit is released: a client that sends
or reads slowly does not keep the permit.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.serve.access_policy import LIMITED_PATHS, AccessPolicy, Headers
from twotower.serve.admission import BYTES_PER_WEIGHT
from twotower.serve.api_keys import ApiKeys
from twotower.serve.connections import UNCOUNTED_BYTES, RepeatedWarning
from twotower.serve.problems import Problem
from twotower.serve.service import Service

log = logging.getLogger("twotower.middleware")
access = logging.getLogger("twotower.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
REPLY_CHUNK_BYTES = 64 << 10
"""Bytes of a reply passed to the transport at a time; the rest stays here, where it is counted."""
CLIENT_GONE_ROUTE = "gone"
"""Label `route` of requests whose client disconnected before the body was complete or the permit was granted."""
HEALTH_PATHS = ("/livez", "/readyz")
"""Paths answered without a permit."""


class ClientDisconnected(Exception):
    """The client closed the connection before its body was complete."""


class BodyMemory:
    """A budget of bytes for the bodies and replies in progress, exceeded by at most one reservation."""

    def __init__(self, limit: int) -> None:
        self._limit, self._reserved = limit, 0

    @contextmanager
    def reservation(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that reserves bytes until the block ends. It raises Problem "overload" if none are left."""
        own = 0

        def reserve(size: int) -> None:
            nonlocal own
            if self._reserved >= self._limit:
                raise Problem("overload", f"bodies and replies in progress hold the allowed {self._limit:,} bytes")
            self._reserved += size
            own += size

        try:
            yield reserve
        finally:
            self._reserved -= own


class RequestMiddleware:
    """ASGI application that wraps `app`."""

    def __init__(self, app: ASGIApp, service: Service, keys: ApiKeys | None, admin: bool = False) -> None:
        """Wrap `app`. With `admin` only keys of scope admin are accepted."""
        s = service.settings
        self.app, self.service, self._admin = app, service, admin
        self._access = AccessPolicy(s, keys, admin)
        self._metrics, self._admission = service.metrics, service.admission
        self._body_memory = BodyMemory(s.body_memory)
        self._overload_warning = RepeatedWarning(log, "requests refused for overload")
        self._overload_refusals = self._metrics.refused.labels("overload")
        self._overload_replies = self._metrics.requests.labels("refused", "503")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = dict(scope["headers"])
        key = self._access.find_key(headers)
        client = key.name if key else self._access.address(scope)
        given_id = headers.get(b"x-request-id", b"")
        # Other characters could forge a log line or a header.
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else secrets.token_hex(8).encode()
        may_be_refused = not self._admin and scope["path"].startswith(LIMITED_PATHS)
        if may_be_refused and self._admission.overloaded(client, _weight(headers)):
            await self._refuse_for_overload(send, request_id)
            return
        scope["request_id"] = request_id.decode()
        # HEAD is answered as GET; the server leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        reply: list[Message] = []
        key_name, route = "-", "refused"
        self._metrics.in_flight.inc()
        try:
            with self._body_memory.reservation() as reserve:
                try:
                    key_name = self._access.authorize(scope, headers, key, client)
                    weight = _weight(headers)
                    if scope["method"] in ("POST", "PUT", "PATCH") or _has_body(headers):
                        receive, size = await self._read_body(receive, headers, reserve)
                        weight = _weight(headers, size)
                        if size and may_be_refused and self._admission.overloaded(client, weight):
                            raise Problem("overload")  # other requests arrived while it was read
                    await self._answer(inner, receive, reply, client, weight)
                    route, reply[0]["headers"] = _route(inner), [*reply[0]["headers"], (b"x-request-id", request_id)]
                    if (reply_bytes := sum(len(message.get("body", b"")) for message in reply)) > UNCOUNTED_BYTES:
                        reserve(reply_bytes - UNCOUNTED_BYTES)
                except Problem as problem:
                    self._metrics.refused.labels(problem.name).inc()
                    reply[:] = _messages(problem, request_id)
                except ClientDisconnected:
                    route = CLIENT_GONE_ROUTE
                except Exception:
                    log.exception("request failed", extra={"fields": {"id": scope["request_id"]}})
                    route, reply[:] = _route(inner), _messages(Problem("internal-error"), request_id)
                if reply and (self.service.draining or reply[0]["status"] in (408, 413)):
                    reply[0]["headers"] = [*reply[0]["headers"], (b"connection", b"close")]
                for message in reply:
                    await _send_in_chunks(send, message)
        finally:
            self._metrics.in_flight.dec()
            seconds = time.perf_counter() - started
            status = reply[0]["status"] if reply else 0
            self._metrics.count_reply(route, status, seconds)
            if self.service.settings.access_log:
                fields = {"id": scope["request_id"], "method": scope["method"], "route": route, "status": status,
                        "ms": round(seconds * 1e3, 3), "client": key_name}  # fmt: skip
                access.info("request", extra={"fields": fields})

    async def _answer(self, scope: Scope, receive: Receive, reply: list[Message], client: str, weight: float) -> None:
        """Append the messages of the application's reply, which is made while the request holds a permit."""

        async def collect(message: Message) -> None:
            reply.append(message)

        # Batches and console requests release their permit once the body is parsed, and continue without it.
        if self._admin or scope["path"] in HEALTH_PATHS:
            await self.app(scope, receive, collect)
            return
        arrived = time.perf_counter()
        async with self._admission.permit(client, weight):
            cycle = scope.get("state", {}).get("cycle", bool)()  # none in tests without a server
            if cycle and cycle.disconnected:
                raise ClientDisconnected
            self._metrics.stages["wait"].observe(time.perf_counter() - arrived)
            await self.app(scope, receive, collect)

    async def _read_body(
        self, receive: Receive, headers: Headers, reserve: Callable[[int], None]
    ) -> tuple[Receive, int]:
        """Read a body of JSON within its limits; return a `receive` that yields it, and its size in bytes.

        Raises Problem and ClientDisconnected."""
        s, length = self.service.settings, headers.get(b"content-length", b"")
        if length and (not length.isdigit() or len(length) > 20 or int(length) > s.max_body):
            raise Problem("too-large", f"{length.decode('latin-1')[:20]} bytes, at most {s.max_body:,} are accepted")
        content_type, coding = headers.get(b"content-type", b""), headers.get(b"content-encoding", b"identity")
        # A missing type is refused too: a page of another site can send that, text/plain and forms without a preflight.
        if content_type.partition(b";")[0].strip().lower() != b"application/json":
            given = (
                f"Content-Type is {content_type.decode('latin-1')[:80]!r}"
                if content_type
                else "Content-Type is missing"
            )
            raise Problem("unsupported-media-type", f"{given}, expected application/json")
        if coding.lower() != b"identity":
            raise Problem(
                "unsupported-media-type",
                f"Content-Encoding is {coding.decode('latin-1')[:80]!r}; send the body without an encoding",
            )
        body, counted = bytearray(), UNCOUNTED_BYTES
        try:
            async with asyncio.timeout(s.body_timeout):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise ClientDisconnected
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > s.max_body:
                        raise Problem("too-large", f"the body has more than {s.max_body:,} bytes")
                    if len(body) > counted:
                        reserve(len(body) - counted)
                        counted = len(body)
        except TimeoutError:
            raise Problem("body-timeout") from None
        body_message: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def receive_body() -> Message:
            nonlocal body_message
            if body_message is None:
                return await receive()
            message, body_message = body_message, None
            return message

        return receive_body, len(body)

    async def _refuse_for_overload(self, send: Send, request_id: bytes) -> None:
        """Refuse a request before doing anything else: time spent on refused requests is lost to answered ones."""
        self._overload_refusals.inc()
        self._overload_replies.inc()
        self._overload_warning.count("requests")
        for message in _messages(Problem("overload"), request_id):
            await send(message)


async def _send_in_chunks(send: Send, message: Message) -> None:
    """Send a message of a reply in chunks, as fast as the client reads."""
    body = message.get("body", b"")
    if len(body) <= REPLY_CHUNK_BYTES:
        await send(message)
        return
    for start in range(0, len(body), REPLY_CHUNK_BYTES):
        end = start + REPLY_CHUNK_BYTES
        await send({"type": "http.response.body", "body": body[start:end], "more_body": end < len(body)})


def _messages(problem: Problem, request_id: bytes) -> list[Message]:
    body = problem.body(request_id.decode())
    headers = [*problem.raw_headers(len(body)), (b"x-request-id", request_id)]
    return [
        {"type": "http.response.start", "status": problem.status, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]


def _route(scope: Scope) -> str:
    """Return the pattern of the route that answered a request."""
    return getattr(scope.get("route"), "path", "refused")


def _has_body(headers: Headers) -> bool:
    """Return True if a request announces a body."""
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def _weight(headers: Headers, size: int = 0) -> float:
    """Return the weight of a request in the queue, from the size of its body, read or announced."""
    length = headers.get(b"content-length", b"")
    return 1.0 + (size or (int(length) if length.isdigit() and len(length) < 16 else 0)) / BYTES_PER_WEIGHT
