"""Scores that are added to the products of vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.pieces import pieces
from twotower.arrays.ragged import Ragged, offsets_of, run_indices
from twotower.arrays.sets import pair_keys
from twotower.arrays.types import Codes, Float, Floats, Ints, Shaped
from twotower.evaluation.own_items import HistoryTerm, OwnItems, own_items


class AddedScores(ABC):
    """Scores of users and items that no vector holds. `interactions` have the time of each ranking or pair; None: that
    of the ranking of the user."""

    moves: ClassVar[bool] = False
    """True if they depend on the time."""

    @abstractmethod
    def added_to(
        self, scores: Float[Tensor, "B I"], users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        """Add the scores of some user rows to those of all items, in place."""

    @abstractmethod
    def of_pairs(
        self, users: Shaped[Codes, "n"], items: Shaped[Codes, "n"], interactions: Shaped[Ints, "n"] | None = None
    ) -> Shaped[Floats, "n"]:
        """Return the scores of pairs of user and item rows."""

    @abstractmethod
    def take(self, users: Shaped[Ints, "u"], items: Shaped[Ints, "i"] | None = None) -> AddedScores:
        """Return the scores of some user rows, and of some distinct item rows in their order, None for all."""


@dataclass(frozen=True)
class SparseScores(AddedScores):
    """A sparse matrix (users, items): zero but for some items of each user, such as those of its history."""

    offsets: Shaped[Ints, "_"]  # (U + 1,)
    items: Shaped[Ints, "L"]
    """Item rows, ascending for each user."""
    values: Shaped[Floats, "L"]
    n_items: int

    @classmethod
    def of(cls, histories: Ragged, rows: Shaped[Ints, "codes"], term: HistoryTerm, n_items: int) -> SparseScores:
        """Return the scores of `own_items`, of a history of each user."""
        offsets, own = own_items(histories, rows, term, n_items)
        return cls(offsets, own.rows, own.scores, n_items)

    def of_user(self, user: int) -> OwnItems:
        """Return the items of a user row, and what is added to their scores."""
        part = slice(*self.offsets[user : user + 2])
        return OwnItems(self.items[part], self.values[part])

    def added_to(
        self, scores: Float[Tensor, "B I"], users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        lengths = np.diff(self.offsets)[users]
        at = run_indices(self.offsets[users], lengths)
        cells = np.repeat(np.arange(len(users)), lengths) * self.n_items + self.items[at]
        into, values = (torch.from_numpy(a).to(scores.device) for a in (cells, self.values[at]))
        scores.view(-1).index_add_(0, into, values.to(scores.dtype))
        return scores

    def of_pairs(
        self, users: Shaped[Codes, "n"], items: Shaped[Codes, "n"], interactions: Shaped[Ints, "n"] | None = None
    ) -> Shaped[Floats, "n"]:
        if not len(self.items):
            return np.zeros(len(users), np.float32)
        owners = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        keys, found = pair_keys(owners, self.items, self.n_items), np.zeros(len(users), np.float32)
        for some in pieces(len(users)):
            asked = pair_keys(users[some], items[some], self.n_items)
            at = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
            found[some] = np.where(keys[at] == asked, self.values[at], np.float32(0))
        return found

    def take(self, users: Shaped[Ints, "u"], items: Shaped[Ints, "i"] | None = None) -> SparseScores:
        lengths = np.diff(self.offsets)[users]
        at = run_indices(self.offsets[users], lengths)
        owner, item, values = np.repeat(np.arange(len(users)), lengths), self.items[at], self.values[at]
        if items is None:
            return SparseScores(offsets_of(lengths), item, values, self.n_items)
        place = np.full(self.n_items, -1)
        place[items] = np.arange(len(items))
        kept = place[item] >= 0
        owner, item, values = owner[kept], place[item[kept]], values[kept]
        order = np.lexsort((item, owner))
        lengths = np.bincount(owner, minlength=len(users))
        return SparseScores(offsets_of(lengths), item[order], values[order], len(items))
