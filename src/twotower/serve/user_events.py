"""Event stores: the recent events of users and the vectors computed with them, kept in this process or in Redis.

Keys carry the bundle's id: `BUNDLE:events:USER`, `BUNDLE:vector:USER`. Events are written under the current bundle and
read under it and recently current ones, in the order of their times, so swaps and rollbacks lose no events. A user
vector is kept with a digest of its events: for another bundle or other events it is a miss.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from sys import getsizeof
from typing import NamedTuple, Protocol

import numpy as np
import orjson

from twotower.arrays.types import Floats
from twotower.retrieval.event import Event, EventLike

DIGEST_BYTES = 8
MAX_UNKNOWN_EVENTS = 20
"""Latest events of items unknown to the bundle that are kept of a user: the next bundle may know them."""
USER_BYTES, HISTORY_BYTES, VECTOR_BYTES = 330, 160, 200
"""Bytes of Python's own objects of a user, of a history and of a vector, measured by tracemalloc."""


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


class TimedEvent(NamedTuple):
    """An event with its time."""

    item: str
    liked: bool
    time: float
    """Seconds since 1970."""
    known: bool = True
    """True if the bundle that was current knew the item."""
    type: str | None = None
    """Type of the event. None: unknown."""

    @property
    def event(self) -> Event:
        """The event as requests have it, with its time."""
        return Event(self.item, self.liked, self.type, self.time)


class _History(NamedTuple):
    """Events of a user under one bundle."""

    until: float
    """Time of the store's clock at which the events expire."""
    events: bytes
    """JSON of the `TimedEvent`s, oldest first."""

    def read(self) -> list[TimedEvent]:
        return [TimedEvent(*event) for event in orjson.loads(self.events)]


class _User(NamedTuple):
    """Events by bundle; the vector that was saved last, with its bundle and the digest of its events; bytes of both."""

    histories: dict[str, _History]
    vector: tuple[str, bytes, bytes] | None
    size: int


class InProcessEvents:
    """An event store in this process, bounded in bytes: the least recently seen user is dropped first."""

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
        self.events, self.seconds, self.limit = events, seconds, limit
        self.size = 0
        """Bytes in use, of `limit`, including Python's own objects."""
        self._on_drop, self._clock = on_drop, clock
        self._users: OrderedDict[str, _User] = OrderedDict()
        """By user id, the least recently seen first."""

    async def add(
        self, bundles: Sequence[str], user: str, events: Sequence[EventLike], unknown: Container[str] = ()
    ) -> tuple[int, bool]:
        self.put(bundles[-1], user, with_times(events, unknown))
        return len(self.get(bundles, user)), True

    def put(self, bundle: str, user: str, events: Sequence[TimedEvent]) -> None:
        """Append events under a bundle."""
        now = self._clock()
        while self._users:  # those whose events are too old do not count as dropped
            oldest, kept = next(iter(self._users.items()))
            if any(history.until >= now for history in kept.histories.values()):
                break
            self._remove(oldest)
        histories = self._histories(user)
        before = histories[bundle].read() if bundle in histories else []
        kept_events = self._without_unknown([*before, *events[-self.events :]])[-self.events :]
        # Trailing defaults are left out. The bytes are copied, because orjson's own hold up to 4 kB that are not used.
        short = [tuple(event[:3] if event[3:] == (True, None) else event) for event in kept_events]
        histories[bundle] = _History(now + self.seconds, bytes(memoryview(orjson.dumps(short))))
        self._keep(user, histories, self._vector(user))

    def get(self, bundles: Sequence[str], user: str) -> list[TimedEvent]:
        """Return the user's latest events under the bundles, and mark the user as seen."""
        if user not in self._users:
            return []
        histories = self._histories(user)
        self._keep(user, histories, self._vector(user))
        return latest([e for b in bundles if b in histories for e in histories[b].read()], self.events)

    def take(self, bundles: Sequence[str], user: str) -> list[TimedEvent]:
        """Return and delete the user's events under the bundles."""
        events, histories = self.get(bundles, user), self._histories(user)
        self._keep(user, {b: history for b, history in histories.items() if b not in bundles}, self._vector(user))
        return events

    async def fetch(self, bundles: Sequence[str], user: str) -> UserState:
        events = [e.event for e in self.get(bundles, user)]
        if not events:
            return EMPTY_STATE
        kept = self._vector(user)
        fits = kept is not None and kept[:2] == (bundles[-1], history_digest(events))
        return UserState(events, np.frombuffer(kept[2], "<f4")[None] if kept is not None and fits else None)

    async def save_vector(self, bundle: str, user: str, events: Sequence[EventLike], vector: Floats) -> None:
        self._keep(user, self._histories(user), (bundle, history_digest(events), vector.astype("<f4").tobytes()))

    async def forget(self, bundles: Sequence[str], user: str) -> bool:
        self._remove(user)
        return True

    async def close(self) -> None:
        return

    def _histories(self, user: str) -> dict[str, _History]:
        """Return a user's events by bundle that are not too old."""
        now, kept = self._clock(), self._users.get(user)
        return {b: history for b, history in kept.histories.items() if history.until >= now} if kept else {}

    def _vector(self, user: str) -> tuple[str, bytes, bytes] | None:
        kept = self._users.get(user)
        return kept.vector if kept else None

    def _keep(self, user: str, histories: dict[str, _History], vector: tuple[str, bytes, bytes] | None) -> None:
        """Replace what is kept of a user, and drop users beyond the limit. Nothing is kept of a user without events."""
        self._remove(user)
        if not histories:
            return
        size = USER_BYTES + getsizeof(user) + sum(HISTORY_BYTES + len(h.events) for h in histories.values())
        size += VECTOR_BYTES + len(vector[2]) if vector else 0
        self._users[user] = _User(histories, vector, size)
        self.size += size
        dropped = 0
        while self.size > self.limit:
            self._remove(next(iter(self._users)))
            dropped += 1
        if dropped:
            self._on_drop("user", dropped)

    def _remove(self, user: str) -> None:
        if (kept := self._users.pop(user, None)) is not None:
            self.size -= kept.size

    def _without_unknown(self, events: list[TimedEvent]) -> list[TimedEvent]:
        """Return the events without the oldest ones of unknown items beyond MAX_UNKNOWN_EVENTS."""
        unknown = [place for place, event in enumerate(events) if not event.known]
        excess = {*unknown[:-MAX_UNKNOWN_EVENTS]}
        if excess:
            self._on_drop("event", len(excess))
        return [event for place, event in enumerate(events) if place not in excess]


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
