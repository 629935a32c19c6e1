"""Problem details of every error reply (RFC 9457, "Problem Details for HTTP APIs"), and the table of all problems."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

import orjson

from twotower.errors import DataError
from twotower.retrieval.request import UnknownId

RawHeaders = list[tuple[bytes, bytes]]
ProblemObject = dict[str, str | int | list[dict[str, str]]]

PROBLEMS: dict[str, tuple[int, str, str]] = {
    "malformed": (400, "The body is not JSON", "Send a JSON object in UTF-8, with Content-Type: application/json."),
    "bad-request": (
        400,
        "The HTTP request is malformed",
        "Send HTTP/1.1 with one Host header and a head of at most 32 KiB; the connection is closed.",
    ),
    "unauthorized": (
        401,
        "An API key is required",
        "Send the header Authorization: Bearer KEY, with a key of the file that the service reads (setting keys).",
    ),
    "key-scope": (403, "The API key does not have the scope", "Use a key of scope admin."),
    "foreign-origin": (
        403,
        "The request is from a page of another site",
        "Use the console of this service, send the request from a program, or give the service a file of keys "
        "(setting keys).",
    ),
    "not-found": (404, "The path does not exist", "GET /openapi.json lists the paths."),
    "unknown-item": (404, "The item is not in the bundle", "Send the id of an item of the current bundle."),
    "unknown-user": (
        404,
        "The user is not in the bundle",
        "Send features or a history, or set unknown_user = popular for the service.",
    ),
    "unknown-bundle": (
        404,
        "The bundle is not in the store, or cannot be loaded",
        "List the bundles of the store, and name one that is not damaged.",
    ),
    "no-text-feature": (
        404,
        "The model has no text feature to search by",
        "Train one with a feature of kind = 'text' on the user side.",
    ),
    "method-not-allowed": (
        405,
        "The path does not support this method",
        "GET /openapi.json lists the methods of each path.",
    ),
    "body-timeout": (408, "The body did not arrive in time", "Send the body without pauses; the connection is closed."),
    "conflict": (409, "The state of the service does not allow the request", "The detail says what is needed."),
    "too-large": (413, "The body is too large", "Send a smaller body; GET /v1/bundle names the limit."),
    "unsupported-media-type": (415, "The body has another media type", "Send Content-Type: application/json."),
    "invalid": (422, "The request is invalid", "The detail says what was given and what is allowed."),
    "foreign-host": (
        421,
        "The request names another host",
        "Use the address that the service listens on, or give the service a file of keys (setting keys).",
    ),
    "rate-limit": (429, "The client sends too many requests", "Wait for the seconds in Retry-After."),
    "internal-error": (500, "The service failed", "The log has the traceback under the id of the request."),
    "no-bundle": (503, "No bundle is loaded", "Publish a bundle, or roll back to an undamaged one."),
    "index-unavailable": (503, "The index does not answer", "Wait for the seconds in Retry-After."),
    "event-store": (
        503,
        "The event store does not answer",
        "Try again later; the history may or may not have been deleted.",
    ),
    "bundle-store": (
        503,
        "The store of bundles does not answer",
        "Try again later; a rollback may or may not have taken effect.",
    ),
    "overload": (503, "The service is overloaded", "Wait for the seconds in Retry-After, or add workers."),
    "too-many-connections": (
        503,
        "Too many connections",
        "Wait for the seconds in Retry-After, reuse connections, and name proxies in the setting trusted_proxies.",
    ),
    "draining": (503, "The service is shutting down", "Send the request to another instance."),
}
"""Problem name to status, title and remedy. The type of a problem is /problems/NAME, a page with the same text."""
RETRY_AFTER = {
    "overload": 1, "too-many-connections": 1, "index-unavailable": 2, "no-bundle": 5, "event-store": 5,
    "bundle-store": 5,
}  # fmt: skip
"""Problem name to seconds in the header Retry-After."""


class Problem(Exception):
    """Error reply, raised as an exception. `name` is a key of PROBLEMS; `detail` defaults to its remedy."""

    def __init__(
        self,
        name: str,
        detail: str = "",
        *,
        errors: list[dict[str, str]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.status, self.title, remedy = PROBLEMS[name]
        self.detail = detail or remedy
        self.errors = errors
        retry = {"Retry-After": str(RETRY_AFTER[name])} if name in RETRY_AFTER else {}
        self.headers = retry | dict(headers or {})
        super().__init__(self.detail)

    def as_dict(self, instance: str = "") -> ProblemObject:
        """Return the JSON object of the reply; `instance` is the request id."""
        content: ProblemObject = {
            "type": f"/problems/{self.name}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": instance,
        }
        if self.errors:
            content["errors"] = self.errors
        return content

    def body(self, instance: str = "") -> bytes:
        """Return `as_dict` as JSON in UTF-8."""
        content = self.as_dict(instance)
        # The detail may quote a lone surrogate, which UTF-8 does not have.
        content["detail"] = self.detail.encode(errors="backslashreplace").decode()
        return orjson.dumps(content)

    def raw_headers(self, length: int) -> RawHeaders:
        """Return the headers of the reply for ASGI; `length` of the body in bytes."""
        headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % length)]
        return headers + [(k.lower().encode(), v.encode()) for k, v in self.headers.items()]

    def last_reply(self) -> bytes:
        """Return the reply in HTTP/1.1, after which the connection is closed."""
        body = self.body()
        head = [b"HTTP/1.1 %d %s" % (self.status, HTTPStatus(self.status).phrase.encode())]
        head += [b"%s: %s" % header for header in self.raw_headers(len(body))]
        return b"\r\n".join((*head, b"connection: close", b"", body))


def problem_of(error: DataError) -> Problem:
    """Return the problem for an invalid request."""
    return Problem("unknown-item" if isinstance(error, UnknownId) else "invalid", str(error))
