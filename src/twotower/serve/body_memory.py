"""Bytes that bodies and replies under way may take together."""

from __future__ import annotations

from twotower.serve.problems import Problem

UNCOUNTED_BYTES = 16 << 10
"""Bytes of each body and of each reply that are not counted: connections are, and an ordinary request is never refused
because others send large ones."""


class BodyMemory:
    """`most` bytes, and what exceeds them by at most one reply. A request has a `Share` of it."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0


class BodyReservation:
    """The share of one request in a room; freed when it ends."""

    __slots__ = ("_room", "_taken")

    def __init__(self, room: BodyMemory) -> None:
        self._room, self._taken = room, 0

    def take(self, size: int) -> None:
        """`size` bytes that are counted from here on. Raises Problem if there is no room."""
        if self._room.used >= self._room.most:
            raise Problem(
                "overload",
                f"{self._room.most:,} bytes of bodies and replies are under way",
                headers={"Retry-After": "1"},
            )
        self._room.used += size
        self._taken += size

    def free(self) -> None:
        self._room.used -= self._taken
        self._taken = 0
