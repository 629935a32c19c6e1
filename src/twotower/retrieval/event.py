"""Events of a request: interactions with items, their types, and those that a bundle's histories already contain."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from twotower.arrays.types import Ints, ItemRow, UserRow
from twotower.data.dataset import Dataset
from twotower.data.reading.times import MICROSECONDS, plausible_range
from twotower.data.splits import TEST, TRAIN
from twotower.errors import DataError, did_you_mean
from twotower.features.schema import OTHER_EVENTS, Schema
from twotower.features.values import UNKNOWN

CLOCK_TOLERANCE = 60 * MICROSECONDS
"""Microseconds by which two times of an event may differ: a service gives an event without a time the time of its
call."""
COARSEST_TIMES = 86_400 * MICROSECONDS
"""Largest unit of a log's times: days."""
SAMPLED_TIMES = 4_096
"""Times of the log, evenly spaced, whose greatest common divisor is their unit."""


class Event(NamedTuple):
    """Interaction of a user."""

    item: str
    """Item id."""
    liked: bool = True
    """True if the user liked the item."""
    type: str | None = None
    """Type of the event in the log. None: unknown."""
    time: float | None = None
    """Seconds since 1970. None: unknown."""


EventLike = Event | tuple[str | int, bool]
"""An event, or its item id and True if the user liked it."""
EventInput = EventLike | str | int | np.integer
"""An event as a caller in Python gives it: also an item id alone."""


def as_event(given: EventInput) -> Event:
    """Return the event that a caller gives, with its item id as text. Raises DataError."""
    if isinstance(given, Event):
        event = given
    elif isinstance(given, tuple) and len(given) == 2:
        event = Event(*given)  # type: ignore[arg-type]
    else:
        event = Event(given)  # type: ignore[arg-type]
    item, liked, kind, time = event
    if kind is None and time is None and type(item) is str and type(liked) is bool:
        return event
    is_id = isinstance(item, str | int | np.integer) and not isinstance(item, bool)
    is_time = time is None or (isinstance(time, int | float | np.number) and not isinstance(time, bool))
    if is_id and isinstance(liked, bool | np.bool_) and isinstance(kind, str | None) and is_time:
        check_time(str(item), time)
        return Event(str(item), bool(liked), kind, None if time is None else float(time))
    raise DataError(
        f"request: a history holds {given!r:.80}, expected an item id, a pair such as ('7', True), or an Event"
    )


def checked_event(item: str, liked: bool | None = None, type: str | None = None, time: float | None = None) -> Event:
    """Return an event. Raises DataError if both `type` and `liked` are given, or for an implausible time."""
    if type is not None and liked is not None:
        raise DataError(
            f"request: the event of item '{item:.80}' has 'event' and 'liked', and a type says whether it is liked; "
            "give one of them"
        )
    check_time(item, time)
    return Event(item, True if liked is None else liked, type, time)


def check_time(item: str, time: float | None) -> None:
    """Raise DataError for an implausible time of the event of an item."""
    if time is not None:
        earliest, latest = plausible_range()
        if not (math.isfinite(time) and earliest <= time * MICROSECONDS <= latest):
            raise DataError(
                f"request: the event of item '{item:.80}' has the time {time:g}, expected seconds since 1970, from "
                "1990 to tomorrow"
            )


NO_TIME = -1
"""Time of an event without a time."""


class ReadEvent(NamedTuple):
    """Event of a query, as a bundle reads it."""

    item: str
    """Item id."""
    row: ItemRow
    """Item row, -1 for an item outside the bundle."""
    liked: bool
    code: int
    """Code of the type, 0 for an unknown type."""
    time: int
    """Microseconds since 1970, NO_TIME for an unknown time."""
    is_recent: bool
    """True for an event of an earlier call to a service."""


def in_time_order(events: list[ReadEvent]) -> list[ReadEvent]:
    """Return the events sorted by time (stable) if each has one, else in the given order."""
    if len(events) < 2 or any(event.time == NO_TIME for event in events):
        return events
    return sorted(events, key=lambda event: event.time)


def last_of_each(events: Sequence[ReadEvent]) -> list[ReadEvent]:
    """Return the last event of each item, in the given order."""
    last: dict[str, ReadEvent] = {}
    for event in events:
        last.pop(event.item, None)
        last[event.item] = event
    return list(last.values())


