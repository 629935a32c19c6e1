"""The whole catalogue as negatives."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from twotower.arrays.types import Codes, Doubles, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.train.negatives.source import SharedSampler, SharedSource, catalogue_rows


class FullCatalogue(SharedSource):
    """All items of the catalogue as candidates, which makes the softmax exact.

    Use it for up to some 10^5 items. It excludes other sources: `in_batch` has no effect, any other is refused.
    """

    kind = "full"
    shorthand = ""
    certain = True
    beyond_batch = True
    exclusive = True

    cold: bool = Field(
        True,
        description="Items without a training interaction are candidates too. false: training does not push them away "
        "from users.",
    )

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> SharedSampler:
        return _AllItems(catalogue_rows(dataset, self.cold))


class _AllItems(SharedSampler):
    def __init__(self, items: Shaped[Ints, "n"]) -> None:
        self._items = items

    def draw(self, item: Shaped[Codes, "B"], rng: np.random.Generator) -> Shaped[Ints, "n"]:
        return self._items

    def expected(self, items: Shaped[Ints, "n"], positives: float) -> Shaped[Doubles, "n"]:
        return np.ones(len(items))
