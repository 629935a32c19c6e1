"""A request as a bundle reads it, resolved once: ids to rows, and events to codes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from twotower.arrays.types import Ints, ItemId, UserId, UserRow
from twotower.data.dataset import Dataset
from twotower.data.ids import ItemIds, UserIds
from twotower.data.reading.times import MICROSECONDS
from twotower.retrieval.event import NO_TIME, Event, EventTypes, ReadEvent, StoredEvents, in_time_order, last_of_each
from twotower.retrieval.request import Request, Source


class Query(NamedTuple):
    """A request as a bundle reads it: rows of its ids, and its events without those that the schema ignores."""

    request: Request
    user: UserRow | None = None
    """None: no user id, or an unknown one."""
    history: Sequence[ReadEvent] | None = None
    """Events in place of the stored history, oldest first."""
    added: Sequence[ReadEvent] = ()
    """Recent events that the stored history lacks, and the events of the request, oldest first."""
    n_recent: int = 0
    """Number of recent events that the stored history lacks."""

    @property
    def events(self) -> list[ReadEvent]:
        """All events, oldest first."""
        return [*(self.history or ()), *self.added]

    @property
    def has_details(self) -> bool:
        """True if the query has more than a user id."""
        return bool(self.request.features or self.request.context or self.added) or self.history is not None

    @property
    def source(self) -> Source:
        """Source of the answer."""
        if self.user is not None:
            return "model"
        return "cold_start" if self.has_details else "popular"

    @property
    def known_items(self) -> Ints:
        """Rows of the items in the bundle."""
        return np.array([event.row for event in self.events if event.row >= 0], np.int64)

    @property
    def unknown_items(self) -> list[str]:
        """Distinct ids of the items outside the bundle."""
        return list(dict.fromkeys(event.item for event in self.events if event.row < 0))


class QueryReader:
    """Reads requests as queries."""

    def __init__(self, dataset: Dataset, users: UserIds, items: ItemIds) -> None:
        self.event_types, self._stored_events = EventTypes(dataset.schema), StoredEvents(dataset)
        self._users, self._items, self._last_only = users, items, dataset.schema.duplicates == "last"

    def read(self, request: Request, recent: Sequence[Event] = ()) -> Query:
        """Return the query of a request and of the recent events of its user, as `Retriever.query` does."""
        user = None if request.user_id is None else self._users.row(UserId(request.user_id))
        history = None if request.history is None else len(request.history)
        given = [*recent, *(request.history or ()), *request.events]
        if not given:
            return Query(request, user, None if history is None else ())
        read = self.event_types.read(given, stored=len(recent))
        rows = iter(self._items.rows([ItemId(event.item) for event in read if event is not None]))
        code = self.event_types.code
        events = [
            event and ReadEvent(
                event.item, next(rows), event.liked, code(event),
                NO_TIME if event.time is None else round(event.time * MICROSECONDS), place < len(recent),
            )
            for place, event in enumerate(read)
        ]  # fmt: skip
        before, of_history, after = (
            [event for event in events[start:stop] if event is not None]
            for start, stop in pairwise((0, len(recent), len(recent) + (history or 0), len(events)))
        )
        if user is not None and history is None and before:
            before = self._stored_events.missing(user, before)
        n_recent, of_history, added = len(before), in_time_order(of_history), in_time_order([*before, *after])
        if self._last_only:
            of_history, added = last_of_each(of_history), last_of_each(added)
        return Query(request, user, None if history is None else of_history, added, n_recent)
