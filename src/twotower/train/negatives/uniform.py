"""Items drawn uniformly from the catalogue."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from twotower.arrays.types import Codes, Doubles, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.train.negatives.source import SharedSampler, SharedSource


class UniformNegatives(SharedSource):
    """Items drawn uniformly from the catalogue for each batch, as shared candidates.

    Use it beside `in_batch`, so that unpopular items are trained too (mixed negative sampling, Yang et al.
    2020). An item is expected n / items times.
    """

    kind = "uniform"
    certain = True
    beyond_batch = True

    n: int = Field(1000, ge=1, le=10_000_000, description="Number of items drawn for each batch.")

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> SharedSampler:
        return _UniformItems(self.n, len(dataset.items))


class _UniformItems(SharedSampler):
    def __init__(self, n: int, n_items: int) -> None:
        self._n, self._n_items = n, n_items

    def draw(self, item: Shaped[Codes, "B"], rng: np.random.Generator) -> Shaped[Ints, "n"]:
        return rng.integers(0, self._n_items, self._n)

    def expected(self, items: Shaped[Ints, "n"], positives: float) -> Shaped[Doubles, "n"]:
        return np.full(len(items), self._n / self._n_items)
