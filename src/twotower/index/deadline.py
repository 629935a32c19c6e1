"""The deadline of a search in another process, shared by all its calls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from twotower.errors import Unavailable

CONNECT_TIMEOUT = 3.0
"""Default limit of a connection to the server of a remote index. Seconds."""
_until: ContextVar[float | None] = ContextVar("until", default=None)


@contextmanager
def deadline(until: float) -> Iterator[None]:
    """Make the calls of this thread within the block end by `until`, a time of `time.monotonic`."""
    token = _until.set(until)
    try:
        yield
    finally:
        _until.reset(token)


def remaining_seconds(limit: float) -> float:
    """Return the seconds that a call may take: `limit`, or less if the deadline is nearer.

    Raises Unavailable if the deadline has passed.
    """
    until = _until.get()
    if until is None:
        return limit
    rest = until - time.monotonic()
    if rest <= 0:
        raise Unavailable("the time for the search is over")
    return min(limit, rest)
