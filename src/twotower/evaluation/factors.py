"""Vectors of users and items whose product is the score of a pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.pieces import temporary_array
from twotower.arrays.types import Float, Floats, Int, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.evaluation.added_scores import AddedScores, SparseScores

SINGLE_DIMENSIONS = 512
"""Number of dimensions in which one item alone is not zero, as in a table with an axis for each item, from which they
are added to the scores of that item: a product of matrices would multiply with the zeros of all others."""
MIN_ZEROS = 8
"""Numbers of the item vectors for each that is not zero, from which their zeros are looked for."""


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
class _Split:
    """Vectors in their S dimensions of several items, and R dimensions of one item each."""

    users: Float[Tensor, "U S"]
    items: Float[Tensor, "I S"]
    dimensions: Int[Tensor, "R"]
    rows: Int[Tensor, "R"]
    """Item of each of the R dimensions."""
    values: Float[Tensor, "R"]
    """Its value in that dimension."""


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
        rows = torch.from_numpy(users).to(self.items.device)
        if (split := self._split) is None:
            return self.users[rows] @ self.items.T
        single = self.users[rows].index_select(1, split.dimensions) * split.values
        return (split.users[rows] @ split.items.T).index_add_(1, split.rows, single)

    def take(self, users: Shaped[Ints, "u"], items: Shaped[Ints, "i"] | None = None) -> Factors:
        """Return the vectors of some user rows, and of some distinct item rows, None for all."""
        added = tuple(one.take(users, items) for one in self.added)
        of_items = self.items if items is None else self.items[torch.from_numpy(items)]
        return Factors(self.users[torch.from_numpy(users)], of_items, added=added)

    @cached_property
    def _split(self) -> _Split | None:
        """The dimensions of one item apart from the others; None for fewer than SINGLE_DIMENSIONS, for items with many
        numbers that are not zero, and for vectors that are not finite."""
        items, n_dimensions = self.items, self.items.shape[1]
        if n_dimensions < SINGLE_DIMENSIONS or int(items.count_nonzero()) > items.numel() // MIN_ZEROS:
            return None
        rows, dimensions = items.nonzero().T
        n_items = torch.bincount(dimensions, minlength=n_dimensions)
        if int((n_items == 1).sum()) < SINGLE_DIMENSIONS or not all(x.isfinite().all() for x in (self.users, items)):
            return None
        single, shared = n_items[dimensions] == 1, n_items > 1
        rows, dimensions = rows[single], dimensions[single]
        return _Split(self.users[:, shared], items[:, shared], dimensions, rows, items[rows, dimensions])

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
