"""Scores that recent popularity adds to all items, by the time of the ranking."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Bools, Codes, Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.recent_popularity import PopularityTerms, RecentPopularity
from twotower.evaluation.moments import asked_times


@dataclass(frozen=True)
class RecentScores:
    """A score for each item and time, added to the products of vectors: that of the recent popularity before the time,
    less what the vectors of the items have of it already."""

    popularity: RecentPopularity
    terms: PopularityTerms
    held: Shaped[Floats, "I"]
    """Recent popularity that the vectors of the items have."""
    asked: Shaped[Ints, "U"]
    """Time of the ranking of each user."""
    times: Shaped[Ints, "n"]
    """Time of each interaction, of which one may give the time of a ranking."""
    cold: Shaped[Floats, "I"] | None = None
    """Bias that the vectors have of items of an unknown id, which ends with an item's first row: from there on it has a
    popularity. None: of no item."""
    rows: Shaped[Ints, "i"] | None = None
    """Item rows that are ranked, in this order; None: all."""

    @classmethod
    def of_part(cls, dataset: Dataset, part: int, terms: PopularityTerms, held: Shaped[Floats, "I"]) -> RecentScores:
        """Return the scores of a part: of the positives of the parts before it, for each user before its first pair of
        the part."""
        assert dataset.times is not None
        known = RecentPopularity.before(dataset, part)
        return cls(known, terms, held, asked_times(dataset, part), dataset.times)

    def added_to(
        self, scores: Float[Tensor, "B I"], users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        """Add the scores of all items to those of some user rows, in place; with `interactions` at the times of
        these."""
        times = self.asked[users] if interactions is None else self.times[interactions]
        distinct, which = np.unique(times, return_inverse=True)
        added = torch.from_numpy(self._at(distinct)).to(scores.device, scores.dtype)
        return scores.add_(added[torch.from_numpy(which).to(scores.device)])

    def of_pairs(
        self, users: Shaped[Codes, "n"], items: Shaped[Codes, "n"], interactions: Shaped[Ints, "n"] | None = None
    ) -> Shaped[Floats, "n"]:
        """Return the scores of pairs of user and item rows, at the time of the ranking of the user, with `interactions`
        at the times of these."""
        times = self.asked[users] if interactions is None else self.times[interactions]
        rows = items if self.rows is None else self.rows[items]
        found = self.popularity.scores_of_pairs(times, rows, self.terms) - self.held[rows]
        return found if self.cold is None else found - self.cold[rows] * self.popularity.pairs_have_rows(times, rows)

    def take(self, users: Shaped[Ints, "u"], items: Shaped[Ints, "i"] | None = None) -> RecentScores:
        """Return the scores of some user rows, and of some item rows in their order, None for all."""
        rows = self.rows
        if items is not None:
            rows = items if rows is None else rows[items]
        return replace(self, asked=self.asked[users], rows=rows)

    def without(self, items: Shaped[Bools, "I"], held_by_each: float) -> RecentScores:
        """Return the scores with those of an item without a row for the items of a mask, of which the vectors hold so
        much."""
        known, held = self.popularity, np.where(items, np.float32(held_by_each), self.held)
        weights = np.ones(len(known.items), np.float32) if known.weights is None else known.weights
        left = np.where(items[known.items], np.float32(0), weights)
        return replace(self, popularity=replace(known, weights=left), held=held)

    def _at(self, times: Shaped[Ints, "T"]) -> Shaped[Floats, "T i"]:
        """Return the scores of all items at some times."""
        found = self.popularity.scores(times, self.terms)
        found -= self.held
        if self.cold is not None:
            found -= self.cold * self.popularity.have_rows(times)
        return found if self.rows is None else found[:, self.rows]
