"""The OpenAPI document: the problems of every route in place of FastAPI's own errors."""

from __future__ import annotations

import functools
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.responses import Response

from twotower.serve import replies
from twotower.serve.problems import PROBLEMS

Replies = dict[int | str, dict[str, Any]]
"""Replies of a route by status, as FastAPI takes them in `responses`."""
BODY_PROBLEMS = ("malformed", "too-large", "unsupported-media-type", "body-timeout", "invalid", "no-bundle")


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
