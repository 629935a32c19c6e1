"""Event of a request: an interaction with an item, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from twotower.data.times import MICROSECONDS, plausible_range
from twotower.errors import DataError

EVENT_KEYS = ("id", "liked", "event", "time")
"""Keys of an event in JSON."""


class Event(NamedTuple):
    """Interaction of a user."""

    item: str
    """Item id."""
    liked: bool = True
    """True if the user liked the item."""
    type: str | None = None
    """Type of the event, as the log names it. None: not told."""
    time: float | None = None
    """Seconds since 1970. None: not told."""


EventLike = Event | tuple[str | int, bool]
"""An event, or its item id and whether it was liked."""
Told = EventLike | str | int | np.integer
"""An event as a caller in Python tells it: also as an item id alone."""


def as_event(told: Told) -> Event:
    """Return an event as a caller tells it, with its item id as text. Raises DataError for anything else."""
    if isinstance(told, Event):
        if type(told.item) is str and type(told.liked) is bool:
            return told
        event = told
    elif isinstance(told, tuple) and len(told) == 2:
        event = Event(*told)  # type: ignore[arg-type]
    else:
        event = Event(told)  # type: ignore[arg-type]
    is_id = isinstance(event.item, str | int | np.integer) and not isinstance(event.item, bool)
    if is_id and isinstance(event.liked, bool | np.bool_):
        return event._replace(item=str(event.item), liked=bool(event.liked))
    raise DataError(
        f"request: a history holds {told!r:.80}, expected an item id, a pair such as ('7', True), or an Event"
    )


def told_event(item: str, liked: bool | None = None, type: str | None = None, time: float | None = None) -> Event:
    """Return an event as it is told. Raises DataError for a type beside `liked`, or an implausible time."""
    if type is not None and liked is not None:
        raise DataError(
            f"request: the event of item '{item:.80}' has 'event' and 'liked', and a type says whether it is liked; give one of them"
        )
    if time is not None:
        earliest, latest = plausible_range()
        if not (math.isfinite(time) and earliest <= time * MICROSECONDS <= latest):
            raise DataError(
                f"request: the event of item '{item:.80}' has the time {time:g}, expected seconds since 1970, from 1990 to tomorrow"
            )
    return Event(item, True if liked is None else liked, type, time)


def in_time_order(events: Sequence[EventLike]) -> Sequence[EventLike]:
    """Return the events in the order of their times if each has one, equal times as given; else as given."""
    times = [time for event in events if (time := Event(*event).time) is not None]
    if len(times) < len(events):
        return events
    return [event for _, event in sorted(zip(times, events, strict=True), key=lambda timed: timed[0])]


def last_of_each(events: Sequence[Event]) -> list[Event]:
    """Return the last event of each item, in their order."""
    last: dict[str, Event] = {}
    for event in events:
        last.pop(event.item, None)
        last[event.item] = event
    return list(last.values())
