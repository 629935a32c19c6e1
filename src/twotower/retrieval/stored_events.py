"""Recent events of users that a bundle's histories already contain: a bundle made while a service runs has them in its
log."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import product

import numpy as np

from twotower.arrays.types import Ints, UserRow
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, TRAIN
from twotower.data.times import MICROSECONDS
from twotower.retrieval.event import Event

CLOCK_TOLERANCE = 60 * MICROSECONDS
"""Microseconds by which two times of an event may differ: a service gives an event without a time the time of its
call."""
COARSEST_TIMES = 86_400 * MICROSECONDS
"""Largest unit of a log's times: days."""
SAMPLED_TIMES = 4_096
"""Times of the log, evenly spaced, whose greatest common divisor is their unit."""
_Stored = tuple[int, bool]
"""Time of an interaction in microseconds, and True if it was liked."""


class StoredEvents:
    """Finds the events of a user that are not in the stored histories."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.has_times = dataset.times is not None and dataset.schema.time_unit != "order"
        """True if the log has times of interactions."""

    @cached_property
    def unit(self) -> int:
        """Unit of the log's times in microseconds; for a log of dates, a day."""
        times = self._dataset.times
        assert times is not None
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
        assert data.times is not None
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
    return rows if dataset.times is None else rows[np.argsort(dataset.times[rows], kind="stable")]


def _time(event: Event) -> int:
    """Return the time of an event in microseconds."""
    assert event.time is not None
    return round(event.time * MICROSECONDS)
