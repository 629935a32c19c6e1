"""Events of a request: interactions with items, and the types that the schema of a bundle gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from twotower.data.times import MICROSECONDS, plausible_range
from twotower.errors import DataError, did_you_mean
from twotower.features.events import OTHER_EVENTS, EventRule
from twotower.features.schema import Schema
from twotower.features.values import UNKNOWN

if TYPE_CHECKING:
    from twotower.retrieval.request import Request

EVENT_KEYS = ("id", "liked", "event", "time")
"""Keys of an event in JSON."""


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
