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

STATUSES = {400: "malformed", 404: "not-found", 405: "method-not-allowed"}
"""Statuses of the router's own errors, and their problems."""
MAX_SHOWN = 40
"""Characters of a wrong value that a message shows."""


def add_error_replies(app: FastAPI, service: Service) -> None:
    """Answer the exceptions of routes with problems."""

    def problem(error: Exception) -> Problem:
        match error:
            case Problem():
                return error
            case DataError():
                return problem_of(error)
            case Unavailable():
                return index_problem()
            case BundleError():
                return Problem("bundle-store", service.bundles.public_message(error), headers={"Retry-After": "5"})
            case RequestValidationError():
                return _invalid(error)
            case HTTPException():
                return Problem(STATUSES.get(error.status_code, "internal-error"), headers=error.headers)
        raise error

    async def answer(request: Request, error: Exception) -> Response:
        found = problem(error)
        body = found.body(request.scope.get("request_id", ""))
        return Response(body, found.status, found.headers, "application/problem+json")

    for kind in (Problem, DataError, Unavailable, BundleError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def _invalid(error: RequestValidationError) -> Problem:
    """Return the problem of a body or of parameters of the wrong form."""
    found = error.errors()
    if any(e["type"] == "json_invalid" for e in found):
        cause = found[0].get("ctx", {}).get("error", "")
        return Problem("malformed", f"the body is not JSON in UTF-8: {cause}" if cause else "")
    errors = [{"at": _place(e), "detail": _error_text(e)} for e in found[:20]]
    return Problem("invalid", "; ".join(f"{e['at']}: {e['detail']}" for e in errors[:3]), errors=errors)


def _place(error: ErrorDetails) -> str:
    """Return the place of a validation error in the body, such as body.events.0.id."""
    return ".".join(str(step) for step in error["loc"] if step not in schemas.EVENT_BRANCHES)


def _error_text(error: ErrorDetails) -> str:
    """Return the message of a validation error."""
    if error["type"] == schemas.NO_EVENT:
        given = json.dumps(error["input"], ensure_ascii=False)
        return f"found {given[:MAX_SHOWN]}{'…' if len(given) > MAX_SHOWN else ''}, {error['msg']}"
    return str(error["msg"])
