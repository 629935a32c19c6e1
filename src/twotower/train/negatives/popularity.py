"""Items drawn by their popularity."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from twotower.data.dataset import Dataset
from twotower.train.negatives.source import SharedSampler, SharedSource, WeightedItems


class PopularityNegatives(SharedSource):
    """Items drawn by popularity^alpha for each batch, as shared candidates.

    With n_i training positives, item i is expected n n_i^alpha / sum_j n_j^alpha times. alpha = 0.75 is that of
    word2vec (Mikolov et al. 2013, "Distributed Representations of Words and Phrases", section 2.2).

    Use it if popular items crowd out all others, so that the model learns to distinguish them.
    """

    kind = "popularity"
    certain = True
    beyond_batch = True

    n: int = Field(1000, ge=1, le=10_000_000, description="Number of items drawn for each batch.")
    alpha: float = Field(
        0.75, ge=0, le=1, description="Exponent of the popularity. 0: uniform. 1: proportional to popularity."
    )

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> SharedSampler:
        counts = dataset.item_positive_counts.astype(np.float64)
        return WeightedItems(np.where(counts > 0, counts**self.alpha, 0.0), self.n)
