"""What every request passes before and after it is answered: a name, a key, a limit, its body, a turn, the log.

Plain ASGI, because a request that is refused must cost nearly nothing. A reply is made in its turn and sent after it:
a client that does not take its reply must not keep the turn.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import unquote_to_bytes

from twotower.serve.admission import BYTES_PER_WEIGHT, overload_problem
from twotower.serve.api_keys import ApiKey, ApiKeys
from twotower.serve.body_memory import UNCOUNTED_BYTES, BodyMemory, BodyReservation
from twotower.serve.problems import Problem
from twotower.serve.rate_limit import RateLimiter
from twotower.serve.service import Service
from twotower.serve.settings import client_address, is_loopback

log = logging.getLogger("twotower.middleware")
access = logging.getLogger("twotower.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
PUBLIC_PATHS = ("/", "/livez", "/readyz", "/problems", "/page", "/openapi.json", "/favicon.ico")
"""Asked without a key: they tell nothing of anybody."""
OVERLOAD_LOG_INTERVAL = 1.0
"""Seconds between two lines that say how many were refused."""
REPLY_CHUNK_BYTES = 64 << 10
"""Bytes of a reply that are handed on at a time: the rest waits here, where it is counted."""
CLIENT_GONE_ROUTE = "gone"
"""The route of requests whose client left before they were read."""


class RequestMiddleware:
    """An ASGI application in front of another."""

    def __init__(self, app: Any, service: Service, keys: ApiKeys | None, admin: bool = False) -> None:
        """`admin`: only keys of that scope are let in."""
        s = service.settings
        self.app, self.service, self.keys, self.admin = app, service, keys, admin
        self.limiter = RateLimiter(s.rate, s.burst) if s.rate else None
        # Without keys, a page of another site that has its name point here could read what the browser may.
        self._local = keys is None and not s.insecure and is_loopback(s.host)
        self._hosts = {b"localhost", b"127.0.0.1", b"[::1]", s.host.encode(), b"[" + s.host.encode() + b"]"}
        self._address = functools.lru_cache(4_096)(client_address)
        self._metrics, self._admission = service.metrics, service.admission
        self._room = BodyMemory(s.body_memory)
        self._shed_count, self._shed_said = 0, 0.0
        self._refused = self._metrics.refused.labels("overload")
        self._refused_replies = self._metrics.requests.labels("refused", "503")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        path: str = scope["path"]
        headers = dict(scope["headers"])
        key = self._key(headers)
        client = key.name if key else self._address((scope.get("client") or ("-",))[0])
        # Only batches and looks go on beside the turns, once their body is read: they give their turn back.
        turn = path.startswith("/v1/") and not self.admin
        if turn and self._admission.overloaded(client, _body_weight(headers)):
            await self._shed(send)
            return
        named = headers.get(b"x-request-id", b"")
        # Anything else could forge a line of a log or a header.
        request_id = named if _REQUEST_ID.fullmatch(named) else secrets.token_hex(8).encode()
        scope["request_id"] = request_id.decode()
        # What is asked with HEAD is made as with GET; the server leaves the body out.
        inner = scope | {"method": "GET"} if scope["method"] == "HEAD" else scope
        reply: list[Any] = []
        share = BodyReservation(self._room)

        async def collect(message: Any) -> None:
            reply.append(message)

        who, route, size = "-", "refused", 0
        self._metrics.in_flight.inc()
        try:
            try:
                who = self._enter(scope, path, headers, key, client)
                if scope["method"] in ("POST", "PUT", "PATCH") or _has_body(headers):
                    receive, size = await self._body(receive, headers, share)
                if turn:
                    arrived = time.perf_counter()
                    weight = _body_weight(headers, size)
                    if size and self._admission.overloaded(client, weight):  # others have come while it was read
                        raise overload_problem()
                    async with self._admission.permit(client, weight):
                        self._metrics.stages["wait"].observe(time.perf_counter() - arrived)
                        await self.app(inner, receive, collect)
                else:
                    await self.app(inner, receive, collect)
                route = getattr(inner.get("route"), "path", route)
                if (made := sum(len(message.get("body", b"")) for message in reply)) > UNCOUNTED_BYTES:
                    share.take(made - UNCOUNTED_BYTES)
            except Problem as problem:
                self._metrics.refused.labels(problem.name).inc()
                reply[:] = _problem_messages(problem, scope)
            except _ClientDisconnected:
                route = CLIENT_GONE_ROUTE
            except Exception:
                log.exception("request failed", extra={"fields": {"id": scope["request_id"]}})
                route = getattr(inner.get("route"), "path", route)
                reply[:] = _problem_messages(Problem("broken"), scope)
            if reply:
                more = [(b"x-request-id", request_id)]
                if self.service.draining or reply[0]["status"] in (408, 413):
                    more.append((b"connection", b"close"))
                reply[0]["headers"] = [*reply[0]["headers"], *more]
            for message in reply:
                await _send_in_chunks(send, message)
        finally:
            share.free()
            self._metrics.in_flight.dec()
            spent = time.perf_counter() - started
            status = reply[0]["status"] if reply else 0
            self._metrics.count_reply(route, status, spent)
            if self.service.settings.access_log:
                told = {"id": scope["request_id"], "method": scope["method"], "route": route, "status": status,
                        "ms": round(spent * 1e3, 3), "client": who}  # fmt: skip
                access.info("request", extra={"fields": told})

    def _key(self, headers: dict[bytes, bytes]) -> ApiKey | None:
        bearer = headers.get(b"authorization", b"")
        if self.keys is None or bearer[:7].lower() != b"bearer ":
            return None
        return self.keys.find(bearer[7:].decode("latin-1").strip())

    def _enter(self, scope: Any, path: str, headers: dict[bytes, bytes], key: ApiKey | None, client: str) -> str:
        """The name of the client's key. Raises Problem."""
        _check_target_encoding(scope)
        is_open = path == "/" or path.startswith(PUBLIC_PATHS[1:])
        if self.keys is not None and not is_open:
            if key is None:
                raise Problem("no-key", headers={"WWW-Authenticate": 'Bearer realm="twotower"'})
            if self.admin and not key.admin:
                raise Problem("scope")
        if self._local and (host := headers.get(b"host")) and re.sub(rb":\d+$", b"", host).lower() not in self._hosts:
            raise Problem("host")
        if self.keys is None and not is_open and _is_cross_origin(headers):
            raise Problem("origin")
        if self.limiter is not None and path.startswith("/v1/"):
            self.limiter.take(client)
        return key.name if key and not is_open else "-"

    async def _body(self, receive: Any, headers: dict[bytes, bytes], share: BodyReservation) -> tuple[Any, int]:
        """Read the body, within its limits: a `receive` that gives it again, and its bytes. Raises Problem."""
        most, length = self.service.settings.max_body, headers.get(b"content-length", b"")
        if length and (not length.isdigit() or len(length) > 20 or int(length) > most):
            raise Problem("too-large", f"{length.decode('latin-1')[:20]} bytes, at most {most:,} are taken")
        kind, coding = headers.get(b"content-type", b""), headers.get(b"content-encoding", b"identity")
        # A missing one too: a page of another site can send that without asking, as it can text/plain and forms.
        if kind.partition(b";")[0].strip().lower() != b"application/json":
            told = f"the body is {kind.decode('latin-1')[:80]!r}" if kind else "the body says no Content-Type"
            raise Problem("media-type", f"{told}; send application/json")
        if coding.lower() != b"identity":
            raise Problem("media-type", f"the body is in {coding.decode('latin-1')[:80]!r}; send it as it is")
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
                    if len(body) > most:
                        raise Problem("too-large", f"more than {most:,} bytes")
                    if len(body) > counted:
                        share.take(len(body) - counted)
                        counted = len(body)
        except TimeoutError:
            raise Problem("slow") from None
        given: Any = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def again() -> Any:
            nonlocal given
            if given is None:
                return await receive()
            message, given = given, None
            return message

        return again, len(body)

    async def _shed(self, send: Any) -> None:
        """Refuse for overload, before anything else is done: what is spent on the refused is taken from the answered."""
        request_id = secrets.token_hex(8).encode()
        self._refused.inc()
        self._refused_replies.inc()
        self._shed_count += 1
        now = time.monotonic()
        if now - self._shed_said >= OVERLOAD_LOG_INTERVAL:  # a log must not be what an overload is made of
            log.warning("requests refused for overload", extra={"fields": {"requests": self._shed_count}})
            self._shed_count, self._shed_said = 0, now
        await send({"type": "http.response.start", "status": 503,
                    "headers": [*_OVERLOAD_HEADERS, (b"x-request-id", request_id)]})  # fmt: skip
        await send({"type": "http.response.body", "body": _OVERLOAD_BODY.replace(_ID_PLACEHOLDER, request_id)})


