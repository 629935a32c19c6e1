"""Codes of a user's sequence for one request: the stored or given history, extended by events."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Codes, Ints
from twotower.features.feature import HistorySpec
from twotower.retrieval.request import Event, Request, RequestRows


@dataclass(frozen=True)
class HistoryCodes:
    """Reads the codes of one history of the users."""

    history: HistorySpec
    stored: Ragged
    """Codes of each user row, whose sources are interactions."""
    interaction_items: Codes
    """(n,) item row of each interaction."""
    item_codes: Codes
    """(items,) code of each item row."""
    last_only: bool
    """True if only the last interaction of a user with an item counts, as in training."""

    def read(self, request: Request, rows: RequestRows) -> tuple[Codes, list[str]]:
        """Return the codes (n,), oldest first, and the ids of items that are not in the bundle."""
        unknown: list[str] = []
        items: Codes | Ints
        if request.history is not None:
            items, unknown = self._events(request.history, rows)
            codes = self.item_codes[items]
        else:
            codes, items = self._stored(rows.user)
        if request.events:
            events = request.events
            if self.last_only:
                known = [row for item, _ in events if (row := rows.items[item]) >= 0]
                codes = codes[~np.isin(items, known)]
                last: dict[str, bool] = {}
                for item, liked in events:
                    last.pop(item, None)
                    last[item] = liked
                events = list(last.items())
            more, unknown_events = self._events(events, rows)
            codes, unknown = np.concatenate([codes, self.item_codes[more]]), unknown + unknown_events
        return codes[-self.history.max_length :], unknown  # 0: all

    def _stored(self, user: int | None) -> tuple[Codes, Codes | Ints]:
        """Return the codes and the item rows of the interactions of a user's stored history."""
        if user is None:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        part = slice(*self.stored.offsets[user : user + 2])
        assert self.stored.source is not None, "a stored history names its interactions"
        return self.stored.values[part], self.interaction_items[self.stored.source[part]]

    def _events(self, events: abc.Sequence[Event], rows: RequestRows) -> tuple[Ints, list[str]]:
        """Return the item rows of those events that belong to the history, and the ids of unknown items."""
        kept, unknown, row_of_item = [], [], rows.items
        for item, liked in events:
            row = row_of_item[item]
            if row < 0:
                unknown.append(item)
            elif self.history.holds(liked):
                kept.append(row)
        return np.array(kept, np.int64), unknown
