"""Disliked training interactions of the user as per-positive negatives."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.splits import TRAIN
from twotower.errors import ConfigError
from twotower.train.negatives.source import PerPositiveSampler, PerPositiveSource, Positives


class DislikedNegatives(PerPositiveSource):
    """Training interactions of the user that are no positives, for each positive.

    Use it if dislikes are observed.
    """

    kind = "disliked"

    n: int = Field(1, ge=1, le=100_000, description="Number of interactions per positive.")

    def check(self, dataset: Dataset) -> None:
        if dataset.train.labels.all():
            of = " of a weight above 0" if dataset.pairs.weighted else ""
            raise ConfigError(
                "negatives.disliked draws interactions that the user did not like, and every training "
                f"interaction{of} is a positive; drop it, or name a label and schema.positive_above"
            )

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> PerPositiveSampler:
        return DislikedSampler(dataset, self.n, seed)


class DislikedSampler(PerPositiveSampler):
    """Draws from the observed dislikes of a user."""

    gives_interactions = True

    def __init__(self, dataset: Dataset, n: int, seed: int) -> None:
        self._n = n
        order = np.random.default_rng(seed).permutation(dataset.negative_indices)
        # Indices of each user's dislikes in a random order, and the place in time of every interaction.
        self._disliked = Ragged.from_pairs(dataset.pairs.user[order], order, len(dataset.users))
        self._place_in_time: Ints | None = None  # None: a user's interactions are in the order of time
        if not dataset.grouped_by_user:
            in_order = dataset.sort_by_time(dataset.parts == TRAIN)
            self._place_in_time = np.zeros(len(dataset.parts), np.int64)
            self._place_in_time[in_order] = np.arange(len(in_order))

    def draw(self, positives: Positives, rng: np.random.Generator) -> Shaped[Ints, "B n"]:
        """Draw indices of interactions; -1 if a user has fewer.

        With `positives.later` only interactions after the positive are drawn, as a causal history holds earlier ones.
        """
        drawn = self._disliked.draw_neighbours(positives.user, self._n, rng)
        if positives.later:
            place, rows = self._place_in_time, positives.interactions
            when, after = (drawn, rows) if place is None else (place[drawn], place[rows])
            drawn[when < after[:, None]] = -1
        return drawn
