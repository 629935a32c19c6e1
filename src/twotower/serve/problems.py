"""The one shape of every error (RFC 9457, "Problem Details for HTTP APIs"), and the list of those there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

RawHeaders = list[tuple[bytes, bytes]]

PROBLEMS: dict[str, tuple[int, str, str]] = {
    "malformed": (400, "The body is not JSON", "Send a JSON object in UTF-8, with Content-Type: application/json."),
    "http": (
        400,
        "This is no HTTP request that can be used",
        "Send HTTP/1.1 with one Host and a head of at most 32 KiB; the connection is closed.",
    ),
    "no-key": (
        401,
        "An API key is needed",
        "Send the header Authorization: Bearer KEY; `twotower key NAME` makes one.",
    ),
    "scope": (403, "The API key may not do this", "Use a key of scope admin: `twotower key NAME --admin`."),
    "origin": (
        403,
        "The request is from a page of another site",
        "Use the console of this service, ask from a program, or serve with --keys.",
    ),
    "not-found": (404, "There is no such page", "GET /openapi.json lists what there is."),
    "unknown-item": (404, "The bundle has no such item", "Ask with an item id of the present bundle."),
    "unknown-user": (
        404,
        "The bundle has no such user",
        "Tell features or a history, or serve with --unknown-user popular.",
    ),
    "unknown-bundle": (
        404,
        "The store has no such bundle that can be loaded",
        "`twotower bundles` lists what there is.",
    ),
    "no-text": (404, "The bundle has no text feature to search by", "Train one with kind = 'text' on the user side."),
    "method": (405, "The page does not take this method", "GET /openapi.json lists what there is."),
    "slow": (408, "The body took too long", "Send it at once; the connection is closed."),
    "conflict": (409, "The service cannot do that as it runs", "What is needed is in the detail."),
    "too-large": (413, "The body is too large", "Send less at a time; GET /v1/bundle names the limit."),
    "media-type": (415, "The body is of another kind", "Send Content-Type: application/json."),
    "invalid": (422, "The request cannot be used", "What was given and what is allowed is in the detail."),
    "host": (421, "The request is for another host", "Ask by the address it listens on, or serve with --keys."),
    "rate": (429, "Too many requests of this client", "Wait as long as Retry-After says, in seconds."),
    "broken": (500, "The service failed", "The log has the reason under the id of the request."),
    "no-bundle": (503, "No bundle can be served yet", "Publish one, or roll back to one that is whole."),
    "index": (503, "The index does not answer", "Wait as long as Retry-After says, in seconds."),
    "event-store": (
        503,
        "The store of live histories does not answer",
        "Try again later; it may or may not have been done.",
    ),
    "store": (
        503,
        "The store of bundles does not answer",
        "Try again later; a rollback may or may not have been done.",
    ),
    "overload": (
        503,
        "More requests than can be answered in time",
        "Wait as long as Retry-After says, or add workers.",
    ),
    "connections": (
        503,
        "Too many connections",
        "Wait as long as Retry-After says, use connections again, and name proxies in --trusted-proxies.",
    ),
    "draining": (503, "The service is about to stop", "Ask another one."),
}
"""Name -> status, title, what to do. A problem's type is /problems/NAME, which is a page that says so."""


class Problem(Exception):
    """An answer that is an error. `headers` are sent with it."""

    def __init__(
        self,
        name: str,
        detail: str = "",
        *,
        errors: list[dict[str, str]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.status, self.title, what_to_do = PROBLEMS[name]
        self.detail = detail or what_to_do
        self.errors = errors
        self.headers = dict(headers or {})
        super().__init__(self.detail)

    def as_dict(self, instance: str = "") -> dict[str, Any]:
        """The JSON object."""
        shaped: dict[str, Any] = {
            "type": f"/problems/{self.name}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": instance,
        }
        return shaped | ({"errors": self.errors} if self.errors else {})

    def body(self, instance: str = "") -> bytes:
        # What was given can hold half a character, which is none in UTF-8.
        shaped = self.as_dict(instance)
        shaped["detail"] = self.detail.encode(errors="backslashreplace").decode()
        return orjson.dumps(shaped)

    def raw_headers(self, length: int) -> RawHeaders:
        """For ASGI."""
        out = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % length)]
        return out + [(k.lower().encode(), v.encode()) for k, v in self.headers.items()]
