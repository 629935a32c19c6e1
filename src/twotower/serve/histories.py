"""Recent events in this process, bounded in bytes; the least recently seen user is dropped first.

An event is 16 bytes: its time (float64) and a code of its item's number, its type's number and two flags. Ids of items
are kept once, under numbers that do not depend on a bundle; a number is freed with the last event of its item.
"""

from __future__ import annotations

import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from twotower.retrieval.event import Event

MAX_UNKNOWN_EVENTS = 20
"""Latest events of items unknown to the bundle that are kept of a user: the next bundle may know them."""
_EVENT = struct.Struct("<dQ")
_LIKED_BIT, _KNOWN_BIT = 1, 2  # flags in a code, below the numbers of the type and of the item
_TYPE_BIT, _ITEM_BIT = 2, 18
# Bytes of Python's own objects, measured by tracemalloc: of an item id, a user, a history, a vector.
_ITEM_OVERHEAD, _USER_OVERHEAD, _HISTORY_OVERHEAD, _VECTOR_OVERHEAD = 140, 420, 150, 140


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


class Histories:
    """Recent events by user and bundle."""

    def __init__(
        self,
        events: int,
        seconds: float,
        limit: int,
        on_drop: Callable[[str, int], None] = lambda what, n: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the latest `events` of a user and bundle, `seconds` after the last of them, `limit` bytes in total.

        `on_drop` receives "user" or "event" and a count whenever some are dropped for lack of memory."""
        self.events, self.seconds, self.limit = events, seconds, limit
        self._on_drop, self._clock = on_drop, clock
        self._users: OrderedDict[bytes, _User] = OrderedDict()
        self._items = _Items()
        self._types: list[str | None] = [None]  # by number; few, as only types of a bundle are accepted
        self._user_bytes = 0

    def __len__(self) -> int:
        return len(self._users)

    @property
    def size(self) -> int:
        """Bytes of all users and items, including Python's own objects."""
        return self._user_bytes + self._items.size

    def put(self, user: str, bundle: str, events: Sequence[TimedEvent]) -> None:
        """Append to the user's events under the bundle."""
        self._forget_old()
        key = _encode(user)
        entry = self._users.get(key)
        if entry is None:
            entry = self._users[key] = _User(len(key))
            self._user_bytes += entry.size
        self._users.move_to_end(key)
        new = [(e.time, self._code(e)) for e in events[-self.events :]]
        kept, unknown = _limit_unknown([*self._packed(entry, bundle), *new])
        if unknown:
            self._on_drop("event", len(unknown))
        self._release([*unknown, *kept[: -self.events]])
        kept = kept[-self.events :]
        entry.histories[bundle] = (self._clock() + self.seconds, b"".join(_EVENT.pack(*e) for e in kept))
        self._update_size(entry)
        self._make_room()

    def get(self, user: str, bundles: Iterable[str]) -> list[TimedEvent]:
        """Return the user's events under the bundles, one bundle after the other, and mark the user as seen."""
        key = _encode(user)
        if (entry := self._users.get(key)) is None:
            return []
        self._users.move_to_end(key)
        found = [
            TimedEvent(
                self._items[code >> _ITEM_BIT], bool(code & _LIKED_BIT), when, bool(code & _KNOWN_BIT), self._type(code)
            )
            for bundle in bundles
            for when, code in self._packed(entry, bundle)
        ]
        if entry.histories:
            self._update_size(entry)
        else:
            self.drop(user)
        return found

    def save_vector(self, user: str, vector: tuple[str, bytes, bytes]) -> None:
        """Keep a vector of a user who has events: its bundle, the digest of its history, its numbers (float32)."""
        if (entry := self._users.get(_encode(user))) is not None:
            entry.vector = vector
            self._update_size(entry)
            self._make_room()

    def vector(self, user: str) -> tuple[str, bytes, bytes] | None:
        """Return the vector that was saved last, None if there is none."""
        entry = self._users.get(_encode(user))
        return None if entry is None else entry.vector

    def drop(self, user: str, bundles: Iterable[str] | None = None) -> None:
        """Delete the user's events under the bundles; without `bundles`, all of the user's data."""
        key = _encode(user)
        if (entry := self._users.get(key)) is None:
            return
        for bundle in list(entry.histories) if bundles is None else bundles:
            self._release(_unpack(entry.histories.pop(bundle, (0.0, b""))[1]))
        if entry.histories:
            self._update_size(entry)
        else:
            self._user_bytes -= self._users.pop(key).size

    def _code(self, event: TimedEvent) -> int:
        """Return the code of an event, and count a use of its item. A type beyond the numbers of a code is dropped."""
        if event.type not in self._types and len(self._types) < 1 << (_ITEM_BIT - _TYPE_BIT):
            self._types.append(event.type)
        number = self._types.index(event.type) if event.type in self._types else 0
        item = self._items.take(event.item)
        return item << _ITEM_BIT | number << _TYPE_BIT | event.known * _KNOWN_BIT | event.liked * _LIKED_BIT

    def _type(self, code: int) -> str | None:
        return self._types[(code & ((1 << _ITEM_BIT) - 1)) >> _TYPE_BIT]

    def _packed(self, entry: _User, bundle: str) -> list[tuple[float, int]]:
        """Return the events under a bundle; delete them if they are too old."""
        until, events = entry.histories.get(bundle, (0.0, b""))
        if events and until < self._clock():
            del entry.histories[bundle]
            self._release(_unpack(events))
            return []
        return _unpack(events)

    def _release(self, events: Iterable[tuple[float, int]]) -> None:
        for _, code in events:
            self._items.release(code >> _ITEM_BIT)

    def _update_size(self, entry: _User) -> None:
        before = entry.size
        entry.update_size()
        self._user_bytes += entry.size - before

    def _make_room(self) -> None:
        dropped = 0
        while self.size > self.limit and self._users:
            self._drop_first()
            dropped += 1
        if dropped:
            self._on_drop("user", dropped)

    def _forget_old(self) -> None:
        """Delete users whose events are too old; they do not count as dropped."""
        now = self._clock()
        while self._users and next(iter(self._users.values())).until < now:
            self._drop_first()

    def _drop_first(self) -> None:
        _, entry = self._users.popitem(last=False)
        self._user_bytes -= entry.size
        for _, events in entry.histories.values():
            self._release(_unpack(events))


class _User:
    """The events, the vector and the bytes of one user."""

    __slots__ = ("histories", "id_bytes", "size", "vector")

    def __init__(self, id_bytes: int) -> None:
        self.id_bytes = id_bytes
        self.histories: dict[str, tuple[float, bytes]] = {}
        """By bundle: the clock's time at which the events expire, and the packed events."""
        self.vector: tuple[str, bytes, bytes] | None = None
        self.update_size()

    @property
    def until(self) -> float:
        return max((until for until, _ in self.histories.values()), default=0.0)

    def update_size(self) -> None:
        self.size = (
            _USER_OVERHEAD
            + self.id_bytes
            + sum(_HISTORY_OVERHEAD + len(events) for _, events in self.histories.values())
        )
        if self.vector is not None:
            self.size += _VECTOR_OVERHEAD + len(self.vector[2])


class _Items:
    """Item ids by number, each kept once while an event names it."""

    def __init__(self) -> None:
        self.size = 0
        self._numbers: dict[bytes, int] = {}
        self._texts: list[bytes | None] = []
        self._uses: list[int] = []
        self._free: list[int] = []

    def __getitem__(self, number: int) -> str:
        text = self._texts[number]
        assert text is not None
        return text.decode("utf-8", "surrogatepass")

    def take(self, item: str) -> int:
        """Return the item's number, and count one more use."""
        text = _encode(item)
        number = self._numbers.get(text)
        if number is None:
            if self._free:
                number = self._free.pop()
            else:
                number = len(self._texts)
                self._texts.append(None)
                self._uses.append(0)
            self._numbers[text], self._texts[number] = number, text
            self.size += _ITEM_OVERHEAD + len(text)
        self._uses[number] += 1
        return number

    def release(self, number: int) -> None:
        """Count one use less; free the number after the last."""
        self._uses[number] -= 1
        if not self._uses[number]:
            text = self._texts[number]
            assert text is not None
            self._texts[number] = None
            del self._numbers[text]
            self._free.append(number)
            self.size -= _ITEM_OVERHEAD + len(text)


def _limit_unknown(events: list[tuple[float, int]]) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    """Split into the events to keep and the oldest of unknown items beyond MAX_UNKNOWN_EVENTS."""
    excess = sum(not code & _KNOWN_BIT for _, code in events) - MAX_UNKNOWN_EVENTS
    kept, dropped = [], []
    for event in events:
        if excess > 0 and not event[1] & _KNOWN_BIT:
            excess -= 1
            dropped.append(event)
        else:
            kept.append(event)
    return kept, dropped


def _unpack(events: bytes) -> list[tuple[float, int]]:
    return list(_EVENT.iter_unpack(events))


def _encode(text: str) -> bytes:
    # Bytes, not text: a str also keeps its UTF-8 form after it was encoded once.
    return text.encode("utf-8", "surrogatepass")
