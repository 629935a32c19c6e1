"""How long a search that leaves the process may still take, for all of its exchanges together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from twotower.errors import Unavailable

_until: ContextVar[float | None] = ContextVar("until", default=None)


@contextmanager
def deadline(until: float) -> Iterator[None]:
    """While the block runs, exchanges of this thread end by `until`, on the clock of time.monotonic."""
    token = _until.set(until)
    try:
        yield
    finally:
        _until.reset(token)


def remaining_seconds(most: float) -> float:
    """Seconds that an exchange may take, at most `most`. Raises Unavailable if the time is over."""
    until = _until.get()
    if until is None:
        return most
    rest = until - time.monotonic()
    if rest <= 0:
        raise Unavailable("the time for the search is over")
    return min(most, rest)
