"""Requests and replies whose JSON orjson reads and writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import JsonValue


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
