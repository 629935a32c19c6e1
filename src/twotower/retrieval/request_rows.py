"""Rows of the user and of the items that a request names."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from twotower.arrays.types import Ints
from twotower.data.ids import IdColumn
from twotower.retrieval.request import Request


class RequestRows(NamedTuple):
    """Row of a request's user, None for an unknown one, and of each item in history and events, -1 for unknown ones."""

    user: int | None
    items: dict[str, int]

    @classmethod
    def of(cls, request: Request, users: IdColumn, items: IdColumn) -> RequestRows:
        """Look up the ids of a request."""
        named = [i for i, _ in (*(request.history or ()), *request.events)]
        user = None if request.user_id is None else users.row(request.user_id)
        return cls(user, dict(zip(named, items.rows([str(i) for i in named]), strict=True)))

    @property
    def known_items(self) -> Ints:
        """Rows of the items in the bundle."""
        return np.array([row for row in self.items.values() if row >= 0], np.int64)
