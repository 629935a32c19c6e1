"""Pairs of users and items, with fast membership."""

from __future__ import annotations

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import is_in_sorted, pair_keys
from twotower.arrays.types import Bools, Ints

MAX_CACHED_PAIRS = 2**26
"""Pairs whose sorted keys are held (512 MiB), by default; beyond them, the keys of the users of a call are made for it."""


class PairSet:
    """A set of (user, item) pairs that finds many pairs at once by one binary search."""

    def __init__(self, items: Ragged, n_items: int, max_cached_pairs: int = MAX_CACHED_PAIRS) -> None:
        """Take the `items` of each user, distinct and rising, out of `n_items`."""
        self.items, self.n_items = items, n_items
        self._cached = self._keys(np.arange(len(items))) if len(items.values) <= max_cached_pairs else None

    def _keys(self, users: Ints) -> Ints:
        """Return one rising number for each pair of distinct rising users."""
        rows = self.items.take(users)
        return pair_keys(np.repeat(users, rows.lengths), rows.values, self.n_items)

    def contains(self, users: Ints, items: Ints) -> Bools:
        """Return a flag for each pair (n, …) of broadcast users and items; False for an item of -1."""
        keys = self._keys(np.unique(users)) if self._cached is None else self._cached
        return is_in_sorted(keys, pair_keys(users, items, self.n_items))
