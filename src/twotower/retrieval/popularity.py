"""The most popular items: the answer for a user of whom nothing is known."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Floats, Ints, Numbers
from twotower.index.top_k import kth_largest


class Popularity:
    """Items in descending order of what is popular now, if that is known, then of their training positives, by weight; equal ones are
    ordered by row."""

    def __init__(self, positives: Numbers, recent: Floats | None = None) -> None:
        """Order the items by their recent popularity (n,), and by their numbers, or weights, of positives (n,)."""
        self.rows: Ints = np.lexsort([-positives] if recent is None else [-positives, -recent])
        """Item rows (n,), the most popular first."""
        self._rank = np.empty_like(self.rows)
        self._rank[self.rows] = np.arange(len(self.rows))

    def top(self, k: int, excluded: Ints, allowed: Ints | None) -> tuple[Ints, Floats]:
        """Return the `k` most popular of the `allowed` rows without `excluded` ones, and scores of 0."""
        # Only as many rows as may be needed are compared with `excluded`: the catalogue may be large.
        n = k + len(excluded)
        if allowed is None:
            rows = self.rows[:n]
        else:
            rank = self._rank[allowed]
            rows = self.rows[np.sort(rank[-rank >= kth_largest(-rank, n)])]
        rows = rows[~np.isin(rows, excluded)][:k]
        return rows, np.zeros(len(rows), np.float32)
