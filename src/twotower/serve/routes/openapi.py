"""Parts that routes share: JSON by orjson, and the parameters and problems that the OpenAPI document names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Path, Query, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import JsonValue

from twotower.serve import replies
from twotower.serve.problems import PROBLEMS
from twotower.serve.schemas import MAX_ID_LENGTH

Replies = dict[int | str, dict[str, Any]]
"""Replies of a route by status, as FastAPI takes them in `responses`."""
BODY_PROBLEMS = ("malformed", "too-large", "unsupported-media-type", "body-timeout", "invalid", "no-bundle")
PathId = Annotated[str, Path(min_length=1, max_length=MAX_ID_LENGTH, description="Any id, percent-encoded.")]
QueryId = Annotated[str, Query(min_length=1, max_length=MAX_ID_LENGTH, description="Any id, percent-encoded.")]
ItemCount = Annotated[int, Query(description="Number of items. At most limits.k of GET /v1/bundle.")]
QueryText = Annotated[str, Query(max_length=MAX_ID_LENGTH, description="Text to find. Empty: all.")]
GroupColumn = Annotated[
    str, Query(max_length=MAX_ID_LENGTH, description="Item column that groups the points. Empty: the first.")
]
RowLimit = Annotated[int, Query(ge=1, le=200, description="Greatest number of results.")]
PointLimit = Annotated[int, Query(ge=1, le=20_000, description="Greatest number of points.")]
BundleId = Annotated[str, Query(max_length=64, description="Bundle id. Empty: the current bundle.")]
ProblemName = Annotated[str, Path(max_length=64, description="Name of the problem.")]


class JsonRequest(Request):
    """A request whose body orjson parses: it refuses NaN, lone surrogates and deep nesting."""

    async def json(self) -> JsonValue:
        parsed: JsonValue = orjson.loads(await self.body())
        return parsed


class JsonRoute(APIRoute):
    """A route that reads its body as a JsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[None, None, Response]]:
        handle = super().get_route_handler()

        async def with_orjson(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return with_orjson


def accept_any_id(app: FastAPI) -> None:
    """Let the parameters of paths contain any character: FastAPI's `.` matches no line feed, and its `$` also matches
    before a final one."""
    for route in app.routes:
        if isinstance(route, JsonRoute):
            route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z", re.DOTALL)


def json_response(value: object, status: int = 200) -> Response:
    """Return a reply whose body is the JSON of a value."""
    return Response(orjson.dumps(value), status, media_type="application/json")


def client_problems(*names: str) -> Replies:
    """Return the replies of a route for clients, with the problems of every such route."""
    return problems(*names, "unauthorized", "foreign-origin", "rate-limit", "overload")


def problems(*names: str) -> Replies:
    """Return the replies of a route for problems by their names."""
    found: Replies = {}
    for name in names:
        status, title, _ = PROBLEMS[name]
        before = found.get(status, {}).get("description")
        found[status] = {
            "description": f"{before}; {title}" if before else title,
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemReply"}}},
        }
    return found


def add_openapi(app: FastAPI) -> None:
    """Add the route of the OpenAPI document, with the error schema of a problem in place of FastAPI's own."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = generate()
            components = schema["components"]["schemas"]
            components.setdefault("ProblemReply", replies.ProblemReply.model_json_schema())
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    described = operation["responses"]
                    if "application/json" in described.get("422", {}).get("content", {}):
                        described["422"] = problems("invalid")[422]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
    document = functools.cache(lambda: orjson.dumps(app.openapi()))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_document() -> Response:
        """Return the OpenAPI document, which is made once."""
        return Response(document(), media_type="application/json")
