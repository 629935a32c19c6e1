"""ASGI middleware of every request: request id, API key, rate limit, body, admission, access log.

Plain ASGI, because a refused request must cost nearly nothing. A reply is built while its request holds a permit and sent
after the permit is released: a client that reads slowly does not keep the permit.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import secrets
import time
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.serve.admission import BYTES_PER_WEIGHT
from twotower.serve.api_keys import ApiKey, ApiKeys
from twotower.serve.body_memory import UNCOUNTED_BYTES, BodyMemory, BodyReservation
from twotower.serve.problems import Problem, overload_problem
from twotower.serve.rate_limit import RateLimiter
from twotower.serve.service import Service
from twotower.serve.settings import client_address, is_loopback

log = logging.getLogger("twotower.middleware")
access = logging.getLogger("twotower.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
PUBLIC_PATHS = ("/", "/livez", "/readyz", "/problems", "/page", "/openapi.json", "/favicon.ico")
"""Paths and prefixes served without a key: they reveal nothing of users or items."""
OVERLOAD_LOG_INTERVAL = 1.0
"""Seconds between two log lines about requests refused for overload."""
REPLY_CHUNK_BYTES = 64 << 10
"""Bytes of a reply passed to the transport at a time; the rest stays here, where it is counted."""
CLIENT_GONE_ROUTE = "gone"
"""Label `route` of requests whose client disconnected before the body was complete."""


class RequestMiddleware:
    """ASGI application that wraps `app`."""

    def __init__(self, app: ASGIApp, service: Service, keys: ApiKeys | None, admin: bool = False) -> None:
        """Wrap `app`. With `admin` only keys of scope admin are accepted."""
        s = service.settings
        self.app, self.service, self.keys, self.admin = app, service, keys, admin
        self.limiter = RateLimiter(s.rate, s.burst) if s.rate else None
        # Without keys, a page of another site whose name resolves to this address (DNS rebinding) could read replies.
        self._local = keys is None and not s.insecure and is_loopback(s.host)
        self._hosts = {b"localhost", b"127.0.0.1", b"[::1]", s.host.encode(), b"[" + s.host.encode() + b"]"}
        self._address = functools.lru_cache(4_096)(client_address)
        self._metrics, self._admission = service.metrics, service.admission
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
        key = self._key(headers)
        client = key.name if key else self._address((scope.get("client") or ("-",))[0])
        # Batches and console requests release their permit once the body is read, and continue without it.
        needs_permit = path.startswith("/v1/") and not self.admin
        if needs_permit and self._admission.overloaded(client, _body_weight(headers)):
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
                key_name = self._authorize(scope, path, headers, key, client)
                if scope["method"] in ("POST", "PUT", "PATCH") or _has_body(headers):
                    receive, size = await self._read_body(receive, headers, reservation)
                if needs_permit:
                    arrived = time.perf_counter()
                    weight = _body_weight(headers, size)
                    if size and self._admission.overloaded(client, weight):  # other requests arrived while it was read
                        raise overload_problem()
                    async with self._admission.permit(client, weight):
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
            except _ClientDisconnected:
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

    def _key(self, headers: dict[bytes, bytes]) -> ApiKey | None:
        bearer = headers.get(b"authorization", b"")
        if self.keys is None or bearer[:7].lower() != b"bearer ":
            return None
        return self.keys.find(bearer[7:].decode("latin-1").strip())

    def _authorize(self, scope: Scope, path: str, headers: dict[bytes, bytes], key: ApiKey | None, client: str) -> str:
        """Return the name of the client's key, "-" without one. Raises Problem for a request that is not allowed."""
        _check_target_encoding(scope)
        is_public = path == "/" or path.startswith(PUBLIC_PATHS[1:])
        if self.keys is not None and not is_public:
            if key is None:
                raise Problem("unauthorized", headers={"WWW-Authenticate": 'Bearer realm="twotower"'})
            if self.admin and not key.admin:
                raise Problem("key-scope")
        if self._local and (host := headers.get(b"host")) and re.sub(rb":\d+$", b"", host).lower() not in self._hosts:
            raise Problem("foreign-host")
        if self.keys is None and not is_public and _is_cross_origin(headers):
            raise Problem("foreign-origin")
        if self.limiter is not None and path.startswith("/v1/"):
            self.limiter.take(client)
        return key.name if key and not is_public else "-"

    async def _read_body(
        self, receive: Receive, headers: dict[bytes, bytes], reservation: BodyReservation
    ) -> tuple[Receive, int]:
        """Read the body within its limits; return a `receive` that yields it, and its size in bytes. Raises Problem."""
        max_body, length = self.service.settings.max_body, headers.get(b"content-length", b"")
        if length and (not length.isdigit() or len(length) > 20 or int(length) > max_body):
            raise Problem("too-large", f"{length.decode('latin-1')[:20]} bytes, at most {max_body:,} are accepted")
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
            async with asyncio.timeout(self.service.settings.body_timeout):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise _ClientDisconnected
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > max_body:
                        raise Problem("too-large", f"the body has more than {max_body:,} bytes")
                    if len(body) > counted:
                        reservation.reserve(len(body) - counted)
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


def _body_weight(headers: dict[bytes, bytes], size: int = 0) -> float:
    """Return the weight of a request in the queue, from the size of its body, read or announced."""
    length = headers.get(b"content-length", b"")
    return 1.0 + (size or (int(length) if length.isdigit() and len(length) < 16 else 0)) / BYTES_PER_WEIGHT


def _check_target_encoding(scope: Scope) -> None:
    """Raise Problem for a path or query that is not UTF-8: decoded with replacements it could be another user's id."""
    for name, part in (("path", scope.get("raw_path") or b""), ("query", scope["query_string"])):
        if b"%" in part or not part.isascii():
            try:
                unquote_to_bytes(part).decode()
            except UnicodeDecodeError:
                raise Problem(
                    "invalid", f"the {name} is not UTF-8; percent-encode the bytes of an id in UTF-8"
                ) from None


def _is_cross_origin(headers: dict[bytes, bytes]) -> bool:
    """Return whether a browser sends the request for a page of another origin.

    `Sec-Fetch-Site` is set by the browser and holds behind any proxy, but browsers send it only over TLS or to this
    machine. Otherwise the host of `Origin` has to be that of `Host`; the scheme may differ, because a proxy may terminate
    TLS. Programs other than browsers send neither header."""
    site, origin = headers.get(b"sec-fetch-site", b"none"), headers.get(b"origin")
    if site != b"none":
        return site != b"same-origin"
    if origin is None:
        return False
    scheme, _, origin_host = origin.lower().partition(b"://")
    port = {b"http": b":80", b"https": b":443"}.get(scheme)
    host = headers.get(b"host", b"").lower()
    return port is None or not host or origin_host.removesuffix(port) != host.removesuffix(port)


class _ClientDisconnected(Exception):
    """The client closed the connection before its body was complete."""


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


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
