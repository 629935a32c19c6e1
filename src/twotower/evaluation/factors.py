"""Vectors of users and items whose product is the score of a pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.pieces import temporary_array
from twotower.arrays.types import Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs


class CatalogueScorer(ABC):
    """Scores of all items for a user."""

    @abstractmethod
    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        """Return the scores of all items for some user rows, of a model that reads the context in that of some interactions."""


class Scorer(CatalogueScorer):
    """Scores of pairs as products of vectors of users and items."""

    @abstractmethod
    def part_scores(self, dataset: Dataset, part: int) -> Shaped[Floats, "n"]:
        """Return the scores of the pairs of a part, as a temporary array."""


@dataclass(frozen=True)
class Factors(Scorer):
    """Vectors of a model or baseline: the score of a pair (u, i) is users[u] . items[i]."""

    users: Float[Tensor, "U D"]
    items: Float[Tensor, "I D"]

    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        return self.users[torch.from_numpy(users).to(self.items.device)] @ self.items.T

    def part_scores(self, dataset: Dataset, part: int) -> Shaped[Floats, "n"]:
        return self.scores(dataset.pairs_of(part))

    def scores(self, pairs: Pairs, block: int = 16_384) -> Shaped[Floats, "n"]:
        """Return the scores of the pairs, `block` pairs at a time, as a temporary array."""
        out: Floats = temporary_array(len(pairs), np.float32)
        # Two small buffers are reused: allocating memory for all rows costs ten times the products.
        user_rows, item_rows = self.users.new_empty(2, min(block, len(pairs)), self.users.shape[1])
        for start in range(0, len(pairs), block):
            part = slice(start, start + block)
            user, item = (torch.from_numpy(x[part]).to(self.users.device) for x in (pairs.user, pairs.item))
            u = torch.index_select(self.users, 0, user, out=user_rows[: len(user)])
            v = torch.index_select(self.items, 0, item, out=item_rows[: len(item)])
            out[part] = u.mul_(v).sum(1).cpu().numpy()
        return out
