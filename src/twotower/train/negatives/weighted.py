"""Draws of items by weights."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Codes, Doubles, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.train.negatives.source import SharedSampler


def positive_shares(dataset: Dataset) -> Shaped[Doubles, "items"]:
    """Return the share of each item in the training positives, by their weights."""
    counts = dataset.item_positive_counts.astype(np.float64)
    shares: Doubles = counts / counts.sum()
    return shares


class WeightedItems(SharedSampler):
    """Draws n items for each batch, item i with probability w_i / sum_j w_j."""

    def __init__(self, weights: Shaped[Doubles, "items"], n: int) -> None:
        """Take the weights of all items, none below 0 and one above."""
        self._n = n
        self._share = weights / weights.sum()
        self._cumulative = np.cumsum(self._share)

    def draw(self, item: Shaped[Codes, "B"], rng: np.random.Generator) -> Shaped[Ints, "n"]:
        drawn = np.searchsorted(self._cumulative, rng.random(self._n), side="right")
        items: Ints = np.minimum(drawn, len(self._share) - 1)
        return items

    def expected(self, items: Shaped[Ints, "n"], positives: float) -> Shaped[Doubles, "n"]:
        expected: Doubles = self._n * self._share[items]
        return expected
