"""Routes of the console: its page, and its data."""

from __future__ import annotations

from functools import partial
from importlib import resources
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

from twotower.serve.console import Console
from twotower.serve.problems import Problem
from twotower.serve.routes.openapi import BODY_PROBLEMS, BY_QUERY, add_route
from twotower.serve.service import Service

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_SECURITY_POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_console_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of the console."""
    console = Console(service)
    of_a_bundle = ("invalid", "unknown-bundle", "no-bundle", "index-unavailable")
    folder = resources.files("twotower.serve") / "page"
    files = {
        f.name: (f.read_bytes(), CONTENT_TYPES[suffix])
        for f in folder.iterdir()
        if (suffix := Path(f.name).suffix) in CONTENT_TYPES
    }

    def page(name: str) -> Response:
        content, kind = files[name]
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in files:
            raise Problem("not-found")
        return page(name)

    add = partial(add_route, app, "console", within=console.slot)
    add("GET", "/v1/console/users", console.users, None, "invalid", "no-bundle")
    add("GET", "/v1/console/users/{user_id:path}", console.user, None, "unknown-user", "not-found", "no-bundle")
    add("GET", "/v1/console/user", console.user, None, "unknown-user", "invalid", "no-bundle",
        name="user_by_query", description=f"Return a user{BY_QUERY}")  # fmt: skip
    add("GET", "/v1/console/items", console.items, None, "invalid", "no-bundle")
    add("GET", "/v1/console/map", console.item_map, None, *of_a_bundle)
    add("POST", "/v1/console/explain", console.explain, None, *BODY_PROBLEMS, "unknown-bundle", "index-unavailable")
    add("GET", "/v1/console/bundles", console.bundles, None, "bundle-store")
