"""What every request passes before and after it is answered: a name, a key, a limit, its body, a turn, the log.

Plain ASGI, because a request that is refused must cost nearly nothing.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import Any

from twotower.serve.gate import overload
from twotower.serve.keys import Keys
from twotower.serve.limiter import Limiter
from twotower.serve.problem import Problem
from twotower.serve.service import Service

log = logging.getLogger("twotower.door")
access = logging.getLogger("twotower.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
OPEN = ("/", "/livez", "/readyz", "/problems", "/page", "/openapi.json", "/favicon.ico")
"""Asked without a key: they tell nothing of anybody."""
WITHOUT_TURN = ("/v1/recommend:batch", "/v1/console/")
"""Work that takes turns of its own, or is done elsewhere."""
SHED_EVERY = 1.0
"""Seconds between two lines that say how many were refused."""


class Door:
    """An ASGI application in front of another."""

    def __init__(self, app: Any, service: Service, keys: Keys | None, admin: bool = False) -> None:
        """`admin`: only keys of that scope are let in."""
        s = service.settings
        self.app, self.service, self.keys, self.admin = app, service, keys, admin
        self.limiter = Limiter(s.rate, s.burst) if s.rate else None
        self._metrics, self._gate = service.metrics, service.gate
        self._shed_count, self._shed_said = 0, 0.0
        self._refused = self._metrics.refused.labels("overload")
        self._refused_replies = self._metrics.requests.labels("refused", "503")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        path: str = scope["path"]
        turn = path.startswith("/v1/") and not path.startswith(WITHOUT_TURN) and not self.admin
        if turn and self._gate.full:
            await self._shed(send)
            return
        named, length, bearer, kind = b"", b"", b"", b""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                named = value
            elif name == b"content-length":
                length = value
            elif name == b"authorization":
                bearer = value
            elif name == b"content-type":
                kind = value
        # Anything else could forge a line of a log or a header.
        request_id = named if _REQUEST_ID.fullmatch(named) else secrets.token_hex(8).encode()
        scope["request_id"] = request_id.decode()
        status, who = 0, "-"
        finish = [(b"x-request-id", request_id)]
        if self.service.draining:
            finish.append((b"connection", b"close"))

        async def reply(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *finish]
            await send(message)

        self._metrics.in_flight.inc()
        try:
            who = self._enter(scope, path, bearer)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = await self._body(receive, length, kind)
            if turn:
                arrived = time.perf_counter()
                async with self._gate:
                    self._metrics.stages["wait"].observe(time.perf_counter() - arrived)
                    await self.app(scope, receive, reply)
            else:
                await self.app(scope, receive, reply)
        except Problem as problem:
            self._metrics.refused.labels(problem.name).inc()
            if problem.name in ("slow", "too-large"):
                finish.append((b"connection", b"close"))
            await _send(problem, scope, reply)
        except Exception:
            log.exception("request failed", extra={"told": {"id": scope["request_id"]}})
            if status:  # the reply has begun: all that can be done is to break it off
                raise
            await _send(Problem("broken"), scope, reply)
        finally:
            self._metrics.in_flight.dec()
            spent = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "") or ("refused" if status else "gone")
            self._metrics.replied(route, status, spent)
            if self.service.settings.access_log and status != 503:
                told = {"id": scope["request_id"], "method": scope["method"], "route": route, "status": status,
                        "ms": round(spent * 1e3, 3), "client": who}  # fmt: skip
                access.info("request", extra={"told": told})

    def _enter(self, scope: Any, path: str, bearer: bytes) -> str:
        """The name of the client's key. Raises Problem."""
        client = "-"
        if self.keys is not None and not (path == "/" or path.startswith(OPEN[1:])):
            token = bearer[7:].decode("latin-1").strip() if bearer[:7].lower() == b"bearer " else ""
            key = self.keys.find(token) if token else None
            if key is None:
                raise Problem("no-key", headers={"WWW-Authenticate": 'Bearer realm="twotower"'})
            if self.admin and not key.admin:
                raise Problem("scope")
            client = key.name
        if self.limiter is not None and path.startswith("/v1/"):
            self.limiter.take(client if client != "-" else (scope.get("client") or ("-",))[0])
        return client

    async def _body(self, receive: Any, length: bytes, kind: bytes) -> Any:
        """Read the body, within its limits, and a `receive` that gives it again. Raises Problem."""
        most = self.service.settings.max_body
        if length and (not length.isdigit() or int(length) > most):
            raise Problem("too-large", f"{length.decode('latin-1')[:20]} bytes, at most {most:,} are taken")
        message = await self._next(receive)
        if message.get("more_body"):
            parts, size = [message.get("body", b"")], len(message.get("body", b""))
            while message.get("more_body") and message["type"] == "http.request":
                message = await self._next(receive)
                parts.append(message.get("body", b""))
                if (size := size + len(parts[-1])) > most:
                    raise Problem("too-large", f"more than {most:,} bytes")
            message = {"type": message["type"], "body": b"".join(parts), "more_body": False}
        if len(message.get("body", b"")) > most:
            raise Problem("too-large", f"more than {most:,} bytes")
        if kind and not kind.lower().startswith(b"application/json"):
            raise Problem("media-type", f"the body is {kind.decode('latin-1')[:80]!r}; send application/json")
        given: Any = message

        async def again() -> Any:
            nonlocal given
            if given is None:
                return await receive()
            message, given = given, None
            return message

        return again

    async def _next(self, receive: Any) -> Any:
        try:
            async with asyncio.timeout(self.service.settings.body_timeout):
                return await receive()
        except TimeoutError:
            raise Problem("slow") from None

    async def _shed(self, send: Any) -> None:
        """Refuse for overload, before anything else is done: what is spent on the refused is taken from the answered."""
        request_id = secrets.token_hex(8).encode()
        self._refused.inc()
        self._refused_replies.inc()
        self._shed_count += 1
        now = time.monotonic()
        if now - self._shed_said >= SHED_EVERY:  # a log must not be what an overload is made of
            log.warning("requests refused for overload", extra={"told": {"requests": self._shed_count}})
            self._shed_count, self._shed_said = 0, now
        await send({"type": "http.response.start", "status": 503,
                    "headers": [*_OVERLOAD_HEADERS, (b"x-request-id", request_id)]})  # fmt: skip
        await send({"type": "http.response.body", "body": _OVERLOAD.replace(_ID, request_id)})


_ID = b"0" * 16
_OVERLOAD = overload().body(_ID.decode())
_OVERLOAD_HEADERS = overload().raw_headers(len(_OVERLOAD))


async def _send(problem: Problem, scope: Any, send: Any) -> None:
    body = problem.body(scope["request_id"])
    await send({"type": "http.response.start", "status": problem.status, "headers": problem.raw_headers(len(body))})
    await send({"type": "http.response.body", "body": body})
