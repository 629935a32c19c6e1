"""Users and items as they are when a part is asked: versions of rows, contexts of users, and tables at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from twotower.arrays.pieces import pieces, temporary_array
from twotower.arrays.types import Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.evaluation.factors import Factors, Scorer

S = TypeVar("S", bound=Scorer)

BLOCK_PAIRS = 4096
"""Pairs whose users' vectors are computed at a time."""


def asked_times(dataset: Dataset, part: int) -> Shaped[Ints, "U"]:
    """Return the time of the ranking of each user, of its first pair of a part; of a user without one, of the first
    pair of all."""
    pairs, times = dataset.pairs_of(part), dataset.times_of(part)
    asked = np.full(len(dataset.users), int(times.min()) if len(times) else 0)
    first = np.full(len(asked), np.iinfo(np.int64).max)
    for some in pieces(len(pairs)):
        np.minimum.at(first, pairs.user[some], times[some])
    return np.where(first < np.iinfo(np.int64).max, first, asked)


def users_during(dataset: Dataset, part: int) -> pl.DataFrame:
    """Return the table of the users, of each the version that holds at its ranking in a part."""
    users = dataset.users
    return users.frame_at(asked_times(dataset, part)) if users.versioned else users.frame


def items_during(dataset: Dataset, part: int) -> pl.DataFrame:
    """Return the table of the items, of each the version that holds at the first pair of a part."""
    items = dataset.items
    return items.frame_at(np.full(len(items), asked_times(dataset, part).min())) if items.versioned else items.frame


@dataclass(frozen=True)
class VersionFactors(Factors):
    """Vectors of all versions of users and items, for the pairs and the users of one part.

    A pair is scored by the versions that hold at its time. A user ranks the catalogue by those that hold at the time of
    its first pair of the part, so that nothing is later than what it predicts."""

    users: Float[Tensor, "VU D"]
    items: Float[Tensor, "VI D"]
    dataset: Dataset
    asked: Shaped[Ints, "U"]
    """Time of the ranking of each user."""

    @classmethod
    def of_part(cls, factors: S, dataset: Dataset, part: int) -> S | VersionFactors:
        """Return the vectors for a part, from those of all rows of both sides `by_version`; unchanged without versions,
        and if the scores of an interaction read its versions already."""
        if not dataset.has_versions or not isinstance(factors, Factors):
            return factors
        return cls(factors.users, factors.items, dataset, asked_times(dataset, part), added=factors.added)

    def part_scores(self, dataset: Dataset, part: int) -> Shaped[Floats, "n"]:
        pairs, interactions = dataset.pairs_of(part), dataset.part_indices(part)
        user, item = (temporary_array(len(pairs), np.int32) for _ in range(2))
        for some in pieces(len(pairs)):
            user[some] = dataset.input_rows("user", pairs.user[some], interactions[some])
            item[some] = dataset.input_rows("item", pairs.item[some], interactions[some])
        return self._added_of_pairs(self.pair_products(replace(pairs, user=user, item=item)), pairs)

    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        """Return the scores of all items for some user rows, each with the versions that hold at the time
        of the user's ranking."""
        asked = self.asked[users]
        products = self.products(self.dataset.users.at(users, asked))
        return self._added(_items_at(products, self.dataset, asked), users, interactions)

    def at_once(self) -> Factors:
        """Return one vector for each user and item: users at the time of their ranking, items at the first of
        these times."""
        users, items = self.dataset.users, self.dataset.items
        user = users.at(np.arange(len(users)), self.asked)
        item = items.at(np.arange(len(items)), np.broadcast_to(self.asked.min(), len(items)))
        return Factors(self.users[torch.from_numpy(user)], self.items[torch.from_numpy(item)], added=self.added)


@dataclass(frozen=True)
class ContextFactors(Scorer):
    """Vectors of all items, and of users in the context, and with the versions, of an interaction."""

    embed: Callable[[Ints, Ints], Tensor]
    """(rows (n,) of the users `by_version`, indices of interactions (n,)) -> vectors (n, D)."""
    items: Float[Tensor, "VI D"]
    """Vectors of the items `by_version`."""
    dataset: Dataset

    @property
    def width(self) -> int:
        return self.items.shape[1]

    def of_users(self, users: Shaped[Ints, "n"], interactions: Shaped[Ints, "n"]) -> Float[Tensor, "n D"]:
        """Return the vectors of some user rows in the context of some interactions."""
        return self.embed(self.dataset.input_rows("user", users, interactions).astype(np.int64), interactions)

    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        assert interactions is not None, "vectors of users need a context"
        products = self.of_users(users, interactions) @ self.items.T
        return self._added(_items_at(products, self.dataset, self.dataset.times[interactions]), users, interactions)

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


def _items_at(scores: Float[Tensor, "B VI"], dataset: Dataset, times: Shaped[Ints, "B"]) -> Float[Tensor, "B I"]:
    """Return the scores of all items as they are at some times, out of those of all versions."""
    items = dataset.items
    if not items.versioned:
        return scores
    distinct, which = np.unique(times, return_inverse=True)
    every = np.arange(len(items))
    held = np.stack([items.at(every, np.broadcast_to(time, every.shape)) for time in distinct])
    return scores.gather(1, torch.from_numpy(held)[torch.from_numpy(which)].to(scores.device))
