"""Recent popularity: how often each item is taken in the latest rows of a log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from twotower.arrays.pieces import pieces
from twotower.arrays.types import Codes, Doubles, Floats, Ints, Shaped

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset

READ_HALF_LIVES = 40
"""Half-lives of rows that are read; one that is older counts less than 1e-12."""
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
        found = np.empty((len(places), self.n_items), np.float32)
        for row, counted in zip(found, self._counts(places, half_life), strict=True):
            np.log1p(counted, out=row, casting="same_kind")
        return found[which]

    def of_pairs(
        self, times: Shaped[Ints, "n"], items: Shaped[Codes | Ints, "n"], half_life: float
    ) -> Shaped[Floats, "n"]:
        """Return log(1 + n) of one item at each time."""
        places, (keys, by_item) = self._places(times), self._by_item
        last = np.searchsorted(keys, items.astype(np.int64) * (len(keys) + 1) + places) - 1
        found, known = np.zeros(len(times)), last >= 0
        known[known] = self.items[by_item[last[known]]] == items[known]
        last = last[known]
        found[known] = self._after_each(half_life)[last] * np.exp2((by_item[last] + 1 - places[known]) / half_life)
        return np.log1p(found).astype(np.float32)

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
        scores: Floats = self.scores(self._end, terms)[0]
        return scores

    @property
    def _end(self) -> Shaped[Ints, "1"]:
        """A time after all positives."""
        return np.array([int(self.times[-1]) + 1 if len(self.times) else 0])

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

    def _counts(self, places: Shaped[Ints, "T"], half_life: float) -> Iterator[Shaped[Doubles, "I"]]:
        """Yield the counts by the first rows, of some rising numbers of rows; each is overwritten by the next."""
        counts, most = np.zeros(self.n_items), math.ceil(READ_HALF_LIVES * half_life)
        done = 0
        for place in places.tolist():
            first = max(done, place - most)
            counts *= 0.5 ** ((place - done) / half_life) if first == done else 0.0
            for some in pieces(place - first):
                rows = slice(first + some.start, first + some.stop)
                value = np.exp2((np.arange(rows.start, rows.stop) + (1.0 - place)) / half_life)
                counts += np.bincount(self.items[rows], value * self.weights[rows], self.n_items)
            done = place
            yield counts

    @cached_property
    def _by_item(self) -> tuple[Shaped[Ints, "N"], Shaped[Ints, "N"]]:
        """The rows by item, oldest first, and item * (N + 1) + row of each, which rises."""
        order = np.argsort(self.items, kind="stable")
        return self.items[order].astype(np.int64) * (len(order) + 1) + order, order

    def _after_each(self, half_life: float) -> Shaped[Doubles, "N"]:
        """Return the count of the item of each row by `_by_item` at that row, which counts 1.

        Rows of an item are summed in blocks of READ_HALF_LIVES, in which powers of 2 neither overflow nor lose the
        latest row; of the blocks before one the last alone counts."""
        keys, rows = self._by_item
        block = READ_HALF_LIVES * half_life
        number = np.floor(rows / block)
        grown = np.exp2((rows - number * block) / half_life) * self.weights[rows]
        frame = pl.DataFrame({"item": keys // (len(keys) + 1), "block": number, "grown": grown})
        sums = frame.select(pl.col("grown").cum_sum().over("item", "block"))["grown"].to_numpy()
        own: Doubles = sums * np.exp2((number * block - rows) / half_life)
        item = frame["item"].to_numpy()
        begins = np.flatnonzero(np.r_[True, (item[1:] != item[:-1]) | (number[1:] != number[:-1])][: len(rows)])
        before = np.repeat(begins, np.diff(np.append(begins, len(rows)))) - 1  # the last row of the block before
        follows = (item[before] == item) & (
            number[before] == number - 1
        )  # a first one, whose place is -1, follows none
        earlier = before[follows]
        own[follows] += own[earlier] * np.exp2((rows[earlier] - rows[follows]) / half_life)
        return own
