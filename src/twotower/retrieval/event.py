"""Events of a request: interactions with items, their types, and those that a bundle's histories already contain."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from twotower.arrays.types import Ints, UserRow
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, TRAIN
from twotower.data.times import MICROSECONDS, plausible_range
from twotower.errors import DataError, did_you_mean
from twotower.features.schema import OTHER_EVENTS, EventRule, Schema
from twotower.features.values import UNKNOWN

if TYPE_CHECKING:
    from twotower.retrieval.request import Request

EVENT_KEYS = ("id", "liked", "event", "time")
"""Keys of an event in JSON."""
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
        if type(given.item) is str and type(given.liked) is bool:
            return given
        event = given
    elif isinstance(given, tuple) and len(given) == 2:
        event = Event(*given)  # type: ignore[arg-type]
    else:
        event = Event(given)  # type: ignore[arg-type]
    is_id = isinstance(event.item, str | int | np.integer) and not isinstance(event.item, bool)
    if is_id and isinstance(event.liked, bool | np.bool_):
        return event._replace(item=str(event.item), liked=bool(event.liked))
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
    if time is not None:
        earliest, latest = plausible_range()
        if not (math.isfinite(time) and earliest <= time * MICROSECONDS <= latest):
            raise DataError(
                f"request: the event of item '{item:.80}' has the time {time:g}, expected seconds since 1970, from "
                "1990 to tomorrow"
            )
    return Event(item, True if liked is None else liked, type, time)


def in_time_order(events: Sequence[EventLike]) -> Sequence[EventLike]:
    """Return the events sorted by time (stable) if each has one, else in the given order."""
    times = [time for event in events if (time := Event(*event).time) is not None]
    if len(times) < len(events):
        return events
    return [event for _, event in sorted(zip(times, events, strict=True), key=lambda timed: timed[0])]


def last_of_each(events: Sequence[Event]) -> list[Event]:
    """Return the last event of each item, in the given order."""
    last: dict[str, Event] = {}
    for event in events:
        last.pop(event.item, None)
        last[event.item] = event
    return list(last.values())


class EventTypes:
    """Reads the types of events: an event of an ignored type is dropped, others are liked or not and have a code."""

    def __init__(self, schema: Schema) -> None:
        self._rules = schema.events
        self._ignores = any(rule.target == "ignored" for rule in schema.events.values())
        self._codes = {name: code for code, name in enumerate(schema.event_types, 1)}
        self.names = [name for name in schema.events if name != OTHER_EVENTS]
        """Types that the schema names."""

    def code(self, event: Event) -> int:
        """Return the code of an event's type, 0 for an unknown type."""
        return UNKNOWN if event.type is None else self._codes.get(event.type, UNKNOWN)

    def without_ignored(self, request: Request) -> Request:
        """Return a request without events of ignored types, whose rows training leaves out of the log."""
        if not self._ignores or not any(map(self._is_ignored, request.all_events)):
            return request
        history = None if request.history is None else self._counted(request.history)
        return replace(request, history=history, events=self._counted(request.events))

    def read(self, given: Sequence[EventInput], stored: bool = False) -> list[Event]:
        """Return the events without ignored ones; the rule of a type sets `liked`.

        A type that only the rule for all other types covers becomes None, which has the same code. Raises DataError for
        a type without a rule, unless the event was `stored`, perhaps under another bundle: then its type becomes
        None."""
        read = list[Event]()
        for event in [as_event(event) for event in given]:
            rule = self._rule(event)
            if rule is not None:
                if rule.target != "ignored":
                    known = event.type if event.type in self._rules else None
                    read.append(event._replace(liked=rule.positive, type=known))
            elif event.type is None:
                read.append(event)
            elif stored:
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

    def _rule(self, event: Event) -> EventRule | None:
        """Return the rule of an event's type, None if there is no rule or no type."""
        return None if event.type is None else self._rules.get(event.type, self._rules.get(OTHER_EVENTS))

    def _is_ignored(self, event: Event) -> bool:
        rule = self._rule(event)
        return rule is not None and rule.target == "ignored"

    def _counted(self, given: Sequence[EventInput]) -> list[Event]:
        """Return the events of types that are not ignored."""
        return [event for event in map(as_event, given) if not self._is_ignored(event)]


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

    def missing(self, user: UserRow, events: Sequence[Event], items: Sequence[int]) -> list[Event]:
        """Return the events, of the item rows `items`, that are not in the stored histories.

        Each stored interaction matches one event of its item: times agree within the unit of the log's times and
        CLOCK_TOLERANCE, and an event with the same `liked` matches first. If the log keeps only the last interaction of
        a user with an item, it matches all events before it. An event without a time is missing, and so is every event
        if the log has no times."""
        if not self.has_times:
            return [*events]
        timed = [place for place, event in enumerate(events) if event.time is not None]
        left = sorted(timed, key=lambda place: _time(events[place]))
        between = None
        if left and self._dataset.schema.duplicates == "keep":
            reach = self.unit + CLOCK_TOLERANCE
            between = _time(events[left[0]]) - reach, _time(events[left[-1]]) + reach
        stored = self._stored(user, items, between)
        if self._dataset.schema.duplicates == "keep":
            for slack, alike in product((0, CLOCK_TOLERANCE), (True, False)):
                left = [p for p in left if not self._take(stored[items[p]], events[p], slack, alike)]
        else:
            left = [place for place in left if not self._is_replaced(stored[items[place]], events[place])]
        missing = {*left} | {*range(len(events))} - {*timed}
        return [event for place, event in enumerate(events) if place in missing]

    def _take(self, of_item: list[_Stored], event: Event, slack: int, alike: bool) -> bool:
        """Remove the first interaction at an event's time, within the log's unit and `slack`, with the same `liked` if
        `alike`. Return False if no interaction matches."""
        when = _time(event)
        place = bisect_left(of_item, (when - self.unit - slack + 1, False))
        while place < len(of_item) and of_item[place][0] <= when + slack:
            if of_item[place][1] == event.liked or not alike:
                del of_item[place]
                return True
            place += 1
        return False

    def _is_replaced(self, of_item: list[_Stored], event: Event) -> bool:
        """Return True if an interaction with the item of an event is the event or a later one."""
        when = _time(event)
        return any(when <= at or (liked == event.liked and self._agree(when, at)) for at, liked in of_item)

    def _agree(self, when: int, at: int) -> bool:
        """Return True if the times of an event and an interaction agree."""
        return at - CLOCK_TOLERANCE <= when < at + self.unit + CLOCK_TOLERANCE

    def _stored(self, user: UserRow, items: Sequence[int], between: tuple[int, int] | None) -> dict[int, list[_Stored]]:
        """Return a user's interactions in the histories with some items, between two times, by item row, oldest
        first."""
        data, found = self._dataset, defaultdict[int, list[_Stored]](list)
        known, rows = np.array([row for row in items if row >= 0], np.int64), history_rows(data, user)
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


def _time(event: Event) -> int:
    """Return the time of an event in microseconds."""
    assert event.time is not None
    return round(event.time * MICROSECONDS)
