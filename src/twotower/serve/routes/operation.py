"""Routes for operators: health, metrics, and the pages of problems."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Path
from fastapi.responses import PlainTextResponse, Response

from twotower.serve import replies
from twotower.serve.metrics import CONTENT_TYPE
from twotower.serve.problems import PROBLEMS, Problem
from twotower.serve.routes.openapi import json_response, problems
from twotower.serve.service import Service

ProblemName = Annotated[str, Path(max_length=64, description="Name of the problem.")]


def add_operation_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of operators."""

    @app.get("/livez", response_model=replies.HealthReply, tags=["operation"])
    async def livez() -> Response:
        """Answer 200 while the process runs."""
        return json_response(replies.HealthReply("ok", service.bundles.current_id, service.bundles.store_state))

    @app.get(
        "/readyz", response_model=replies.HealthReply, responses=problems("draining", "no-bundle"), tags=["operation"]
    )
    async def readyz() -> Response:
        """Answer 200 while the process should get requests."""
        if service.draining:
            raise Problem("draining")
        return json_response(replies.HealthReply("ok", service.bundles.current.bundle.id, service.bundles.store_state))

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses=problems("unauthorized", "foreign-origin"),
        tags=["operation"],
    )
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/problems/{name}", response_class=PlainTextResponse, responses=problems("not-found"), tags=["operation"])
    async def problem(name: ProblemName) -> Response:
        """Explain a problem and what to do about it."""
        if name not in PROBLEMS:
            raise Problem("not-found")
        status, title, what_to_do = PROBLEMS[name]
        return Response(f"{status} {title}\n\n{what_to_do}\n", media_type="text/plain")
