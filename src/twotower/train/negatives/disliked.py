"""Training interactions that the user did not like, as per-positive negatives."""

from __future__ import annotations

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Codes, Ints
from twotower.data.dataset import Dataset
from twotower.data.splits import TRAIN


class DislikedNegatives:
    """Draws from the observed dislikes of a user: the training interactions that are no positives."""

    def __init__(self, dataset: Dataset, n: int, seed: int) -> None:
        """Prepare draws of `n` interactions for each positive."""
        self._n, self._item_of = n, dataset.pairs.item
        disliked = np.flatnonzero((dataset.parts == TRAIN) & ~dataset.pairs.positive)
        order = np.random.default_rng(seed).permutation(disliked)
        # Row numbers of each user's dislikes, in a random order; and the place in time of every interaction.
        self._disliked = Ragged.from_pairs(dataset.pairs.user[order], order, len(dataset.users))
        self._place_in_time: Ints | None = None  # None: a user's row numbers rise in time
        if not dataset.grouped_by_user:
            in_order = dataset.sort_by_time(dataset.parts == TRAIN)
            self._place_in_time = np.zeros(len(dataset.parts), np.int64)
            self._place_in_time[in_order] = np.arange(len(in_order))

    def draw(self, user: Codes, source: Ints | None, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Draw item rows (B, n) and the row numbers (B, n) of their interactions; -1 where a user has fewer.

        With `source` (B,), the row numbers of the positives, only interactions after the positive's, as a causal history
        holds the earlier ones.
        """
        drawn = self._disliked.draw_neighbours(user, self._n, rng)
        if source is not None:
            place = self._place_in_time
            when, positive_when = (drawn, source) if place is None else (place[drawn], place[source])
            drawn[when < positive_when[:, None]] = -1
        return np.where(drawn >= 0, self._item_of[drawn], -1).astype(np.int64), drawn
