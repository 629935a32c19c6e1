"""The pairs of every epoch, and what stands against the positives, drawn in this one place.

Observed negatives are training interactions the user did not like. Random ones are items of the whole catalogue,
fresh every epoch, never one the user has met in training, so never a positive and never in a history. Draws
depend on (seed, epoch) and the place in the epoch only, so a resumed run sees the same ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config import NegativesConfig
from twotower.data.dataset import Bools, Dataset
from twotower.encoders import Codes, Ints, Ragged
from twotower.train.order import BLOCK, Epoch, Examples, Shards, ShuffleWindows

KEPT = 2**26
"""Pairs whose keys are kept; of more, those of the users that are asked for are made when they are."""


class PairSet:
    """Items of users, and what can be asked of many pairs at once by one binary search."""

    def __init__(self, items: Ragged, n_items: int) -> None:
        """`items` of each user rise."""
        self.items, self.n_items = items, n_items
        self._kept = self._keys(np.arange(len(items))) if len(items.values) <= KEPT else None

    def _keys(self, users: Ints) -> Ints:
        """(user, item) as one rising number each, of distinct rising users."""
        found = self.items.take(users)
        return np.repeat(users, found.lengths) * self.n_items + found.values

    def holds(self, users: Ints, items: Ints) -> Bools:
        """Which of the pairs (n, …) are there."""
        keys = self._keys(np.unique(users)) if self._kept is None else self._kept
        if not len(keys):
            return np.zeros(np.broadcast_shapes(users.shape, items.shape), bool)
        wanted = users * self.n_items + items
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found: Bools = keys[at] == wanted
        return found


class RandomNegatives:
    """Uniform draws from the items a user has not met, exact and without rejection.

    The r-th such item of a user is r plus the number of met items before it; with the met ones p_0 < p_1 < …
    that is r + #{j : p_j - j <= r}, one binary search for all draws together.
    """

    def __init__(self, met: Ragged, n_items: int) -> None:
        """`met` are the items never to draw, of each user distinct and rising."""
        self._met, self._n_items = met, n_items
        self.free = n_items - met.lengths
        """(n_users,) how many items the user has not met."""
        self._kept = self._keys(np.arange(len(met))) if len(met.values) <= KEPT else None

    def _keys(self, users: Ints) -> tuple[Ints, Ints]:
        """Keys of distinct rising users, and where those of each begin."""
        met = self._met.take(users)
        rank = np.arange(len(met.values)) - np.repeat(met.offsets[:-1], met.lengths)
        return np.repeat(users, met.lengths) * (self._n_items + 1) + met.values - rank, met.offsets

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
        if self._kept is not None:
            (keys, first), which = self._kept, users
        else:
            distinct, which = np.unique(users, return_inverse=True)
            keys, first = self._keys(distinct)
        before = np.searchsorted(keys, users * (self._n_items + 1) + r, side="right") - first[which]
        out: Codes = (r + before).astype(np.int32)
        return out


class PairSampler:
    """The pairs of every epoch: the training interactions and fresh random negatives, shuffled."""

    def __init__(
        self, dataset: Dataset, config: NegativesConfig, seed: int, shuffle: bool = True, shards: int = 1
    ) -> None:
        self._seed, self._shuffle = seed, shuffle
        self._pairs = dataset.pairs
        self._shards = Shards(dataset, dataset.train_numbers, shards)
        self._random, self._each = None, config.random
        self.random_weight = 1.0
        if config.random:
            self._random = RandomNegatives(dataset.seen_items, len(dataset.items))
        self._extra = [self._count(shard) for shard in range(shards)]
        if extra := sum(int(of.sum()) for of in self._extra):
            observed = len(dataset.train_numbers) - len(dataset.positive_numbers)
            if observed:
                share = config.random_share
                self.random_weight = share / (1 - share) * observed / extra

    def _count(self, shard: int) -> Ints:
        """How many random negatives each block of a shard gets."""
        numbers = self._shards.of(shard)
        blocks = range(0, len(numbers), BLOCK)
        if self._random is None:
            return np.zeros(len(blocks), np.int64)
        return np.array([len(self._alone(numbers[b : b + BLOCK])) for b in blocks]) * self._each

    def _alone(self, numbers: npt.NDArray[Any]) -> Codes:
        """The users, rising, of the positives among some interactions; not who has met the whole catalogue, of whom
        there is no negative to draw."""
        assert self._random is not None
        users = self._pairs.user[numbers][self._pairs.positive[numbers]]
        return np.sort(users[self._random.free[users] > 0])

    def __len__(self) -> int:
        return len(self._shards.numbers) + sum(int(of.sum()) for of in self._extra)

    def epoch(self, number: int) -> Epoch:
        """The pairs of epoch `number` (0, 1, …)."""
        order = [
            ShuffleWindows(
                len(self._shards.of(s)), self._shuffle, _rng(self._seed, 0x6E65, number, s), len(self._shards)
            )
            for s in range(len(self._shards))
        ]

        def window(shard: int, w: int) -> Examples:
            return self._window(self._shards.of(shard), order[shard], w)

        def length(shard: int, w: int) -> int:
            rows = len(order[shard].places(w)) if order[shard].count > 1 else order[shard].n
            blocks = order[shard].blocks(w) if order[shard].count > 1 else slice(None)
            return rows + int(self._extra[shard][blocks].sum())

        return Epoch([[length(s, w) for w in range(o.count)] for s, o in enumerate(order)], window)

    def _window(self, numbers: npt.NDArray[Any], order: ShuffleWindows, w: int) -> Examples:
        rng = order.rng(w)
        source = numbers[order.places(w)] if order.count > 1 else numbers
        n = len(source)
        user, item = self._pairs.user[source], self._pairs.item[source]
        label, weight = self._pairs.positive[source].astype(np.float32), np.ones(n, np.float32)
        users = np.repeat(self._alone(source), self._each) if self._random else np.zeros(0, np.int32)
        extra = len(users)
        mixed = rng.permutation(n + extra) if self._shuffle else np.arange(n + extra)
        if self._random is not None:
            drawn = self._random.draw(users.astype(np.int64), rng)
            user, item = np.concatenate([user, users]), np.concatenate([item, drawn])
            label = np.concatenate([label, np.zeros(extra, np.float32)])
            weight = np.concatenate([weight, np.full(extra, self.random_weight, np.float32)])
            source = np.concatenate([source, np.full(extra, -1, np.int64)])
        return Examples(user, item, label, weight, source.astype(np.int64))[mixed]


class PositiveSampler:
    """The training positives of every epoch, for losses that set each against candidates."""

    def __init__(
        self, dataset: Dataset, seed: int, shuffle: bool = True, by_user: bool = False, shards: int = 1
    ) -> None:
        """`by_user` keeps the positives of a user together, oldest first, and shuffles the users."""
        self._seed, self._shuffle, self._by_user = seed, shuffle, by_user
        self._pairs = dataset.pairs
        numbers: npt.NDArray[Any] = dataset.positives_by_user.values if by_user else dataset.positive_numbers
        self._shards = Shards(dataset, numbers, shards, by_user)
        self._first = dataset.positives_by_user.offsets if by_user else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._shards.numbers)

    def epoch(self, number: int) -> Epoch:
        """The positives of epoch `number` (0, 1, …)."""
        if self._by_user:
            return self._of_users(number)
        order = [
            ShuffleWindows(
                len(self._shards.of(s)), self._shuffle, _rng(self._seed, 0x706F, number, s), len(self._shards)
            )
            for s in range(len(self._shards))
        ]

        def window(shard: int, w: int) -> Examples:
            rows, numbers = order[shard], self._shards.of(shard)
            if not self._shuffle:
                return self._examples(numbers[rows.places(w)])
            rng, places = rows.rng(w), rows.places(w)
            return self._examples(numbers[places][rng.permutation(len(places))])

        lengths = [[len(o.places(w)) if o.count > 1 else o.n for w in range(o.count)] for o in order]
        return Epoch(lengths, window)

    def _of_users(self, number: int) -> Epoch:
        """Whole users in a new order: a window is a run of users of that order."""
        orders, lengths = [], []
        for s in range(len(self._shards)):
            low, high = (int(np.searchsorted(self._first, b, side="left")) for b in self._shards.bounds[s : s + 2])
            users = np.arange(low if s else 0, high)
            if self._shuffle:
                rng = _rng(self._seed, 0x706F, number, s)(0)
                users = users[np.argsort(rng.permutation(len(users)), kind="stable")]
            ends = np.cumsum(self._first[users + 1] - self._first[users])
            total = int(ends[-1]) if len(ends) else 0
            run = max(1, _RUN // len(self._shards))
            cuts = np.searchsorted(ends, np.arange(run, max(total, 1), run)) + 1
            runs = np.split(users, np.unique(cuts[cuts < len(users)]))
            orders.append(runs)
            lengths.append([int((self._first[run + 1] - self._first[run]).sum()) for run in runs])

        def window(shard: int, w: int) -> Examples:
            users = orders[shard][w]
            n = self._first[users + 1] - self._first[users]
            inside = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
            return self._examples(self._shards.numbers[np.repeat(self._first[users], n) + inside])

        return Epoch(lengths, window)

    def _examples(self, source: npt.NDArray[Any]) -> Examples:
        one = np.ones(len(source), np.float32)
        return Examples(self._pairs.user[source], self._pairs.item[source], one, one, source.astype(np.int64))


_RUN = 2**20
"""Interactions of the users that are read together."""


class _rng:
    """Generators of the windows of a shard in an epoch."""

    def __init__(self, seed: int, purpose: int, epoch: int, shard: int) -> None:
        self._key, self._epoch, self._shard = [seed, purpose], epoch, shard

    def __call__(self, window: int) -> np.random.Generator:
        """That of a window; of the order of the blocks for -1."""
        counter = [0, window % 2**32, self._shard, self._epoch]
        return np.random.Generator(np.random.Philox(key=self._key, counter=counter))
