"""A client of a service in this process, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx

from twotower.serve.api_keys import ApiKeys
from twotower.serve.bundles import BundleLimits
from twotower.serve.middleware import RequestMiddleware
from twotower.serve.problems import PROBLEMS
from twotower.serve.routes import create_admin_app, create_app
from twotower.serve.service import Service
from twotower.serve.settings import ServeSettings

AS_JSON = {"content-type": "application/json"}


class Client:
    """Sends requests to an application in this process."""

    def __init__(self, service: Service, app: RequestMiddleware, loop: asyncio.AbstractEventLoop) -> None:
        self.service, self.app, self.loop = service, app, loop

    def ask(self, method: str, path: str, body: Any = None, **more: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with self.http(raise_app_exceptions=False) as client:
                return await client.request(method, path, **({"json": body} if body is not None else {}), **more)

        reply: httpx.Response = self.run(go())
        return reply

    def http(self, **more: Any) -> httpx.AsyncClient:
        """A client for requests at the same time."""
        transport = httpx.ASGITransport(self.app, **more)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.ask("POST", path, body, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.ask("GET", path, **more)


Make = Callable[..., Client]


@contextlib.contextmanager
def clients(store: Path) -> Iterator[Make]:
    """Make services with settings of their own, and stop them at the end."""
    loop = asyncio.new_event_loop()
    made: list[Service] = []

    def make(
        keys: Path | None = None,
        admin: bool = False,
        at: Path = store,
        load: bool = True,
        limits: BundleLimits = BundleLimits(),
        **more: Any,
    ) -> Client:
        service = Service(ServeSettings(store=at, keys=keys, **more), bundle_limits=limits)
        made.append(service)
        app = create_admin_app(service) if admin else create_app(service)
        client = Client(service, RequestMiddleware(app, service, ApiKeys(keys) if keys else None, admin), loop)
        if load:
            loop.run_until_complete(service.bundles.refresh())
        return client

    yield make
    for service in made:
        loop.run_until_complete(service.stop())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def ids(reply: httpx.Response) -> list[str]:
    assert reply.status_code == 200, reply.text
    return [item["id"] for item in reply.json()["items"]]


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a line of the log."""
    found: dict[str, Any] = record.__dict__["fields"]
    return found


def problem(reply: httpx.Response, name: str) -> dict[str, Any]:
    """The problem, which has its one shape."""
    told: dict[str, Any] = reply.json()
    assert told["type"] == f"/problems/{name}", told
    status, title, _ = PROBLEMS[name]
    assert (reply.status_code, told["status"], told["title"]) == (status, status, title)
    assert reply.headers["content-type"] == "application/problem+json"
    assert told["instance"] == reply.headers["x-request-id"]
    assert told["detail"]
    return told


def by_path(client: Client, method: str, path: str, query: bytes = b"") -> tuple[int, Any]:
    """What a request for a percent-encoded path gets, which no client library has changed before."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": unquote(path), "raw_path": path.encode(), "query_string": query,
             "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http", "root_path": "",
             "http_version": "1.1"}  # fmt: skip
    client.run(client.app(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"] or b"null")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
