"""Measured quantities, from which metrics are computed: scored pairs and rankings of a part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from twotower.arrays.types import Bools, Codes, Ints, Numbers, Shaped, WholeNumbers
from twotower.data.pairs import counts


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of a part: scores, labels and users."""

    scores: Shaped[Numbers, "n"]
    positive: Shaped[Bools, "n"]
    users: Shaped[WholeNumbers, "n"]

    def where(self, keep: Shaped[Bools, "n"]) -> ScoredPairs:
        """Return some of the pairs."""
        return ScoredPairs(self.scores[keep], self.positive[keep], self.users[keep])


@dataclass(frozen=True)
class RankedItems:
    """Items that are ranked."""

    n_items: int
    train_items: Shaped[Codes, "n"]
    """Item rows of the training interactions."""

    @cached_property
    def popularity(self) -> Shaped[Ints, "I"]:
        """Number of training interactions of each item."""
        return counts(self.train_items, self.n_items)


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
