"""Items drawn uniformly from the catalogue."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from twotower.arrays.types import Codes, Doubles, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.train.negatives.source import SharedSampler, SharedSource, catalogue_rows


class UniformNegatives(SharedSource):
    """Items drawn uniformly from the catalogue for each batch, as shared candidates.

    Use it with `in_batch`, so that unpopular items are trained too (mixed negative sampling, Yang et al. 2020). An item
    is expected n / items times.
    """

    kind = "uniform"
    certain = True
    beyond_batch = True

    n: int = Field(1000, ge=1, le=10_000_000, description="Number of items drawn for each batch.")
    cold: bool = Field(True, description="Items without a training interaction are drawn too.")

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> SharedSampler:
        return _UniformItems(self.n, catalogue_rows(dataset, self.cold))


class _UniformItems(SharedSampler):
    def __init__(self, n: int, items: Shaped[Ints, "I"]) -> None:
        self._n, self._items = n, items

    def draw(self, item: Shaped[Codes, "B"], rng: np.random.Generator) -> Shaped[Ints, "n"]:
        return self._items[rng.integers(0, len(self._items), self._n)]

    def expected(self, items: Shaped[Ints, "n"], positives: float) -> Shaped[Doubles, "n"]:
        return np.full(len(items), self._n / len(self._items))