class EventTypes:
    """Reads the types of events: an event of an ignored type is dropped, others are liked or not and have a code."""

    def __init__(self, schema: Schema) -> None:
        self._rules, self._other = schema.events, schema.events.get(OTHER_EVENTS)
        self._codes = {name: code for code, name in enumerate(schema.event_types, 1)}
        self.names = [name for name in schema.events if name != OTHER_EVENTS]
        """Types that the schema names."""

    def code(self, event: Event) -> int:
        """Return the code of an event's type, 0 for an unknown type."""
        return UNKNOWN if event.type is None else self._codes.get(event.type, UNKNOWN)

    def read(self, given: Sequence[Event], stored: int = 0) -> list[Event | None]:
        """Return each event with `liked` by the rule of its type, None for an ignored one.

        A type that only the rule for all other types covers becomes None, which has the same code. Raises DataError for
        a type without a rule, except in the first events, which a service has `stored`, perhaps under another bundle:
        then the type becomes None."""
        read = list[Event | None]()
        for place, event in enumerate(given):
            if event.type is None:
                read.append(event)
            elif (rule := self._rules.get(event.type, self._other)) is not None:
                known = event.type if event.type in self._rules else None
                ignored = rule.target == "ignored"
                read.append(None if ignored else event._replace(liked=rule.positive, type=known))
            elif place < stored:
                read.append(event._replace(type=None))
            elif not self._rules:
                raise DataError(
                    f"request: the event of item '{event.item:.80}' has the type '{event.type:.80}', and the bundle's "
                    "log has no types; leave out 'event'"
                )
            else:
                raise DataError(
                    f"request: no event type '{event.type:.80}'{did_you_mean(event.type, self.names)} (allowed: "
                    f"{', '.join(self.names)})"
                )
        return read


_Stored = tuple[int, bool]
"""Time of an interaction in microseconds, and True if it was liked."""


class StoredEvents:
    """Finds the events of a user that are not in the stored histories."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.has_times = dataset.schema.has_moments
        """True if the log has times of interactions."""

    @cached_property
    def unit(self) -> int:
        """Unit of the log's times in microseconds; for a log of dates, a day."""
        times = self._dataset.times
        found = int(np.gcd.reduce(times[:: max(1, len(times) // SAMPLED_TIMES)].astype(np.int64)))
        return min(found, COARSEST_TIMES) or 1

    def missing(self, user: UserRow, events: Sequence[ReadEvent]) -> list[ReadEvent]:
        """Return the events that are not in the stored histories.

        Each stored interaction matches one event of its item: times agree within the unit of the log's times and
        CLOCK_TOLERANCE, and an event with the same `liked` matches first. If the log keeps only the last interaction of
        a user with an item, it matches all events before it. An event without a time is missing, and so is every event
        if the log has no times."""
        timed = [place for place, event in enumerate(events) if event.time != NO_TIME]
        if not self.has_times or not timed:
            return [*events]
        left = sorted(timed, key=lambda place: events[place].time)
        if self._dataset.schema.duplicates == "keep":
            reach = self.unit + CLOCK_TOLERANCE
            stored = self._stored(user, events, (events[left[0]].time - reach, events[left[-1]].time + reach))
            for slack, alike in product((0, CLOCK_TOLERANCE), (True, False)):
                left = [p for p in left if not self._take(stored[events[p].row], events[p], slack, alike)]
        else:
            stored = self._stored(user, events)
            left = [place for place in left if not self._is_replaced(stored[events[place].row], events[place])]
        found = {*timed} - {*left}
        return [event for place, event in enumerate(events) if place not in found]

    def _take(self, of_item: list[_Stored], event: ReadEvent, slack: int, alike: bool) -> bool:
        """Remove the first interaction at an event's time, within the log's unit and `slack`, with the same `liked` if
        `alike`. Return False if no interaction matches."""
        place = bisect_left(of_item, (event.time - self.unit - slack + 1, False))
        while place < len(of_item) and of_item[place][0] <= event.time + slack:
            if of_item[place][1] == event.liked or not alike:
                del of_item[place]
                return True
            place += 1
        return False

    def _is_replaced(self, of_item: list[_Stored], event: ReadEvent) -> bool:
        """Return True if an interaction with the item of an event is the event or a later one."""
        begin, end = event.time - self.unit - CLOCK_TOLERANCE, event.time + CLOCK_TOLERANCE
        return any(event.time <= at or (liked == event.liked and begin < at <= end) for at, liked in of_item)

    def _stored(
        self, user: UserRow, events: Sequence[ReadEvent], between: tuple[int, int] | None = None
    ) -> dict[int, list[_Stored]]:
        """Return a user's interactions in the histories with the items of some events, between two times, by item row,
        oldest first."""
        data, found = self._dataset, defaultdict[int, list[_Stored]](list)
        known, rows = np.array([event.row for event in events if event.row >= 0], np.int64), history_rows(data, user)
        rows = rows[np.isin(data.pairs.item[rows], known)]
        if between is not None:
            rows = rows[(data.times[rows] >= between[0]) & (data.times[rows] <= between[1])]
        for item, at, liked in zip(data.pairs.item[rows], data.times[rows], data.pairs.positive[rows], strict=True):
            found[int(item)].append((int(at), bool(liked)))
        return found


def history_rows(dataset: Dataset, user: UserRow) -> Ints:
    """Return the interactions (n,) in a user's histories, oldest first.

    In a split by time they are all but the test part, otherwise the training part."""
    seen = dataset.interacted_items
    assert seen.source is not None
    rows: Ints = seen.source[seen.offsets[user] : seen.offsets[user + 1]]
    parts = dataset.parts[rows]
    rows = rows[parts != TEST] if dataset.time_ordered else rows[parts == TRAIN]
    return rows[np.argsort(dataset.times[rows], kind="stable")]
