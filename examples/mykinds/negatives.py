"""A source of negatives of one's own: what is popular lately. In Python `NegativesConfig(sources=(Recent(n=500),))`, in
TOML

[negatives]
in_batch = true

[negatives."mykinds.negatives:Recent"]
n = 500
share = 0.1

A shared source builds a sampler: items drawn for a batch, and the expected number of draws of an item, which the log-q
correction adds to that of the other sources. `WeightedItems` has both for any weights of the items.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from twotower.data.dataset import Dataset
from twotower.errors import ConfigError
from twotower.train.negatives.source import SharedSampler, SharedSource, WeightedItems


class Recent(SharedSource):
    """Items drawn by their number of positives in the latest part of the training, as shared candidates.

    Use it where the catalogue turns over, such as news: an item that nobody reads any more is no hard negative. Item i,
    with n_i of the N latest positives, is expected n n_i / N times.
    """

    certain = True
    beyond_batch = True

    n: int = Field(1000, ge=1, le=10_000_000, description="Number of items drawn for each batch.")
    share: float = Field(0.1, gt=0, le=1, description="Share of the training positives that is the latest part.")

    def check(self, dataset: Dataset) -> None:
        """Refuse interactions without a time."""
        if not dataset.schema.time:
            raise ConfigError(f"negatives.{self.kind} needs a time; name its column in schema.time")

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> SharedSampler:
        """Return draws by the number of the latest positives."""
        rows = dataset.positive_indices
        times = dataset.times[rows]
        latest = rows[times >= np.quantile(times, 1 - self.share)]
        counts = np.bincount(dataset.pairs.item[latest], minlength=len(dataset.items))
        return WeightedItems(counts.astype(np.float64), self.n)
