"""Event stores: the recent events of users and the vectors computed with them, kept in this process or in Redis.

Keys carry the bundle's id: `BUNDLE:events:USER`, `BUNDLE:vector:USER`. Events are written under the current bundle and
read under it and recently current ones, in the order of their times, so swaps and rollbacks lose no events. A user
vector is kept with a digest of its events: for another bundle or other events it is a miss.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from sys import getsizeof
from typing import NamedTuple, Protocol

import numpy as np
import orjson

from twotower.arrays.types import Floats
from twotower.retrieval.event import Event, EventLike

DIGEST_BYTES = 8
ENTRY_BYTES = 350
"""Bytes of Python's own objects of a user under a bundle, measured by tracemalloc."""


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

    async def add(self, bundles: Sequence[str], user: str, events: Sequence[EventLike]) -> tuple[int, bool]:
        """Append events under the last of the bundles.

        Returns the number of events under all of the bundles, and True if the new ones are where `shared` says."""

    async def fetch(self, bundles: Sequence[str], user: str) -> UserState:
        """Return the user's events under the bundles, oldest first, and the vector under the last bundle."""

    async def save_vector(self, bundles: Sequence[str], user: str, events: Sequence[EventLike], vector: Floats) -> None:
        """Save the vector (1, D) that the last of the bundles computed with these events."""

    async def forget(self, bundles: Sequence[str], user: str) -> bool:
        """Delete the user's events. Return True if they are certainly deleted."""

    async def close(self) -> None:
        """Close connections."""


class _Kept(NamedTuple):
    """A user's events under a bundle, and the vector."""

    until: float
    """Time of the store's clock at which the events expire."""
    events: bytes = b"[]"
    """The events in JSON, oldest first."""
    digest: bytes = b""
    """Digest of the events of the vector, maybe under several bundles."""
    vector: bytes = b""


class InProcessEvents:
    """An event store in this process, bounded in bytes: what was seen least recently is dropped first."""

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

        `on_drop` receives "user" and 1 whenever a user is dropped for lack of memory."""
        self.events, self.seconds, self.limit = events, seconds, limit
        self.size = 0
        """Bytes in use, of `limit`, including Python's own objects."""
        self._on_drop, self._clock = on_drop, clock
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        """By bundle and user, the least recently seen first."""

    async def add(self, bundles: Sequence[str], user: str, events: Sequence[EventLike]) -> tuple[int, bool]:
        self.put(bundles[-1], user, with_times(events))
        return len(self.get(bundles, user)), True

    def put(self, bundle: str, user: str, events: Sequence[Event]) -> None:
        """Append events, which have times, under a bundle."""
        now = self._clock()
        while self._kept and (oldest := next(iter(self._kept.items())))[1].until < now:
            self._remove(oldest[0])  # not for lack of memory
        data = orjson.dumps([tuple(e) for e in [*self.get([bundle], user), *events][-self.events :]])
        # The bytes are copied, because orjson's own hold up to 4 kB that are not used.
        self._keep((bundle, user), _Kept(now + self.seconds, bytes(memoryview(data))))

    def get(self, bundles: Sequence[str], user: str) -> list[Event]:
        """Return the user's latest events under the bundles, and mark the user as seen."""
        found, now = list[Event](), self._clock()
        for key in ((bundle, user) for bundle in bundles):
            if (kept := self._kept.get(key)) and kept.until >= now:
                self._kept.move_to_end(key)
                found += (Event(*event) for event in orjson.loads(kept.events))
        return latest(found, self.events)

    def take(self, bundles: Sequence[str], user: str) -> list[Event]:
        """Return and delete the user's events under the bundles."""
        events = self.get(bundles, user)
        for bundle in bundles:
            self._remove((bundle, user))
        return events

    async def fetch(self, bundles: Sequence[str], user: str) -> UserState:
        events, kept = self.get(bundles, user), self._kept.get((bundles[-1], user))
        fits = kept is not None and events and kept.digest == history_digest(events)
        return UserState(events, np.frombuffer(kept.vector, "<f4")[None] if kept is not None and fits else None)

    async def save_vector(self, bundles: Sequence[str], user: str, events: Sequence[EventLike], vector: Floats) -> None:
        if not any((bundle, user) in self._kept for bundle in bundles):
            return  # the user was forgotten meanwhile
        key = bundles[-1], user
        kept = self._kept.get(key) or _Kept(self._clock() + self.seconds)
        digest, data = history_digest(events), vector.astype("<f4").tobytes()
        self._keep(key, kept._replace(digest=digest, vector=data))

    async def forget(self, bundles: Sequence[str], user: str) -> bool:
        for key in [key for key in self._kept if key[1] == user]:  # also under bundles of long ago
            self._remove(key)
        return True

    async def close(self) -> None:
        return

    def _keep(self, key: tuple[str, str], kept: _Kept) -> None:
        """Replace what is kept of a user under a bundle, and drop others beyond the limit."""
        self._remove(key)
        self._kept[key] = kept
        self.size += _size(key, kept)
        while self.size > self.limit:
            self._remove(next(iter(self._kept)))
            self._on_drop("user", 1)

    def _remove(self, key: tuple[str, str]) -> None:
        if (kept := self._kept.pop(key, None)) is not None:
            self.size -= _size(key, kept)


def _size(key: tuple[str, str], kept: _Kept) -> int:
    return ENTRY_BYTES + getsizeof(key[1]) + len(kept.events) + len(kept.vector)


def history_digest(events: Sequence[EventLike]) -> bytes:
    """Return the digest of a user's events (8 bytes of BLAKE2b)."""
    return hashlib.blake2b(orjson.dumps([tuple(Event(*event)) for event in events]), digest_size=DIGEST_BYTES).digest()


def with_times(events: Sequence[EventLike]) -> list[Event]:
    """Return the events with their times, by default the present time, a microsecond apart, in their order."""
    now = time.time()
    made = ((place, Event(*event)) for place, event in enumerate(events))
    return [event if event.time is not None else event._replace(time=now + place * 1e-6) for place, event in made]


def latest(events: list[Event], n: int) -> list[Event]:
    """Return the last `n` events, which have times, in the order of these."""
    return sorted(events, key=lambda e: e.time or 0.0)[-n:]
