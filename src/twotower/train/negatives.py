"""What stands against the positives, drawn in this one place.

Observed negatives are training interactions the user did not like. Random ones are items of the whole catalogue,
fresh every epoch, never one the user has met in training, so never a positive and never in a history. Draws
depend on (seed, epoch) only, so a resumed run sees
the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.config import NegativesConfig
from twotower.data.dataset import Dataset, Pairs
from twotower.data.splits import TRAIN
from twotower.encoders import Codes, Ints


@dataclass(frozen=True)
class Epoch:
    """All pairs of one epoch in the order they are trained; aligned (n,) arrays."""

    user: Codes
    item: Codes
    label: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    source: Ints  # number of the interaction, -1 for a random negative

    def __len__(self) -> int:
        return len(self.user)


class RandomNegatives:
    """Uniform draws from the items a user has not met, exact and without rejection.

    The r-th such item of a user is r plus the number of met items before it; with the met ones p_0 < p_1 < …
    that is r + #{j : p_j - j <= r}, one binary search for all draws together.
    """

    def __init__(self, met: Pairs, n_users: int, n_items: int) -> None:
        """`met` are the pairs never to draw, liked or not."""
        user, item = np.divmod(np.unique(met.user.astype(np.int64) * n_items + met.item), n_items)
        self._n_items = n_items
        self._first = np.zeros(n_users + 1, np.int64)
        np.cumsum(np.bincount(user, minlength=n_users), out=self._first[1:])
        rank = np.arange(len(user)) - self._first[user]
        self._keys = user * (n_items + 1) + item - rank
        self.free = n_items - np.diff(self._first)
        """(n_users,) how many items the user has not met."""

    def draw(self, users: Ints, rng: np.random.Generator) -> Codes:
        """One item row for each of `users` (n,), which should be sorted; each must have `free` > 0."""
        return self._free_item(users, (rng.random(len(users)) * self.free[users]).astype(np.int64))

    def draw_distinct(self, users: Ints, n: int, rng: np.random.Generator) -> Ints:
        """(len(users), n) item rows, no item twice in a row; -1 where a user has fewer free ones than n (Floyd's
        sampling without replacement, Bentley and Floyd 1987, with a column for each of his rounds)."""
        top = self.free[users][:, None] - n + np.arange(n)  # of each round; below 0 there is nothing to draw
        ranks = (rng.random((len(users), n)) * (top + 1).clip(min=1)).astype(np.int64)
        for j in range(1, n):
            again = ((ranks[:, :j] == ranks[:, j, None]) & (top[:, :j] >= 0)).any(1)
            ranks[again, j] = top[again, j]
        drawn = self._free_item(np.repeat(users, n), ranks.ravel()).reshape(ranks.shape)
        return np.where(top >= 0, drawn, -1).astype(np.int64)

    def _free_item(self, users: Ints, r: Ints) -> Codes:
        """The `r`-th item that each of `users` has not met."""
        before = np.searchsorted(self._keys, users * (self._n_items + 1) + r, side="right") - self._first[users]
        out: Codes = (r + before).astype(np.int32)
        return out


class Sampler:
    """The pairs of every epoch: the training interactions and fresh random negatives, shuffled."""

    def __init__(self, dataset: Dataset, config: NegativesConfig, seed: int, shuffle: bool = True) -> None:
        self._seed, self._shuffle = seed, shuffle
        self._source = np.flatnonzero(dataset.parts == TRAIN)
        train = dataset.train
        self._pairs = train
        self._label = train.positive.astype(np.float32)
        self._random: RandomNegatives | None = None
        self._users = np.zeros(0, np.int64)
        self.random_weight = 1.0
        if config.random:
            self._random = RandomNegatives(train, len(dataset.users), len(dataset.items))
            positives = np.bincount(train.user[train.positive], minlength=len(dataset.users))
            # A user who has met the whole catalogue has no negative to draw.
            counts = np.where(self._random.free > 0, positives, 0) * config.random
            self._users = np.repeat(np.arange(len(dataset.users)), counts)
            observed = len(train) - int(train.positive.sum())
            if observed and len(self._users):
                share = config.random_share
                self.random_weight = share / (1 - share) * observed / len(self._users)

    def __len__(self) -> int:
        return len(self._pairs) + len(self._users)

    def epoch(self, number: int) -> Epoch:
        """The pairs of epoch `number` (0, 1, …)."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed, 0x6E65], counter=[0, 0, 0, number]))
        n, extra = len(self._pairs), len(self._users)
        order = rng.permutation(n + extra) if self._shuffle else np.arange(n + extra)
        user, item = self._pairs.user, self._pairs.item
        label, weight, source = self._label, np.ones(n, np.float32), self._source
        if self._random is not None:
            user = np.concatenate([user, self._users.astype(np.int32)])
            item = np.concatenate([item, self._random.draw(self._users, rng)])
            label = np.concatenate([label, np.zeros(extra, np.float32)])
            weight = np.concatenate([weight, np.full(extra, self.random_weight, np.float32)])
            source = np.concatenate([source, np.full(extra, -1, np.int64)])
        return Epoch(user[order], item[order], label[order], weight[order], source[order])


class Positives:
    """The training positives of every epoch, for losses that set each against candidates."""

    def __init__(self, dataset: Dataset, seed: int, shuffle: bool = True, by_user: bool = False) -> None:
        """`by_user` keeps the positives of a user together, oldest first, and shuffles the users."""
        self._seed, self._shuffle, self._by_user = seed, shuffle, by_user
        self._source = dataset.in_order((dataset.parts == TRAIN) & dataset.pairs.positive)
        if by_user:
            self._source = self._source[np.argsort(dataset.pairs.user[self._source], kind="stable")]
        else:
            self._source = np.sort(self._source)
        self._user, self._item = dataset.pairs.user[self._source], dataset.pairs.item[self._source]

    def __len__(self) -> int:
        return len(self._source)

    def epoch(self, number: int) -> Epoch:
        """The positives of epoch `number` (0, 1, …)."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed, 0x706F], counter=[0, 0, 0, number]))
        n = len(self._source)
        if not self._shuffle:
            order = np.arange(n)
        elif self._by_user:
            place = rng.permutation(int(self._user.max()) + 1)
            order = np.argsort(place[self._user], kind="stable")
        else:
            order = rng.permutation(n)
        one = np.ones(n, np.float32)
        return Epoch(self._user[order], self._item[order], one, one, self._source[order])
