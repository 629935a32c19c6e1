"""Parts that routes share: JSON by orjson, and the problems that the OpenAPI document names."""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from inspect import cleandoc
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import JsonValue
from starlette.types import Receive, Scope, Send

from twotower.retrieval.request_body import RequestModel
from twotower.serve import replies
from twotower.serve.problems import PROBLEMS

Replies = dict[int | str, dict[str, Any]]
"""Replies of a route by status, as FastAPI takes them in `responses`."""
BODY_PROBLEMS = ("malformed", "too-large", "unsupported-media-type", "body-timeout", "invalid", "no-bundle")
BY_QUERY = ", with the id in the query: clients remove `.` and `..` from a path."
"""End of the description of a route whose id may be any text."""
Endpoint = Callable[..., Awaitable[object]]


class JsonRequest(Request):
    """A request whose body orjson parses: it refuses NaN, lone surrogates and deep nesting."""

    async def json(self) -> JsonValue:
        parsed: JsonValue = orjson.loads(await self.body())
        return parsed


class JsonRoute(APIRoute):
    """A route that reads its body as a JsonRequest.

    If the body is its only parameter, the endpoint is called at once: FastAPI's way to it takes as long as a search."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        takes = self.dependant
        if len(takes.body_params) != 1 or takes.query_params or takes.path_params or scope["method"] != "POST":
            await super().handle(scope, receive, send)
            return
        request = JsonRequest(scope, receive)
        given: dict[str, RequestModel | Request] = {takes.body_params[0].name: self._parsed(await request.body())}
        if takes.request_param_name:
            given[takes.request_param_name] = request
        response: Response = await self.endpoint(**given)
        await response(scope, receive, send)

    def _parsed(self, data: bytes) -> RequestModel:
        """Return the body of a request. Raises RequestValidationError as FastAPI does."""
        if not data:
            raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required"}])
        try:
            body, errors = self.dependant.body_params[0].validate(orjson.loads(data), loc=("body",))
        except orjson.JSONDecodeError as e:
            cause = {"type": "json_invalid", "loc": ("body", e.pos), "ctx": {"error": e.msg}}
            raise RequestValidationError([cause]) from e
        if errors:
            raise RequestValidationError(errors)
        parsed: RequestModel = body
        return parsed

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


def add_route(
    app: FastAPI,
    tag: str,
    method: str,
    path: str,
    endpoint: Endpoint,
    reply: type | None,
    *names: str,
    status: int = 200,
    name: str = "",
    description: str = "",
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Add a route that replies the JSON of the endpoint's result, and the problems `names`.

    `name` and `description` default to those of the endpoint: its docstring, without the paragraph of what it raises.
    The endpoint runs within the block of `within`."""

    @functools.wraps(endpoint)
    async def answer(**given: RequestModel | Request | str | int) -> Response:
        with within():
            found = await endpoint(**given)
        return Response(status_code=status) if found is None else json_response(found, status)

    app.add_api_route(
        path,
        answer,
        methods=[method],
        tags=[tag],
        response_model=reply,
        status_code=status,
        responses=client_problems(*names),
        name=name or endpoint.__name__,
        description=description or cleandoc(endpoint.__doc__ or "").partition("\n\nRaises ")[0],
    )


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
