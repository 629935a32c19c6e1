"""Vectors of users in the context of an interaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.pieces import pieces, temporary_array
from twotower.arrays.types import Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.evaluation.factors import Scorer
from twotower.evaluation.version_factors import scores_at

BLOCK_PAIRS = 4096
"""Pairs whose users' vectors are computed at a time."""


@dataclass(frozen=True)
class ContextFactors(Scorer):
    """Vectors of all items, and of users in the context, and with the versions, of an interaction."""

    embed: Callable[[Ints, Ints], Tensor]
    """(rows (n,) of the users `by_version`, indices of interactions (n,)) -> vectors (n, D)."""
    items: Float[Tensor, "VI D"]
    """Vectors of the items `by_version`."""
    dataset: Dataset

    def of_users(self, users: Shaped[Ints, "n"], interactions: Shaped[Ints, "n"]) -> Float[Tensor, "n D"]:
        """Return the vectors of some user rows in the context of some interactions."""
        return self.embed(self.dataset.input_rows("user", users, interactions).astype(np.int64), interactions)

    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        assert interactions is not None, "vectors of users need a context"
        scores, times = self.of_users(users, interactions) @ self.items.T, self.dataset.times
        if self.dataset.items.versions is not None:
            assert times is not None
            scores = scores_at(scores, self.dataset.items, times[interactions])
        return self._added(scores, users, interactions)

    def are_finite(self) -> bool:
        user = self.dataset.pairs.user
        some = np.arange(max(0, len(user) - BLOCK_PAIRS), len(user))
        return bool(self.items.isfinite().all() and self.of_users(user[some].astype(np.int64), some).isfinite().all())

    def part_scores(self, dataset: Dataset, part: int) -> Shaped[Floats, "n"]:
        pairs, interactions = dataset.pairs_of(part), dataset.part_indices(part)
        out: Floats = temporary_array(len(pairs), np.float32)
        for some in pieces(len(pairs), BLOCK_PAIRS):
            users = self.of_users(pairs.user[some].astype(np.int64), interactions[some])
            rows = dataset.input_rows("item", pairs.item[some], interactions[some]).astype(np.int64)
            items = self.items[torch.from_numpy(rows).to(users.device)]
            out[some] = (users * items).sum(1).cpu().numpy()
        return self._added_of_pairs(out, pairs, interactions)