def _body_weight(headers: dict[bytes, bytes], size: int = 0) -> float:
    """The weight of a request in the queue, by the bytes of its body, read or announced."""
    length = headers.get(b"content-length", b"")
    return 1.0 + (size or (int(length) if length.isdigit() and len(length) < 16 else 0)) / BYTES_PER_WEIGHT


def _check_target_encoding(scope: Any) -> None:
    """Raises Problem for bytes that are no text: decoded all the same, they would be the id of somebody else."""
    for name, part in (("path", scope.get("raw_path") or b""), ("query", scope["query_string"])):
        if b"%" in part or not part.isascii():
            try:
                unquote_to_bytes(part).decode()
            except UnicodeDecodeError:
                raise Problem(
                    "invalid", f"the {name} is not UTF-8; percent-encode the bytes of an id in UTF-8"
                ) from None


def _is_cross_origin(headers: dict[bytes, bytes]) -> bool:
    """Tell a request that a browser sends for a page of another origin.

    `Sec-Fetch-Site` is the browser's own word, which holds behind any proxy, but over plain HTTP only this machine is
    told it. Elsewhere a page's origin has to be the host that is asked; the scheme may differ, for a proxy may have taken
    TLS off. What is no browser sends neither header."""
    site, origin = headers.get(b"sec-fetch-site", b"none"), headers.get(b"origin")
    if site != b"none":
        return site != b"same-origin"
    if origin is None:
        return False
    scheme, _, where = origin.lower().partition(b"://")
    port = {b"http": b":80", b"https": b":443"}.get(scheme)
    host = headers.get(b"host", b"").lower()
    return port is None or not host or where.removesuffix(port) != host.removesuffix(port)


class _ClientDisconnected(Exception):
    pass


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


async def _send_in_chunks(send: Any, message: Any) -> None:
    """Hand a message of a reply on as fast as the client takes it."""
    body = message.get("body", b"")
    for end in range(REPLY_CHUNK_BYTES, len(body), REPLY_CHUNK_BYTES):
        await send({"type": "http.response.body", "body": body[end - REPLY_CHUNK_BYTES : end], "more_body": True})
    if len(body) > REPLY_CHUNK_BYTES:
        message = message | {"body": body[(len(body) - 1) // REPLY_CHUNK_BYTES * REPLY_CHUNK_BYTES :]}
    await send(message)


_ID_PLACEHOLDER = b"0" * 16
_OVERLOAD_BODY = overload_problem().body(_ID_PLACEHOLDER.decode())
_OVERLOAD_HEADERS = overload_problem().raw_headers(len(_OVERLOAD_BODY))


def _problem_messages(problem: Problem, scope: Any) -> list[Any]:
    body = problem.body(scope["request_id"])
    headers = problem.raw_headers(len(body))
    return [
        {"type": "http.response.start", "status": problem.status, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]
