"""Limits on the numbers and lists of one request."""

from __future__ import annotations

from collections.abc import Sized

from twotower.serve import schemas
from twotower.serve.problems import Problem
from twotower.serve.settings import ServeSettings


class RequestLimits:
    """The limits of the settings. A request above one is refused with Problem "invalid"."""

    def __init__(self, settings: ServeSettings) -> None:
        self._max_k, self._max_list, self._max_batch = settings.max_k, settings.max_list, settings.max_batch

    def check(self, body: schemas.UserRequest | schemas.SearchRequest) -> None:
        """Check the number of items and the lists of a request."""
        if isinstance(body, schemas.ItemFilter):
            self.check_k(body.k, "body.k")
        if isinstance(body, schemas.UserRequest):
            self.check_list("history", body.history)
            self.check_list("events", body.events)
        if isinstance(body, schemas.ItemFilter):
            self.check_list("allow", body.allow)
            self.check_list("ban", body.ban)

    def check_k(self, k: int, at: str) -> None:
        """Check the number of items, a field `at` a place of the request."""
        if not 1 <= k <= self._max_k:
            raise _invalid(at, f"k is {k}, expected 1 to {self._max_k:,}")

    def check_list(self, name: str, entries: Sized | None) -> None:
        """Check the length of a list of a user or of a filter."""
        _check_length(name, entries, self._max_list)

    def check_batch(self, requests: Sized) -> None:
        """Check the number of requests of a batch."""
        _check_length("requests", requests, self._max_batch)


def _check_length(name: str, entries: Sized | None, limit: int) -> None:
    if entries is not None and len(entries) > limit:
        raise _invalid(f"body.{name}", f"{name} has {len(entries):,} entries, at most {limit:,} are allowed")


def _invalid(at: str, detail: str) -> Problem:
    return Problem("invalid", detail, errors=[{"at": at, "detail": detail}])
