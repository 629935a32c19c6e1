"""ASGI middleware of every request: request id, API key, rate limit, body, admission, access log.

Plain ASGI, because a refused request must cost nearly nothing. A reply is built while its request holds a permit and
sent after the permit is released: a client that reads slowly does not keep the permit.
"""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.serve.access_policy import LIMITED_PATHS, AccessPolicy
from twotower.serve.api_keys import ApiKeys
from twotower.serve.problems import Problem, overload_problem
from twotower.serve.request_body import (
    UNCOUNTED_BYTES,
    BodyMemory,
    BodyReader,
    BodyReservation,
    ClientDisconnected,
    body_weight,
    has_body,
)
from twotower.serve.service import Service

log = logging.getLogger("twotower.middleware")
access = logging.getLogger("twotower.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
OVERLOAD_LOG_INTERVAL = 1.0
"""Seconds between two log lines about requests refused for overload."""
REPLY_CHUNK_BYTES = 64 << 10
"""Bytes of a reply passed to the transport at a time; the rest stays here, where it is counted."""
CLIENT_GONE_ROUTE = "gone"
"""Label `route` of requests whose client disconnected before the body was complete or the permit was granted."""
HEALTH_PATHS = ("/livez", "/readyz")
"""Paths answered without a permit."""


class RequestMiddleware:
    """ASGI application that wraps `app`."""

    def __init__(self, app: ASGIApp, service: Service, keys: ApiKeys | None, admin: bool = False) -> None:
        """Wrap `app`. With `admin` only keys of scope admin are accepted."""
        s = service.settings
        self.app, self.service, self._admin = app, service, admin
        self._access = AccessPolicy(s, keys, admin)
        self._metrics, self._admission = service.metrics, service.admission
        self._bodies = BodyReader(s.max_body, s.body_timeout)
        self._body_memory = BodyMemory(s.body_memory)
        self._overload_count, self._overload_logged = 0, 0.0
        self._overload_refusals = self._metrics.refused.labels("overload")
        self._overload_replies = self._metrics.requests.labels("refused", "503")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        path: str = scope["path"]
        headers = dict(scope["headers"])
        key = self._access.find_key(headers)
        client = key.name if key else self._access.address(scope)
        # Batches and console requests release their permit once the body is read, and continue without it.
        needs_permit = path not in HEALTH_PATHS and not self._admin
        may_be_refused = needs_permit and path.startswith(LIMITED_PATHS)
        if may_be_refused and self._admission.overloaded(client, body_weight(headers)):
            await self._refuse_for_overload(send)
            return
        given_id = headers.get(b"x-request-id", b"")
        # Other characters could forge a log line or a header.
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else secrets.token_hex(8).encode()
        scope["request_id"] = request_id.decode()
        # HEAD is answered as GET; the server leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        reply: list[Message] = []
        reservation = BodyReservation(self._body_memory)

        async def collect(message: Message) -> None:
            reply.append(message)

        key_name, route, size = "-", "refused", 0
        self._metrics.in_flight.inc()
        try:
            try:
                key_name = self._access.authorize(scope, headers, key, client)
                if scope["method"] in ("POST", "PUT", "PATCH") or has_body(headers):
                    receive, size = await self._bodies.read(receive, headers, reservation)
                if needs_permit:
                    arrived = time.perf_counter()
                    weight = body_weight(headers, size)
                    if size and may_be_refused and self._admission.overloaded(client, weight):
                        raise overload_problem()  # other requests arrived while it was read
                    async with self._admission.permit(client, weight):
                        cycle = scope.get("state", {}).get("cycle", bool)()  # none in tests without a server
                        if cycle and cycle.disconnected:
                            raise ClientDisconnected
                        self._metrics.stages["wait"].observe(time.perf_counter() - arrived)
                        await self.app(inner, receive, collect)
                else:
                    await self.app(inner, receive, collect)
                route = getattr(inner.get("route"), "path", route)
                if (reply_bytes := sum(len(message.get("body", b"")) for message in reply)) > UNCOUNTED_BYTES:
                    reservation.reserve(reply_bytes - UNCOUNTED_BYTES)
            except Problem as problem:
                self._metrics.refused.labels(problem.name).inc()
                reply[:] = _problem_messages(problem, scope)
            except ClientDisconnected:
                route = CLIENT_GONE_ROUTE
            except Exception:
                log.exception("request failed", extra={"fields": {"id": scope["request_id"]}})
                route = getattr(inner.get("route"), "path", route)
                reply[:] = _problem_messages(Problem("internal-error"), scope)
            if reply:
                extra_headers = [(b"x-request-id", request_id)]
                if self.service.draining or reply[0]["status"] in (408, 413):
                    extra_headers.append((b"connection", b"close"))
                reply[0]["headers"] = [*reply[0]["headers"], *extra_headers]
            for message in reply:
                await _send_in_chunks(send, message)
        finally:
            reservation.release()
            self._metrics.in_flight.dec()
            seconds = time.perf_counter() - started
            status = reply[0]["status"] if reply else 0
            self._metrics.count_reply(route, status, seconds)
            if self.service.settings.access_log:
                fields = {"id": scope["request_id"], "method": scope["method"], "route": route, "status": status,
                        "ms": round(seconds * 1e3, 3), "client": key_name}  # fmt: skip
                access.info("request", extra={"fields": fields})

    async def _refuse_for_overload(self, send: Send) -> None:
        """Refuse a request before doing anything else: time spent on refused requests is lost to answered ones."""
        request_id = secrets.token_hex(8).encode()
        self._overload_refusals.inc()
        self._overload_replies.inc()
        self._overload_count += 1
        now = time.monotonic()
        if now - self._overload_logged >= OVERLOAD_LOG_INTERVAL:  # logging must not add to the overload
            log.warning("requests refused for overload", extra={"fields": {"requests": self._overload_count}})
            self._overload_count, self._overload_logged = 0, now
        await send({"type": "http.response.start", "status": 503,
                    "headers": [*_OVERLOAD_HEADERS, (b"x-request-id", request_id)]})  # fmt: skip
        await send({"type": "http.response.body", "body": _OVERLOAD_BODY.replace(_ID_PLACEHOLDER, request_id)})


async def _send_in_chunks(send: Send, message: Message) -> None:
    """Send a message of a reply in chunks, as fast as the client reads."""
    body = message.get("body", b"")
    for end in range(REPLY_CHUNK_BYTES, len(body), REPLY_CHUNK_BYTES):
        await send({"type": "http.response.body", "body": body[end - REPLY_CHUNK_BYTES : end], "more_body": True})
    if len(body) > REPLY_CHUNK_BYTES:
        message = {**message, "body": body[(len(body) - 1) // REPLY_CHUNK_BYTES * REPLY_CHUNK_BYTES :]}
    await send(message)


_ID_PLACEHOLDER = b"0" * 16
_OVERLOAD_BODY = overload_problem().body(_ID_PLACEHOLDER.decode())
_OVERLOAD_HEADERS = overload_problem().raw_headers(len(_OVERLOAD_BODY))


def _problem_messages(problem: Problem, scope: Scope) -> list[Message]:
    body = problem.body(scope["request_id"])
    headers = problem.raw_headers(len(body))
    return [
        {"type": "http.response.start", "status": problem.status, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]
