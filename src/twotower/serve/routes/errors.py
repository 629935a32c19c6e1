"""Replies to exceptions: every error is a problem (RFC 9457)."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from twotower.errors import BundleError, DataError, Unavailable
from twotower.retrieval.request_body import message_of, place_of
from twotower.serve.problems import Problem, problem_of
from twotower.serve.service import Service

STATUSES = {400: "malformed", 404: "not-found", 405: "method-not-allowed"}
"""Statuses of the router's own errors, and their problems."""


def add_error_replies(app: FastAPI, service: Service) -> None:
    """Answer the exceptions of routes with problems."""

    def problem(error: Exception) -> Problem:
        match error:
            case Problem():
                return error
            case DataError():
                return problem_of(error)
            case Unavailable():
                return Problem("index-unavailable")
            case BundleError():
                return Problem("bundle-store", service.bundles.public_message(error))
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
    errors = [{"at": place_of(e), "detail": message_of(e)} for e in found[:20]]
    return Problem("invalid", "; ".join(f"{e['at']}: {e['detail']}" for e in errors[:3]), errors=errors)
