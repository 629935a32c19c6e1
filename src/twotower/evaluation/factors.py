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
from twotower.evaluation.added_scores import AddedScores, SparseScores


class CatalogueScorer(ABC):
    """Scores of all items for a user."""

    @abstractmethod
    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        """Return the scores of all items for some user rows, of a model that reads the context in that of some
        interactions."""


@dataclass(frozen=True, kw_only=True)
class Scorer(CatalogueScorer):
    """Scores of pairs as products of vectors of users and items, and what is added to them."""

    added: tuple[AddedScores, ...] = ()

    @property
    def sparse(self) -> SparseScores | None:
        """The added scores of few items of each user; None: there are none."""
        return next((added for added in self.added if isinstance(added, SparseScores)), None)

    @property
    def moves(self) -> bool:
        """True if scores depend on the time of a ranking."""
        return any(added.moves for added in self.added)

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of numbers of an item's vector."""

    @abstractmethod
    def part_scores(self, dataset: Dataset, part: int) -> Shaped[Floats, "n"]:
        """Return the scores of the pairs of a part, as a temporary array."""

    @abstractmethod
    def are_finite(self) -> bool:
        """Return True if all vectors are finite; of vectors that are computed on request, if some are."""

    def _added(
        self, scores: Float[Tensor, "B I"], users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        """Return the products of some user rows and all items, in place, with what is added to them; with
        `interactions` at the times of these."""
        for added in self.added:
            scores = added.added_to(scores, users, interactions)
        return scores

    def _added_of_pairs(
        self, scores: Shaped[Floats, "n"], pairs: Pairs, interactions: Shaped[Ints, "n"] | None = None
    ) -> Shaped[Floats, "n"]:
        """Return the products of pairs, in place, with what is added to them; with `interactions` at the times of
        these."""
        for added in self.added:
            scores += added.of_pairs(pairs.user, pairs.item, interactions)
        return scores


@dataclass(frozen=True)
class Factors(Scorer):
    """Vectors of a model or baseline: the score of a pair (u, i) is users[u] . items[i], and what is added to it."""

    users: Float[Tensor, "U D"]
    items: Float[Tensor, "I D"]

    @property
    def width(self) -> int:
        return self.items.shape[1]

    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        return self._added(self.products(users), users, interactions)

    def products(self, users: Shaped[Ints, "B"]) -> Float[Tensor, "B I"]:
        """Return the products of the vectors of some user rows and all items."""
        return self.users[torch.from_numpy(users).to(self.users.device)] @ self.items.T

    def take(self, users: Shaped[Ints, "u"], items: Shaped[Ints, "i"] | None = None) -> Factors:
        """Return the vectors of some user rows, and of some distinct item rows, None for all."""
        added = tuple(one.take(users, items) for one in self.added)
        of_items = self.items if items is None else self.items[torch.from_numpy(items)]
        return Factors(self.users[torch.from_numpy(users)], of_items, added=added)

    def are_finite(self) -> bool:
        return bool(self.users.isfinite().all() and self.items.isfinite().all())

    def part_scores(self, dataset: Dataset, part: int) -> Shaped[Floats, "n"]:
        return self.scores(dataset.pairs_of(part))

    def scores(self, pairs: Pairs, block: int = 16_384) -> Shaped[Floats, "n"]:
        """Return the scores of the pairs, `block` pairs at a time, as a temporary array."""
        return self._added_of_pairs(self.pair_products(pairs, block), pairs)

    def pair_products(self, pairs: Pairs, block: int = 16_384) -> Shaped[Floats, "n"]:
        """Return the products of the vectors of the pairs, `block` pairs at a time, as a temporary array."""
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
