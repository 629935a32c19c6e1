"""Replies to exceptions: every error is a problem (RFC 9457)."""

from __future__ import annotations

import json

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from twotower.errors import BundleError, DataError, Unavailable
from twotower.serve import schemas
from twotower.serve.problems import Problem, index_problem, problem_of
from twotower.serve.service import Service

MAX_SHOWN = 40
"""Characters of a wrong value that a message shows."""


def add_error_replies(app: FastAPI, service: Service) -> None:
    """Answer the exceptions of routes with problems."""

    def answer(problem: Problem, request: Request) -> Response:
        body = problem.body(request.scope.get("request_id", ""))
        return Response(body, problem.status, problem.headers, "application/problem+json")

    @app.exception_handler(Problem)
    async def answer_problem(request: Request, error: Problem) -> Response:
        return answer(error, request)

    @app.exception_handler(DataError)
    async def data_error(request: Request, error: DataError) -> Response:
        return answer(problem_of(error), request)

    @app.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> Response:
        return answer(index_problem(), request)

    @app.exception_handler(BundleError)
    async def store_error(request: Request, error: BundleError) -> Response:
        return answer(
            Problem("bundle-store", service.bundles.public_message(error), headers={"Retry-After": "5"}), request
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        if any(e["type"] == "json_invalid" for e in found):
            cause = found[0].get("ctx", {}).get("error", "")
            return answer(Problem("malformed", f"the body is not JSON in UTF-8: {cause}" if cause else ""), request)
        errors = [{"at": _place(e), "detail": _error_text(e)} for e in found[:20]]
        detail = "; ".join(f"{e['at']}: {e['detail']}" for e in errors[:3])
        return answer(Problem("invalid", detail, errors=errors), request)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        name = {400: "malformed", 404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "internal-error")
        return answer(Problem(name, headers=error.headers), request)


def _place(error: ErrorDetails) -> str:
    """Return the place of a validation error in the body, such as body.events.0.id."""
    return ".".join(str(step) for step in error["loc"] if step not in schemas.EVENT_BRANCHES)


def _error_text(error: ErrorDetails) -> str:
    """Return the message of a validation error."""
    if error["type"] == schemas.NO_EVENT:
        given = json.dumps(error["input"], ensure_ascii=False)
        return f"found {given[:MAX_SHOWN]}{'…' if len(given) > MAX_SHOWN else ''}, {error['msg']}"
    return str(error["msg"])
