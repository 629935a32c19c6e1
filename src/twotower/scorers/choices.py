"""Choices of users in the validation part: the item that each took, and the items that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import is_in_sorted, pair_keys
from twotower.arrays.types import F32, Bools, Codes, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.evaluation.config import Repeats
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.moments import VersionFactors
from twotower.features.side import SIDES
from twotower.scorers.logit import Column, TermWeights, fit_weights

MIN_ROWS, MAX_ROWS = 50, 2048
"""Rows of the validation part below which no weight is fitted, and that are read at most."""
MAX_ITEMS = 1000
"""Items that each row's own item is compared with; more are sampled."""
MAX_OWN = 64
"""Items of the user's history that are also compared where repeats are ranked; more are sampled."""
BLOCK_SCORES = 2**25
"""Scores that are held at a time."""
IN_NO_ORDER = ("random", "user_random")
"""Kinds of splits whose parts are of the same days."""


@dataclass(frozen=True)
class Choices:
    """Rows of the validation part with sampled softmax candidates.

    Users, items and interactions are rows of the dataset."""

    dataset: Dataset
    users: Shaped[Ints, "n"]
    interactions: Shaped[Ints, "n"]
    candidates: Shaped[Ints, "n k"]
    """The item taken, in column 0, and the items that it is compared with."""
    offsets: Shaped[Floats, "n k"]
    """Logarithm of the number of items that a candidate stands for; minus infinity for no candidate."""

    @classmethod
    def of(cls, dataset: Dataset, seed: int, repeats: Repeats) -> Choices | None:
        """Return choices drawn by `seed`; None for fewer than MIN_ROWS rows. `repeats` says which items are ranked, as
        in an evaluation. Items that the test part alone has are not there yet, and not compared."""
        rng = np.random.default_rng(seed)
        pairs, rows = dataset.validation, dataset.part_indices(VALIDATION)
        target = pairs.target
        users, items, rows = pairs.user[target].astype(np.int64), pairs.item[target].astype(np.int64), rows[target]
        is_repeat = _have_taken(dataset, users, items[:, None])[:, 0]
        if repeats != "allow":
            kept = is_repeat if repeats == "only" else ~is_repeat
            users, items, rows = users[kept], items[kept], rows[kept]
        if len(users) < MIN_ROWS:
            return None
        drawn = np.sort(rng.permutation(len(users))[:MAX_ROWS])
        users, items, rows = users[drawn], items[drawn], rows[drawn]
        candidates, offsets = [items[:, None]], [np.zeros((len(users), 1), np.float32)]
        if repeats != "only":
            every = np.flatnonzero(~later_items(dataset))
            compared = np.sort(rng.choice(every, MAX_ITEMS, replace=False)) if len(every) > MAX_ITEMS else every
            candidates.append(np.broadcast_to(compared, (len(users), len(compared))))
            out = (compared == items[:, None]) | _have_taken(dataset, users, candidates[-1])
            of_each = np.float32(np.log(len(every) / max(1, len(compared))))
            offsets.append(np.where(out, np.float32(-np.inf), of_each))
        if repeats != "exclude":
            own, of_own = _own_items(dataset.seen_items, users, rng)
            candidates.append(own)
            offsets.append(np.where(own == items[:, None], np.float32(-np.inf), of_own))
        return cls(dataset, users, rows, np.concatenate(candidates, 1), np.concatenate(offsets, 1))

    def without(self, left_out: Shaped[Bools, "n k"]) -> Choices:
        """Return the choices without some candidates; a row whose own item is left out compares nothing."""
        offsets = np.where(left_out, np.float32(-np.inf), self.offsets)
        offsets[:, 0] = 0
        return replace(self, offsets=offsets)

    def scores(self, scorer: Scorer) -> F32[Tensor, "n k"]:
        """Return the products of the vectors of a scorer, without what is added to them."""
        scorer = VersionFactors.of_part(replace(scorer, added=()), self.dataset, VALIDATION)
        if type(scorer) is Factors:
            return self.products(scorer.users, scorer.items)
        size, found = max(1, BLOCK_SCORES // len(self.dataset.items)), list[Tensor]()
        for first in range(0, len(self.users), size):
            some = slice(first, first + size)
            every = scorer.catalogue_scores(self.users[some], self.interactions[some])
            found.append(every.cpu().float().gather(1, torch.from_numpy(self.candidates[some])))
        return torch.cat(found)

    def products(self, users: F32[Tensor, "U D"], items: F32[Tensor, "I D"]) -> F32[Tensor, "n k"]:
        """Return the products of vectors `by_version`; of versions those that hold at the latest training
        interaction."""
        of_users, of_items = (self.dataset.rows_after_training(side) for side in SIDES)
        used, place = np.unique(self.candidates, return_inverse=True)
        of_each = (users, of_users[self.users]), (items, of_items[used])
        u, v = (vectors[torch.from_numpy(rows)].cpu().float() for vectors, rows in of_each)
        return (u @ v.T).gather(1, torch.from_numpy(place.reshape(self.candidates.shape)))

    def weights(self, columns: Sequence[Column]) -> TermWeights | None:
        """Return the weights of all columns but the first, under which the items taken are most likely; None if the
        first is the same for all items."""
        return fit_weights([c.scores for c in columns], self.offsets, [c.deviation for c in columns])

    def of_items(self, values: Shaped[Tensor, "items"]) -> F32[Tensor, "n k"]:
        """Return a number of each item."""
        return values.cpu().float()[torch.from_numpy(self.candidates)]

    def of_pairs(
        self, scores: Callable[[Shaped[Codes, "p"], Shaped[Codes, "p"]], Shaped[Floats, "p"]]
    ) -> F32[Tensor, "n k"]:
        """Return a number of each pair of user and item, which a function returns for rows of users and of items."""
        shape = self.candidates.shape
        users, items = (
            np.broadcast_to(rows, shape).ravel().astype(np.int32) for rows in (self.users[:, None], self.candidates)
        )
        return torch.from_numpy(scores(users, items)).float().view(shape)


def later_items(dataset: Dataset) -> Shaped[Bools, "items"]:
    """Return True for the items that the test part alone has, which are not there yet on validation; of a split in no
    order none is later."""
    if dataset.split.kind in IN_NO_ORDER:
        return np.zeros(len(dataset.items), bool)
    of_parts = [
        np.bincount(dataset.pairs_of(part).item, minlength=len(dataset.items)) for part in (TRAIN, VALIDATION, TEST)
    ]
    later: Bools = (of_parts[0] + of_parts[1] == 0) & (of_parts[2] > 0)
    return later


def _own_items(
    seen: Ragged, users: Shaped[Ints, "n"], rng: np.random.Generator
) -> tuple[Shaped[Ints, "n o"], Shaped[Floats, "n o"]]:
    """Return at most MAX_OWN items of each user's history, and the offsets of these candidates."""
    starts, lengths = seen.offsets[users], seen.lengths[users]
    places = np.arange(min(MAX_OWN, int(lengths.max(initial=0))))
    at = np.empty((len(users), len(places)), np.int64)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = np.arange(length) if length <= len(places) else rng.choice(length, len(places), replace=False)
        at[row] = start + np.pad(own, (0, len(places) - len(own)))
    number = np.maximum(lengths, 1) / np.clip(lengths, 1, max(1, len(places)))
    offsets = np.where(places < lengths[:, None], np.log(number)[:, None], -np.inf).astype(np.float32)
    items = seen.values if len(seen.values) else np.zeros(1, np.int32)
    return items[at.clip(max=len(items) - 1)].astype(np.int64), offsets


def _have_taken(dataset: Dataset, users: Shaped[Ints, "n"], items: Shaped[Ints, "n k"]) -> Shaped[Bools, "n k"]:
    """Return True for items (n, k) that the users (n,) have in the training part."""
    n, seen = len(dataset.items), dataset.seen_items
    return is_in_sorted(pair_keys(seen.owners, seen.values, n), users[:, None] * n + items)
