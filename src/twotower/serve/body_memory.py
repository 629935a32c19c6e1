"""A memory budget for the request bodies and replies that a worker holds at the same time."""

from __future__ import annotations

from twotower.serve.problems import overload_problem

UNCOUNTED_BYTES = 16 << 10
"""Bytes of each body and of each reply that are not counted, so that large requests never make an ordinary one refused.
The number of connections bounds their sum."""


class BodyMemory:
    """A budget of `limit` bytes, exceeded by at most one reservation. Each request has a `BodyReservation`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.reserved = limit, 0


class BodyReservation:
    """Bytes of the budget that one request has reserved; released when the request ends."""

    __slots__ = ("_memory", "_reserved")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory, self._reserved = memory, 0

    def reserve(self, size: int) -> None:
        """Add `size` bytes to the reservation. Raises Problem "overload" if the budget is used up."""
        if self._memory.reserved >= self._memory.limit:
            raise overload_problem(f"bodies and replies in progress hold the allowed {self._memory.limit:,} bytes")
        self._memory.reserved += size
        self._reserved += size

    def release(self) -> None:
        self._memory.reserved -= self._reserved
        self._reserved = 0
