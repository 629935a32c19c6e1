"""Recent popularity: how often each item is taken in the latest rows of a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from twotower.arrays.types import Codes, Doubles, Floats, Ints, Shaped

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset

ALL_ALIKE = 1e18
"""Half-life by which all rows count alike."""


class PopularityTerms(NamedTuple):
    """Weights by which what a log knows of an item before a time makes a score."""

    half_life: float
    recent: float
    """Of log(1 + n), n the count of the item by the half-life."""
    total: float = 0.0
    """Of log(1 + n), n the count of the item by all rows alike."""
    age: float = 0.0
    """Of log(1 + n), n the number of rows since the item's first."""
    new: float = 0.0
    """Of log(1 + n), n the number of all rows, of an item without one, which has neither count nor age."""


@dataclass(frozen=True)
class RecentPopularity:
    """The N positives of a log, oldest first. Of those before a time the latest counts 1, and each other half as much
    for each half-life, a number of rows, by which it is older (exponential smoothing; Ji et al. 2020, "A Re-visit of
    the Popularity Baseline in Recommender Systems")."""

    items: Shaped[Codes | Ints, "N"]
    times: Shaped[Ints, "N"]
    weights: Shaped[Floats, "N"]
    """Numbers of rows that each stands for."""
    n_items: int

    @classmethod
    def before(cls, dataset: Dataset, part: int) -> RecentPopularity:
        """Return the positives before a part, of a dataset with times."""
        rows = dataset.sort_by_time((dataset.parts < part) & dataset.pairs.target)
        pairs = dataset.pairs.take(rows)
        return cls(pairs.item, dataset.times[rows], pairs.weight, len(dataset.items))

    def at(self, times: Shaped[Ints, "T"], half_life: float) -> Shaped[Floats, "T I"]:
        """Return log(1 + n), n the count of each item by the positives before each time; those at the time itself do
        not count."""
        places, which = np.unique(self._places(times), return_inverse=True)
        found, last, done = np.empty((len(places), self.n_items), np.float32), np.full(self.n_items, -1), 0
        after = self._after_each(half_life)
        for row, place in zip(found, places.tolist(), strict=True):
            last[self.items[done:place]] = np.arange(done, place)
            row[:] = _logarithms(after, last, place, half_life)
            done = place
        return found[which]

    def of_pairs(
        self, times: Shaped[Ints, "n"], items: Shaped[Codes | Ints, "n"], half_life: float
    ) -> Shaped[Floats, "n"]:
        """Return log(1 + n) of one item at each time."""
        places, (keys, by_item) = self._places(times), self._by_item
        at = np.searchsorted(keys, items.astype(np.int64) * (len(keys) + 1) + places) - 1
        last = np.append(by_item, -1)[at]
        last[np.append(self.items, -1)[last] != items] = -1
        return _logarithms(self._after_each(half_life), last, places, half_life)

    def scores(self, times: Shaped[Ints, "T"], terms: PopularityTerms) -> Shaped[Floats, "T I"]:
        """Return the score of each item before each time."""
        places = self._places(times)[:, None]
        return self._scores(places, self._first, lambda half_life: self.at(times, half_life), terms)

    def scores_of_pairs(
        self, times: Shaped[Ints, "n"], items: Shaped[Codes | Ints, "n"], terms: PopularityTerms
    ) -> Shaped[Floats, "n"]:
        """Return the score of one item at each time."""
        places = self._places(times)
        return self._scores(places, self._first[items], lambda half_life: self.of_pairs(times, items, half_life), terms)

    def scores_at_end(self, terms: PopularityTerms) -> Shaped[Floats, "I"]:
        """Return the score of each item after all positives."""
        end = np.array([int(self.times[-1]) + 1 if len(self.times) else 0])
        scores: Floats = self.scores(end, terms)[0]
        return scores

    def _scores(
        self, places: Shaped[Ints, "*_"], first: Shaped[Ints, "*_"], counts: Callable[[float], Floats],
        terms: PopularityTerms
    ) -> Shaped[Floats, "*_"]:  # fmt: skip
        """Return the scores after so many rows, of items by their first row and by log(1 + count) of a half-life."""
        found = np.zeros(np.broadcast_shapes(places.shape, first.shape), np.float32)
        if terms.recent:
            found += np.float32(terms.recent) * counts(terms.half_life)
        if terms.total:
            found += np.float32(terms.total) * counts(ALL_ALIKE)
        if terms.age:
            found += np.float32(terms.age) * np.log1p(np.maximum(places - first, 0), dtype=np.float32)
        if terms.new:
            found = np.where(places > first, found, (terms.new * np.log1p(places)).astype(np.float32))
        return found

    @cached_property
    def _first(self) -> Shaped[Ints, "I"]:
        """The row of the first positive of each item; their number for an item without one. One of the weight 0 is
        none."""
        first, rows = np.full(self.n_items, len(self.items)), np.arange(len(self.items))
        counts = self.weights > 0
        np.minimum.at(first, self.items[counts], rows[counts])
        return first

    def _places(self, times: Shaped[Ints, "n"]) -> Shaped[Ints, "n"]:
        """Return the number of positives before each time."""
        return np.searchsorted(self.times, times, side="left").astype(np.int64)

    @cached_property
    def _by_item(self) -> tuple[Shaped[Ints, "N"], Shaped[Ints, "N"]]:
        """The rows by item, oldest first, and item * (N + 1) + row of each, which rises."""
        order = np.argsort(self.items, kind="stable")
        return self.items[order].astype(np.int64) * (len(order) + 1) + order, order

    def _after_each(self, half_life: float) -> Shaped[Doubles, "_"]:
        """Return the count of the item of each row at that row, which counts 1 itself, and a 0 at the end.

        Each sum of twice as many rows of an item is its own and, decayed, that of the last row before these."""
        _, rows = self._by_item
        item = self.items[rows]
        counts = self.weights[rows].astype(np.float64)
        gap = 1
        while (same := item[gap:] == item[:-gap]).any():
            age = np.maximum(rows[gap:] - rows[:-gap], 0)
            counts[gap:] += counts[:-gap] * same * np.exp2(-age / half_life)
            gap *= 2
        found = np.zeros(len(rows) + 1)
        found[rows] = counts
        return found


def _logarithms(
    after: Shaped[Doubles, "_"], last: Shaped[Ints, "n"], places: Shaped[Ints, "n"] | int, half_life: float
) -> Shaped[Floats, "n"]:
    """Return log(1 + n) after so many rows, n the counts by `_after_each` of items by their last row, -1 for none."""
    counts: Doubles = after[last] * np.exp2((last + 1 - places) / half_life)
    return np.log1p(counts).astype(np.float32)
