"""Measured quantities, from which metrics are computed: scored pairs and rankings of a part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from twotower.arrays.pieces import selected
from twotower.arrays.types import Bools, Ints, Numbers, Shaped, WholeNumbers


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of a part: scores, labels and users. Arrays of many pairs are mapped from a disk: a metric that reads them in
    pieces (`twotower.arrays.pieces`) takes no memory that grows with the pairs."""

    scores: Shaped[Numbers, "n"]
    positive: Shaped[Bools, "n"]
    users: Shaped[WholeNumbers, "n"]

    def where(self, keep: Shaped[Bools, "n"]) -> ScoredPairs:
        """Return some of the pairs."""
        return ScoredPairs(selected(self.scores, keep), selected(self.positive, keep), selected(self.users, keep))


@dataclass(frozen=True)
class RankedItems:
    """Items that are ranked."""

    popularity: Shaped[Ints, "I"]
    """Number of training interactions of each item."""

    @property
    def n_items(self) -> int:
        return len(self.popularity)


@dataclass(frozen=True)
class Rankings:
    """Rankings of Q users with something to find: their best K items."""

    best: Shaped[Ints, "Q K"]
    """Item rows in rank order; -1 after the last item that may be ranked."""
    hit: Shaped[Bools, "Q K"]
    """True where an item is a target of its user."""
    n_targets: Shaped[Ints, "Q"]
    items: RankedItems

    def at(self, k: int) -> Rankings:
        """Return the first `k` ranks."""
        return replace(self, best=self.best[:, :k], hit=self.hit[:, :k])

    def with_targets(self, rows: Shaped[Bools, "I"], n_targets: Shaped[Ints, "Q"]) -> Rankings:
        """Return the rankings of users with a target among some items, a mask of rows, as if these were the only targets:
        `n_targets` of each user."""
        defined = n_targets > 0
        best = self.best[defined]
        return replace(self, best=best, hit=self.hit[defined] & rows[best], n_targets=n_targets[defined])
