"""Codes of a user's sequence for one request: the stored or given history, extended by events."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Bools, Codes, Ints
from twotower.data.times import MICROSECONDS
from twotower.features.feature import HistorySpec
from twotower.features.interaction_history import HistoryFacts
from twotower.retrieval.event import Event, last_of_each
from twotower.retrieval.event_types import EventTypes
from twotower.retrieval.request import Request, RequestRows

UNTOLD = -1
"""Time of an event that a request does not tell."""


class _Past(NamedTuple):
    """Interactions (n,), oldest first: item rows, codes of the items, types and times, which may be empty if no rule reads
    them."""

    items: Codes | Ints
    codes: Codes
    types: Codes
    times: Ints

    def where(self, kept: Bools) -> _Past:
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
    """(n,) time of each interaction in microseconds since 1970, if the log has times."""

    def read(self, request: Request, rows: RequestRows) -> tuple[Codes, list[str]]:
        """Return the codes (n,), oldest first, and the ids of items that are not in the bundle. Raises DataError for an unknown
        type of events."""
        unknown: list[str] = []
        if request.history is not None:
            history = self.event_types.read(request.history)
            past, unknown = self._events(last_of_each(history) if self.last_only else history, rows)
        else:
            past = self._stored(rows.user)
        if request.events:
            events = self.event_types.read(request.events)
            if self.last_only:
                known = [row for event in events if (row := rows.items[event.item]) >= 0]
                past = past.where(~np.isin(past.items, known))
                events = last_of_each(events)
            more, unknown_events = self._events(events, rows)
            past, unknown = past.followed_by(more), unknown + unknown_events
        return self._coded(past), unknown

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
        if self.history.codes is not None and self.interaction_times is not None:
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
        if self.history.codes is not None and self.interaction_times is not None:
            told = [UNTOLD if event.time is None else round(event.time * MICROSECONDS) for event in kept]
            times = np.array(told, np.int64)
        return _Past(items, self.item_codes[items], types, times), unknown
