"""Event stores: the recent events of users and the vectors computed with them, kept in this process or in Redis.

Keys carry the bundle's id: `BUNDLE:events:USER`, `BUNDLE:vector:USER`. Events are written under the current bundle and
read under it and recently current ones, in the order of their times, so swaps and rollbacks lose no events. A user
vector is kept with a digest of its events: for another bundle or other events it is a miss.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import orjson

from twotower.arrays.types import Floats
from twotower.retrieval.event import Event, EventLike
from twotower.serve.histories import Histories, TimedEvent

DIGEST_BYTES = 8


@dataclass(frozen=True)
class UserState:
    """A user's recent events, and the user vector computed with them."""

    events: list[Event]
    """Oldest first."""
    vector: Floats | None = None
    """(1, D); None if it was not saved, or for other events."""


EMPTY_STATE = UserState([])


class EventStore(Protocol):
    """A store of recent events and user vectors."""

    shared: bool
    """True if other processes read the same events."""

    async def add(
        self, bundles: Sequence[str], user: str, events: Sequence[EventLike], unknown: Container[str] = ()
    ) -> tuple[int, bool]:
        """Append events under the last of the bundles, to which the `unknown` items are unknown.

        Returns the number of events under all of the bundles, and True if the new ones are where `shared` says."""

    async def fetch(self, bundles: Sequence[str], user: str) -> UserState:
        """Return the user's events under the bundles, oldest first, and the vector under the last bundle."""

    async def save_vector(self, bundle: str, user: str, events: Sequence[EventLike], vector: Floats) -> None:
        """Save the vector (1, D) that was computed with these events."""

    async def forget(self, bundles: Sequence[str], user: str) -> bool:
        """Delete the user's events. Return True if they are certainly deleted."""

    async def close(self) -> None:
        """Close connections."""


class InProcessEvents:
    """An event store in this process, bounded in bytes."""

    shared = False

    def __init__(
        self,
        events: int = 200,
        seconds: float = 86_400,
        limit: int = 256 << 20,
        on_drop: Callable[[str, int], None] = lambda what, n: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the latest `events` of a user and bundle, `seconds` after the last of them, `limit` bytes in total.

        `on_drop` receives "user" or "event" and a count whenever some are dropped for lack of memory."""
        self.events = events
        self._histories = Histories(events, seconds, limit, on_drop, clock)

    @property
    def size(self) -> int:
        """Bytes in use, of `limit`."""
        return self._histories.size

    async def add(
        self, bundles: Sequence[str], user: str, events: Sequence[EventLike], unknown: Container[str] = ()
    ) -> tuple[int, bool]:
        self.put(bundles[-1], user, with_times(events, unknown))
        return len(self.get(bundles, user)), True

    def put(self, bundle: str, user: str, events: Sequence[TimedEvent]) -> None:
        """Append events under a bundle."""
        self._histories.put(user, bundle, events)

    def get(self, bundles: Sequence[str], user: str) -> list[TimedEvent]:
        """Return the user's latest events under the bundles."""
        return latest(self._histories.get(user, bundles), self.events)

    def take(self, bundles: Sequence[str], user: str) -> list[TimedEvent]:
        """Return and delete the user's events under the bundles."""
        events = self.get(bundles, user)
        self._histories.drop(user, bundles)
        return events

    async def fetch(self, bundles: Sequence[str], user: str) -> UserState:
        events = [e.event for e in self.get(bundles, user)]
        if not events:
            return EMPTY_STATE
        kept = self._histories.vector(user)
        fits = kept is not None and kept[:2] == (bundles[-1], history_digest(events))
        return UserState(events, np.frombuffer(kept[2], "<f4")[None] if kept is not None and fits else None)

    async def save_vector(self, bundle: str, user: str, events: Sequence[EventLike], vector: Floats) -> None:
        self._histories.save_vector(user, (bundle, history_digest(events), vector.astype("<f4").tobytes()))

    async def forget(self, bundles: Sequence[str], user: str) -> bool:
        self._histories.drop(user)
        return True

    async def close(self) -> None:
        return


def history_digest(events: Sequence[EventLike]) -> bytes:
    """Return the digest of a user's events (8 bytes of BLAKE2b)."""
    return hashlib.blake2b(orjson.dumps([tuple(Event(*event)) for event in events]), digest_size=DIGEST_BYTES).digest()


def with_times(events: Sequence[EventLike], unknown: Container[str] = ()) -> list[TimedEvent]:
    """Return the events with their times, by default the present time, a microsecond apart, in their order."""
    now, timed = time.time(), list[TimedEvent]()
    for place, event in enumerate(events):
        item, liked, kind, when = Event(*event)
        timed.append(TimedEvent(item, liked, now + place * 1e-6 if when is None else when, item not in unknown, kind))
    return timed


def latest(events: list[TimedEvent], n: int) -> list[TimedEvent]:
    """Return the last `n` events in the order of their times."""
    return sorted(events, key=lambda e: e.time)[-n:]
