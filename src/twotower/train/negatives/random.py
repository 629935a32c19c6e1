"""Items that the user has not seen, as pairs and as per-positive negatives."""

from __future__ import annotations

import numpy as np
import torch

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import MAX_CACHED_PAIRS
from twotower.arrays.types import Bools, Codes, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.train.negatives.source import PairDraws, PairSource, PerPositiveSampler, Positives


class RandomNegatives(PairSource):
    """Items that the user has not seen in training, drawn uniformly for each positive (DSSM, Huang et al. 2013, section
    3.3).

    With features of the context these are any items but the user's positives in the same context. Pointwise losses get
    negative pairs, redrawn every epoch; contrastive losses per-positive candidates without repeats, redrawn every
    batch.

    Use it with a pointwise loss if only positives, or few dislikes, are observed. It is on by default if the schema
    names no label and no negative events, and no other source gives pairs.
    """

    kind = "random"
    certain = True
    beyond_batch = True

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> PerPositiveSampler:
        return _UnseenSampler(self.build_pairs(dataset), self.n)

    def build_pairs(self, dataset: Dataset) -> UnseenItems:
        seen = dataset.seen_items
        if dataset.schema.side("context"):  # a positive in one context may be a negative in another
            seen = Ragged(np.zeros(0, np.int32), np.zeros(len(dataset.users) + 1, np.int64))
        return UnseenItems(seen, len(dataset.items))


class _UnseenSampler(PerPositiveSampler):
    def __init__(self, unseen: UnseenItems, n: int) -> None:
        self._unseen, self.easy = unseen, n

    def draw(self, positives: Positives, rng: np.random.Generator) -> Shaped[Ints, "B n"]:
        return self._unseen.draw_distinct(positives.user.astype(np.int64), self.easy, rng)


class UnseenItems(PairDraws):
    """Uniform draws from the items that a user has not seen, exact and without rejection.

    With seen items p_0 < p_1 < … the r-th unseen item is r + #{j : p_j - j <= r}, by one binary search for all draws.
    """

    def __init__(self, seen_items: Ragged, n_items: int, max_cached_pairs: int = MAX_CACHED_PAIRS) -> None:
        """Exclude the `seen_items` of each user, distinct and ascending, out of `n_items`."""
        self._seen, self._n_items = seen_items, n_items
        self.unseen_counts = n_items - seen_items.lengths
        """(n_users,) Number of items that the user has not seen."""
        self._cached = self._keys(np.arange(len(seen_items))) if len(seen_items.values) <= max_cached_pairs else None

    def _keys(self, users: Shaped[Ints, "n"]) -> tuple[Shaped[Ints, "k"], Shaped[Ints, "_"]]:
        """Return ascending keys of distinct ascending users, and the first place of each user's keys."""
        seen = self._seen.take(users)
        rank = np.arange(len(seen.values)) - np.repeat(seen.offsets[:-1], seen.lengths)
        return np.repeat(users, seen.lengths) * (self._n_items + 1) + seen.values - rank, seen.offsets

    def can_draw(self, users: Shaped[Codes, "n"]) -> Shaped[Bools, "n"]:
        mask: Bools = self.unseen_counts[users] > 0
        return mask

    def draw(self, users: Shaped[Ints, "n"], rng: np.random.Generator) -> Shaped[Codes, "n"]:
        """Draw one item row for each user, who has an unseen item. Sorted users are faster."""
        return self._unseen_item(users, (rng.random(len(users)) * self.unseen_counts[users]).astype(np.int64))

    def draw_distinct(self, users: Shaped[Ints, "U"], n: int, rng: np.random.Generator) -> Shaped[Ints, "U n"]:
        """Draw n distinct item rows for each user; -1 if a user has fewer unseen items.

        Floyd's sampling without replacement (Bentley and Floyd 1987), with one column for each of its rounds.
        """
        top = self.unseen_counts[users][:, None] - n + np.arange(n)  # of each round; below 0: nothing to draw
        ranks = (rng.random((len(users), n)) * (top + 1).clip(min=1)).astype(np.int64)
        for j in range(1, n):
            again = ((ranks[:, :j] == ranks[:, j, None]) & (top[:, :j] >= 0)).any(1)
            ranks[again, j] = top[again, j]
        drawn = self._unseen_item(np.repeat(users, n), ranks.ravel()).reshape(ranks.shape)
        return np.where(top >= 0, drawn, -1).astype(np.int64)

    def _unseen_item(self, users: Shaped[Ints, "n"], r: Shaped[Ints, "n"]) -> Shaped[Codes, "n"]:
        if self._cached is not None:
            (keys, first), index = self._cached, users
        else:
            distinct, index = np.unique(users, return_inverse=True)
            keys, first = self._keys(distinct)
        before = np.searchsorted(keys, users * (self._n_items + 1) + r, side="right") - first[index]
        out: Codes = (r + before).astype(np.int32)
        return out
