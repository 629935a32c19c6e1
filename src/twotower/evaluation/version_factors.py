"""Vectors of users and items with versions: pairs and rankings of a part see those of their own time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.pieces import pieces, temporary_array
from twotower.arrays.types import Codes, Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.data.side import Side
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.moments import asked_times

S = TypeVar("S", bound=Scorer)


@dataclass(frozen=True)
class VersionFactors(Factors):
    """Vectors of all versions of users and items, for the pairs and the users of one part.

    A pair is scored by the versions that hold at its time. A user ranks the catalogue by those that hold at the time of
    its first pair of the part, so that nothing is later than what it predicts."""

    users: Float[Tensor, "VU D"]
    items: Float[Tensor, "VI D"]
    user_side: Side
    item_side: Side
    pairs: Pairs  # of the part
    times: Shaped[Ints, "n"]  # of the pairs
    asked: Shaped[Ints, "U"]
    """Time of the ranking of each user: of its first pair, or for a user without one of the first of all."""

    @classmethod
    def of_part(cls, factors: S, dataset: Dataset, part: int) -> S | VersionFactors:
        """Return the vectors for a part, from those of all rows of both sides `by_version`; unchanged without versions,
        and if the scores of an interaction read its versions already."""
        if not dataset.has_versions or not isinstance(factors, Factors):
            return factors
        pairs, times = dataset.pairs_of(part), dataset.times_of(part)
        assert times is not None
        asked = asked_times(dataset, part)
        sides = dataset.users, dataset.items
        return cls(factors.users, factors.items, *sides, pairs, times, asked, added=factors.added)

    def scores(self, pairs: Pairs, block: int = 16_384) -> Shaped[Floats, "n"]:
        """Return the scores of the pairs of the part."""
        assert len(pairs) == len(self.pairs), "these are not the pairs of the part"
        user, item = (temporary_array(len(pairs), np.int32) for _ in range(2))
        for part in pieces(len(pairs)):
            user[part] = _at(self.user_side, pairs.user[part], self.times[part])
            item[part] = _at(self.item_side, pairs.item[part], self.times[part])
        products = self.pair_products(replace(pairs, user=user, item=item), block)
        return self._added_of_pairs(products, pairs)

    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        """Return the scores of all items for some user rows, each with the versions that hold at the time
        of the user's ranking."""
        asked = self.asked[users]
        scores = scores_at(self.products(_at(self.user_side, users, asked)), self.item_side, asked)
        return self._added(scores, users, interactions)

    def at_once(self) -> Factors:
        """Return one vector for each user and item: users at the time of their ranking, items at the first of
        these times."""
        user = _at(self.user_side, np.arange(len(self.user_side)), self.asked)
        n_items = len(self.item_side)
        item = _at(self.item_side, np.arange(n_items), np.broadcast_to(self.asked.min(), n_items))
        users, items = self.users[torch.from_numpy(user)], self.items[torch.from_numpy(item)]
        return Factors(users, items, added=self.added)


def scores_at(scores: Float[Tensor, "B VI"], items: Side, times: Shaped[Ints, "B"]) -> Float[Tensor, "B I"]:
    """Return the scores of all items as they are at some times, out of those of all versions."""
    if items.versions is None:
        return scores
    distinct, which = np.unique(times, return_inverse=True)
    every = np.arange(len(items))
    held = np.stack([_at(items, every, np.broadcast_to(time, every.shape)) for time in distinct])
    return scores.gather(1, torch.from_numpy(held)[torch.from_numpy(which)].to(scores.device))


def _at(side: Side, rows: Shaped[Codes | Ints, "n"], times: Shaped[Ints, "n"]) -> Shaped[Ints, "n"]:
    """Return the rows of `side.by_version()` that hold at their times."""
    return rows.astype(np.int64) if side.versions is None else side.versions.at(rows, times)
