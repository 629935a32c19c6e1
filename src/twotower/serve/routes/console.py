"""Routes of the console: its page, and its data."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

from twotower.serve import schemas
from twotower.serve.console import Console
from twotower.serve.problems import Problem
from twotower.serve.routes.openapi import (
    BODY_PROBLEMS,
    BundleId,
    GroupColumn,
    PathId,
    PointLimit,
    QueryId,
    QueryText,
    RowLimit,
    client_problems,
    json_response,
)
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
    responses = client_problems("invalid", "no-bundle")
    of_a_bundle = client_problems("invalid", "unknown-bundle", "no-bundle", "index-unavailable")
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

    @app.get("/v1/console/users", responses=responses, tags=["console"])
    async def users(query: QueryText = "", limit: RowLimit = 20) -> Response:
        """Find users by id: those that begin with the text first, then those that contain it."""
        with console.slot():
            return json_response(await console.users(query, limit))

    @app.get(
        "/v1/console/users/{user_id:path}",
        responses=client_problems("unknown-user", "not-found", "no-bundle"),
        tags=["console"],
    )
    async def user(user_id: PathId) -> Response:
        """Return a user's features, history and recent events."""
        with console.slot():
            return json_response(await console.user(user_id))

    @app.get("/v1/console/user", responses=client_problems("unknown-user", "invalid", "no-bundle"), tags=["console"])
    async def user_by_query(user_id: QueryId) -> Response:
        """Return a user, with the id in the query: clients remove `.` and `..` from a path."""
        return await user(user_id)

    @app.get("/v1/console/items", responses=responses, tags=["console"])
    async def items(query: QueryText = "", limit: RowLimit = 20) -> Response:
        """Find items: the one with this id first, then those whose title contains the text."""
        with console.slot():
            return json_response(await console.items(query, limit))

    @app.get("/v1/console/map", responses=of_a_bundle, tags=["console"])
    async def item_map(column: GroupColumn = "", limit: PointLimit = 4_000, bundle: BundleId = "") -> Response:
        """Project item vectors to their first two principal components."""
        with console.slot():
            return json_response(await console.map(column, limit, bundle))

    @app.post(
        "/v1/console/explain",
        responses=client_problems(*BODY_PROBLEMS, "unknown-bundle", "index-unavailable"),
        tags=["console"],
    )
    async def explain(body: schemas.RecommendRequest, bundle: BundleId = "") -> Response:
        """Return an answer with its history, excluded items, gates, and the user's point on the map."""
        with console.slot():
            return json_response(await console.explain(body, bundle))

    @app.get("/v1/console/bundles", responses=client_problems("bundle-store"), tags=["console"])
    async def bundles() -> Response:
        """List the bundles of the store."""
        with console.slot():
            return json_response(await console.bundles())
