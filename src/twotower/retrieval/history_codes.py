"""Codes of a user's sequence for one request: the stored or given history, extended by events."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Codes
from twotower.features.feature import HistorySpec
from twotower.features.values import UNKNOWN
from twotower.retrieval.request import Event, Request, RequestRows


@dataclass(frozen=True)
class HistoryCodes:
    """Reads the codes of one history of the users."""

    history: HistorySpec
    stored: Ragged
    """Codes of each user row."""
    item_codes: Codes
    """(items,) code of each item row."""
    last_only: bool
    """True if only the last interaction of a user with an item counts, as in training."""

    def read(self, request: Request, rows: RequestRows) -> tuple[Codes, list[str]]:
        """Return the codes (n,), oldest first, and the ids of items that are not in the bundle."""
        unknown: list[str] = []
        if request.history is not None:
            codes, unknown = self._events(request.history, rows)
        else:
            codes = np.zeros(0, np.int32) if rows.user is None else self.stored.row(rows.user)
        if request.events:
            events = request.events
            if self.last_only:
                codes = codes[~np.isin(codes, self._known_codes(events, rows))]
                last: dict[str, bool] = {}
                for item, liked in events:
                    last.pop(item, None)
                    last[item] = liked
                events = list(last.items())
            more, unknown_events = self._events(events, rows)
            codes, unknown = np.concatenate([codes, more]), unknown + unknown_events
        return codes[-self.history.max_length :], unknown  # 0: all

    def _events(self, events: abc.Sequence[Event], rows: RequestRows) -> tuple[Codes, list[str]]:
        """Return the codes of those events that belong to the history, and the ids of unknown items."""
        kept, unknown, row_of_item = [], [], rows.items
        for item, liked in events:
            row = row_of_item[item]
            if row < 0:
                unknown.append(item)
            elif self.history.holds(liked):
                kept.append(row)
        return self.item_codes[np.array(kept, np.int64)], unknown

    def _known_codes(self, events: abc.Sequence[Event], rows: RequestRows) -> Codes:
        """Return the codes of the items of events, liked or not, without the code of unknown items."""
        codes = self.item_codes[np.array([row for item, _ in events if (row := rows.items[item]) >= 0], np.int64)]
        known: Codes = codes[codes != UNKNOWN]
        return known
