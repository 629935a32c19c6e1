"""Codes of a user's sequence for one request: the stored or given history, extended by events."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Bools, Codes, Ints
from twotower.data.times import MICROSECONDS
from twotower.features.feature import HistoryFacts, HistorySpec
from twotower.retrieval.event import Event, as_event, in_time_order, last_of_each
from twotower.retrieval.event_types import EventTypes
from twotower.retrieval.request import Request, RequestRows

UNTOLD = -1
"""Time of an event that a request does not tell."""


class _Past(NamedTuple):
    """Interactions (n,), oldest first: item rows, codes of the items, types, which may be empty if no rule reads them, and times,
    which are empty if the log has none."""

    items: Codes | Ints
    codes: Codes
    types: Codes
    times: Ints

    def where(self, kept: Bools | Ints) -> _Past:
        types, times = self.types, self.times
        return _Past(
            self.items[kept],
            self.codes[kept],
            types[kept] if len(types) else types,
            times[kept] if len(times) else times,
        )

    def followed_by(self, more: _Past) -> _Past:
        return _Past(
            np.concatenate([self.items, more.items]),
            np.concatenate([self.codes, more.codes]),
            np.concatenate([self.types, more.types]),
            np.concatenate([self.times, more.times]),
        )

    def mixed_with(self, more: _Past) -> _Past:
        """Return the interactions with others, all in the order of their times; of equal times these come first."""
        if not len(more.items):
            return self
        both = self.followed_by(more)
        return both.where(np.argsort(both.times, kind="stable"))


@dataclass(frozen=True)
class HistoryCodes:
    """Reads the codes of one history of the users."""

    history: HistorySpec
    stored: Ragged
    """Codes of each user row, whose sources are interactions."""
    interaction_items: Codes
    """(n,) item row of each interaction."""
    item_codes: Codes
    """(items,) code of each item row; zeros if a rule makes the codes."""
    last_only: bool
    """True if only the last interaction of a user with an item counts, as in training."""
    event_types: EventTypes
    interaction_types: Codes | None = None
    """(n,) code of the type of each interaction, if a history reads them."""
    interaction_times: Ints | None = None
    """(n,) time of each interaction in microseconds since 1970, if the log has times that say more than an order."""

    def read(self, request: Request, rows: RequestRows) -> tuple[Codes, list[str]]:
        """Return the codes (n,), oldest first, and the ids of items that are not in the bundle. Raises DataError for an unknown
        type of events."""
        unknown: list[str] = []
        if request.history is not None:
            history = self.event_types.read(request.history)
            past, unknown = self._events(last_of_each(history) if self.last_only else history, rows)
        else:
            past = self._stored(rows.user)
        if request.recent or request.events:
            earlier, later = self._split(request, past)
            if self.last_only:
                again = {event.item for event in later}
                earlier, later = last_of_each([e for e in earlier if e.item not in again]), last_of_each(later)
                known = [row for event in (*earlier, *later) if (row := rows.items[event.item]) >= 0]
                past = past.where(~np.isin(past.items, known))
            among, unknown_among = self._events(earlier, rows)
            more, unknown_events = self._events(later, rows)
            past, unknown = past.mixed_with(among).followed_by(more), [*unknown, *unknown_among, *unknown_events]
        return self._coded(past), unknown

    def _split(self, request: Request, past: _Past) -> tuple[list[Event], list[Event]]:
        """Return the recent events that are before the last stored interaction, by their times, and all other events of a request,
        which follow it."""
        recent, last = self.event_types.read(request.recent), UNTOLD
        if request.history is None and self.interaction_times is not None and len(past.times):
            last = int(past.times[-1])
        earlier = [event for event in recent if event.time is not None and _microseconds(event) < last]
        others = [event for event in recent if event.time is None or _microseconds(event) >= last]
        told = in_time_order([*others, *self.event_types.read(request.events)])
        return earlier, [as_event(event) for event in told]

    def _coded(self, past: _Past) -> Codes:
        """Return the codes of the latest interactions, as many as the history holds."""
        latest = -self.history.max_length  # 0: all
        if self.history.codes is None:
            return past.codes[latest:]
        first = np.arange(len(past.items[latest:])) == 0
        return self.history.codes(HistoryFacts(first, past.types[latest:], past.times[latest:]))

    def _stored(self, user: int | None) -> _Past:
        """Return the interactions of a user's stored history."""
        none, types, times = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64)
        if user is None:
            return _Past(none, none, types, times)
        part = slice(*self.stored.offsets[user : user + 2])
        assert self.stored.source is not None, "a stored history names its interactions"
        source = self.stored.source[part]
        if self.history.codes is not None and self.interaction_types is not None:
            types = self.interaction_types[source]
        if self.interaction_times is not None:
            times = self.interaction_times[source]
        return _Past(self.interaction_items[source], self.stored.values[part], types, times)

    def _events(self, events: abc.Sequence[Event], rows: RequestRows) -> tuple[_Past, list[str]]:
        """Return those events that belong to the history, and the ids of unknown items."""
        kept, unknown, row_of_item = list[Event](), list[str](), rows.items
        for event in events:
            if row_of_item[event.item] < 0:
                unknown.append(event.item)
            elif self.history.holds(event.liked):
                kept.append(event)
        items = np.array([row_of_item[event.item] for event in kept], np.int64)
        types, times = np.zeros(0, np.int32), np.zeros(0, np.int64)
        if self.history.codes is not None and self.interaction_types is not None:
            types = np.array([self.event_types.code(event) for event in kept], np.int32)
        if self.interaction_times is not None:
            times = np.array([_microseconds(event) for event in kept], np.int64)
        return _Past(items, self.item_codes[items], types, times), unknown


def _microseconds(event: Event) -> int:
    return UNTOLD if event.time is None else round(event.time * MICROSECONDS)
