"""Scores that a user's own history adds to the items it holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.pieces import pieces
from twotower.arrays.ragged import Ragged, offsets_of, run_indices
from twotower.arrays.sets import pair_keys
from twotower.arrays.types import Bools, Codes, Float, Floats, Ints, Shaped
from twotower.data.own_items import OwnItems, Recency, own_items
from twotower.data.pairs import Pairs


@dataclass(frozen=True)
class OwnScores:
    """A sparse matrix (users, items) that is added to the products of vectors: zero but for the items of each user's
    history."""

    offsets: Shaped[Ints, "_"]  # (U + 1,)
    items: Shaped[Ints, "L"]
    """Item rows, ascending for each user."""
    values: Shaped[Floats, "L"]
    n_items: int

    @classmethod
    def of(
        cls, histories: Ragged, rows: Shaped[Ints, "codes"], weights: Shaped[Floats, "codes"], recency: Recency,
        factor: float, n_items: int
    ) -> OwnScores:  # fmt: skip
        """Return the scores of `own_items`, of a history of each user."""
        offsets, own = own_items(histories, rows, weights, recency, factor, n_items)
        return cls(offsets, own.rows, own.scores, n_items)

    def of_user(self, user: int) -> OwnItems:
        """Return the items of a user row, and what is added to their scores."""
        part = slice(*self.offsets[user : user + 2])
        return OwnItems(self.items[part], self.values[part])

    def added_to(self, scores: Float[Tensor, "B I"], users: Shaped[Ints, "B"]) -> Float[Tensor, "B I"]:
        """Add the scores of some user rows to those of all items, in place."""
        lengths = np.diff(self.offsets)[users]
        at = run_indices(self.offsets[users], lengths)
        cells = np.repeat(np.arange(len(users)), lengths) * self.n_items + self.items[at]
        into, values = (torch.from_numpy(a).to(scores.device) for a in (cells, self.values[at]))
        scores.view(-1).index_add_(0, into, values.to(scores.dtype))
        return scores

    def of_pairs(self, users: Shaped[Codes, "n"], items: Shaped[Codes, "n"]) -> Shaped[Floats, "n"]:
        """Return the scores of pairs of user and item rows."""
        if not len(self.items):
            return np.zeros(len(users), np.float32)
        owners = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        keys, found = pair_keys(owners, self.items, self.n_items), np.zeros(len(users), np.float32)
        for some in pieces(len(users)):
            asked = pair_keys(users[some], items[some], self.n_items)
            at = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
            found[some] = np.where(keys[at] == asked, self.values[at], np.float32(0))
        return found

    def without(self, items: Shaped[Bools, "I"]) -> OwnScores:
        """Return the scores with 0 for the items of a mask."""
        return replace(self, values=np.where(items[self.items], np.float32(0), self.values))

    def take(self, users: Shaped[Ints, "u"], items: Shaped[Ints, "i"] | None = None) -> OwnScores:
        """Return the scores of some user rows, and of some distinct item rows in their order, None for all."""
        lengths = np.diff(self.offsets)[users]
        at = run_indices(self.offsets[users], lengths)
        owner, item, values = np.repeat(np.arange(len(users)), lengths), self.items[at], self.values[at]
        if items is None:
            return OwnScores(offsets_of(lengths), item, values, self.n_items)
        place = np.full(self.n_items, -1)
        place[items] = np.arange(len(items))
        kept = place[item] >= 0
        owner, item, values = owner[kept], place[item[kept]], values[kept]
        order = np.lexsort((item, owner))
        lengths = np.bincount(owner, minlength=len(users))
        return OwnScores(offsets_of(lengths), item[order], values[order], len(items))


def added_own_of_pairs(own: OwnScores | None, scores: Shaped[Floats, "n"], pairs: Pairs) -> Shaped[Floats, "n"]:
    """Return scores of pairs, in place, with those of the histories; as they are for None."""
    if own is not None:
        scores += own.of_pairs(pairs.user, pairs.item)
    return scores
