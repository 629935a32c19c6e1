"""Positives of the batch as negatives of each other."""

from __future__ import annotations

import numpy as np
import torch

from twotower.arrays.types import Codes, Doubles, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.train.negatives.source import SharedSampler, SharedSource, positive_shares


class InBatchNegatives(SharedSource):
    """Positives of the batch as shared candidates.

    Use it with any contrastive loss: the candidates cost no tower run. Popular items are candidates more often (Yi et
    al. 2019, section 3): an item with n of the N training positives is expected B n / N times in a batch of B.
    """

    kind = "in_batch"
    shorthand = ""
    draws = False
    certain = True

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> SharedSampler:
        return _BatchItems(dataset)


class _BatchItems(SharedSampler):
    draws_positives = True

    def __init__(self, dataset: Dataset) -> None:
        self._share = positive_shares(dataset)

    def draw(self, item: Shaped[Codes, "B"], rng: np.random.Generator) -> Shaped[Ints, "B"]:
        return item.astype(np.int64)

    def expected(self, items: Shaped[Ints, "n"], positives: float) -> Shaped[Doubles, "n"]:
        return self._share[items] * positives
