"""Items of the catalogue that the user has not seen, drawn in this one place: as pairs, and as per-positive negatives."""

from __future__ import annotations

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import MAX_CACHED_PAIRS
from twotower.arrays.types import Codes, Ints


class RandomNegatives:
    """Uniform draws from the items that a user has not seen, exact and without rejection.

    The r-th unseen item of a user is r plus the number of seen items before it; with the seen ones p_0 < p_1 < … that is
    r + #{j : p_j - j <= r}, one binary search for all draws together.
    """

    def __init__(self, seen_items: Ragged, n_items: int, max_cached_pairs: int = MAX_CACHED_PAIRS) -> None:
        """Take the `seen_items` of each user, distinct and rising, out of `n_items`; they are never drawn."""
        self._seen, self._n_items = seen_items, n_items
        self.unseen_counts = n_items - seen_items.lengths
        """(n_users,) number of items that the user has not seen."""
        self._cached = self._keys(np.arange(len(seen_items))) if len(seen_items.values) <= max_cached_pairs else None

    def _keys(self, users: Ints) -> tuple[Ints, Ints]:
        """Return rising keys of distinct rising users, and the place where each user's keys begin."""
        seen = self._seen.take(users)
        rank = np.arange(len(seen.values)) - np.repeat(seen.offsets[:-1], seen.lengths)
        return np.repeat(users, seen.lengths) * (self._n_items + 1) + seen.values - rank, seen.offsets

    def draw(self, users: Ints, rng: np.random.Generator) -> Codes:
        """Draw one item row for each of `users` (n,), best sorted, each with at least one unseen item."""
        return self._unseen_item(users, (rng.random(len(users)) * self.unseen_counts[users]).astype(np.int64))

    def draw_distinct(self, users: Ints, n: int, rng: np.random.Generator) -> Ints:
        """Draw item rows (len(users), n), distinct in each row; -1 where a user has fewer than n unseen items.

        Floyd's sampling without replacement (Bentley and Floyd 1987), with one column for each of its rounds.
        """
        top = self.unseen_counts[users][:, None] - n + np.arange(n)  # of each round; below 0 there is nothing to draw
        ranks = (rng.random((len(users), n)) * (top + 1).clip(min=1)).astype(np.int64)
        for j in range(1, n):
            again = ((ranks[:, :j] == ranks[:, j, None]) & (top[:, :j] >= 0)).any(1)
            ranks[again, j] = top[again, j]
        drawn = self._unseen_item(np.repeat(users, n), ranks.ravel()).reshape(ranks.shape)
        return np.where(top >= 0, drawn, -1).astype(np.int64)

    def _unseen_item(self, users: Ints, r: Ints) -> Codes:
        """Return the `r`-th unseen item (n,) of each of `users` (n,)."""
        if self._cached is not None:
            (keys, first), index = self._cached, users
        else:
            distinct, index = np.unique(users, return_inverse=True)
            keys, first = self._keys(distinct)
        before = np.searchsorted(keys, users * (self._n_items + 1) + r, side="right") - first[index]
        out: Codes = (r + before).astype(np.int32)
        return out
