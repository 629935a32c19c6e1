"""Recent popularity: how often each item is taken in the latest rows of a log."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from twotower.arrays.types import Codes, Doubles, Floats, Ints, Shaped

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset

READ_HALF_LIVES = 40
"""Half-lives of rows that are read; one that is older counts less than 1e-12."""


@dataclass(frozen=True)
class RecentPopularity:
    """The N positives of a log, oldest first. Of those before a time the latest counts 1, and each other half as much for each half-life, a number
    of rows, by which it is older (exponential smoothing; Ji et al. 2020, "A Re-visit of the Popularity Baseline in Recommender Systems")."""

    items: Shaped[Codes | Ints, "N"]
    times: Shaped[Ints, "N"]
    weights: Shaped[Floats, "N"] | None
    """Numbers of rows that each stands for; None: 1."""
    n_items: int

    @classmethod
    def before(cls, dataset: Dataset, part: int) -> RecentPopularity:
        """Return the positives before a part, of a dataset with times."""
        assert dataset.times is not None
        rows = dataset.sort_by_time((dataset.parts < part) & dataset.pairs.target)
        weight = dataset.pairs.weight
        weights = None if weight is None else weight[rows]
        return cls(dataset.pairs.item[rows], dataset.times[rows], weights, len(dataset.items))

    def at(self, times: Shaped[Ints, "T"], half_life: float) -> Shaped[Floats, "T I"]:
        """Return log(1 + n), n the count of each item by the positives before each time; those at the time itself do not count."""
        places, which = np.unique(np.searchsorted(self.times, times, side="left"), return_inverse=True)
        found = np.empty((len(places), self.n_items), np.float32)
        for row, counted in zip(found, self._counts(places, half_life), strict=True):
            np.log1p(counted, out=row, casting="same_kind")
        return found[which]

    def at_end(self, half_life: float) -> Shaped[Floats, "I"]:
        """Return log(1 + n) by all positives."""
        counted = next(self._counts(np.array([len(self.items)]), half_life))
        return np.log1p(counted).astype(np.float32)

    def _counts(self, places: Shaped[Ints, "T"], half_life: float) -> Iterator[Shaped[Doubles, "I"]]:
        """Yield the counts by the first rows, of some rising numbers of rows; each is overwritten by the next."""
        counts, most = np.zeros(self.n_items), math.ceil(READ_HALF_LIVES * half_life)
        done = 0
        for place in places.tolist():
            first = max(done, place - most)
            counts *= 0.5 ** ((place - done) / half_life) if first == done else 0.0
            ages = np.arange(place - 1 - first, -1, -1, dtype=np.float64)
            value = np.exp2(ages / -half_life)
            if self.weights is not None:
                value *= self.weights[first:place]
            counts += np.bincount(self.items[first:place], value, self.n_items)
            done = place
            yield counts
