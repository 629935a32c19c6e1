"""Labelled pairs of every epoch, for the pointwise loss.

Random negatives are items of the whole catalogue, fresh every epoch, that the user has not seen in training: never a
positive, and never in a history. Draws depend on (seed, epoch) and the place in the epoch only, so a resumed run draws the
same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Codes, Ints
from twotower.data.dataset import Dataset
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.random import RandomNegatives
from twotower.train.order import Epoch, Examples, Shards, ShuffleSizes, ShuffleWindows, shuffle_windows


class PairSampler:
    """Labelled pairs of every epoch, for the pointwise loss: the training interactions and fresh random negatives.

    Each positive of a user who has unseen items gets `negatives.random` random negatives of weight w, and interactions weigh
    1, so that the random ones carry the share s = `negatives.random_share` of the weight of all negatives:
    w = s / (1 - s) * dislikes / random negatives; 1 without dislikes.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: NegativesConfig,
        seed: int,
        shuffle: bool = True,
        shards: int = 1,
        sizes: ShuffleSizes | None = None,
    ) -> None:
        """Count the pairs of each shard. Raises ConfigError if there are more `shards` than training interactions."""
        self._seed, self._shuffle, self._sizes = seed, shuffle, sizes or ShuffleSizes()
        self._pairs = dataset.pairs
        self._shards = Shards(dataset, dataset.train_indices, shards)
        self._random, self._per_positive = None, config.random
        self.random_weight = 1.0
        if config.random:
            self._random = RandomNegatives(dataset.seen_items, len(dataset.items))
        self._random_counts = [self._count_by_block(shard) for shard in range(shards)]
        if total := sum(int(counts.sum()) for counts in self._random_counts):
            disliked = len(dataset.train_indices) - len(dataset.positive_indices)
            if disliked:
                share = config.random_share
                self.random_weight = share / (1 - share) * disliked / total

    def _count_by_block(self, shard: int) -> Ints:
        """Return the number of random negatives of each block of a shard."""
        numbers, size = self._shards[shard], self._sizes.block
        blocks = range(0, len(numbers), size)
        if self._random is None:
            return np.zeros(len(blocks), np.int64)
        return np.array([len(self._users_to_draw_for(numbers[b : b + size])) for b in blocks]) * self._per_positive

    def _users_to_draw_for(self, numbers: npt.NDArray[Any]) -> Codes:
        """Return the users, rising, of the positives among some interactions, without users who have seen every item."""
        assert self._random is not None
        users = self._pairs.user[numbers][self._pairs.positive[numbers]]
        return np.sort(users[self._random.unseen_counts[users] > 0])

    def __len__(self) -> int:
        return len(self._shards.numbers) + sum(int(counts.sum()) for counts in self._random_counts)

    def epoch(self, index: int) -> Epoch:
        """Return the pairs of epoch `index` (0, 1, …)."""
        windows = shuffle_windows(self._shards, self._shuffle, self._seed, 0x6E65, index, self._sizes)

        def make_window(shard: int, w: int) -> Examples:
            return self._make_window(self._shards[shard], windows[shard], w)

        def length(shard: int, w: int) -> int:
            several = windows[shard].count > 1
            rows = len(windows[shard].places(w)) if several else windows[shard].n
            blocks = windows[shard].blocks(w) if several else slice(None)
            return rows + int(self._random_counts[shard][blocks].sum())

        return Epoch([[length(s, w) for w in range(of_shard.count)] for s, of_shard in enumerate(windows)], make_window)

    def _make_window(self, numbers: npt.NDArray[Any], windows: ShuffleWindows, w: int) -> Examples:
        """Return the examples of window w of a shard, whose interactions are `numbers`."""
        rng = windows.rng(w)
        source = numbers[windows.places(w)] if windows.count > 1 else numbers
        n = len(source)
        user, item = self._pairs.user[source], self._pairs.item[source]
        label, weight = self._pairs.positive[source].astype(np.float32), np.ones(n, np.float32)
        users = (
            np.repeat(self._users_to_draw_for(source), self._per_positive) if self._random else np.zeros(0, np.int32)
        )
        extra = len(users)
        order = rng.permutation(n + extra) if self._shuffle else np.arange(n + extra)
        if self._random is not None:
            drawn = self._random.draw(users.astype(np.int64), rng)
            user, item = np.concatenate([user, users]), np.concatenate([item, drawn])
            label = np.concatenate([label, np.zeros(extra, np.float32)])
            weight = np.concatenate([weight, np.full(extra, self.random_weight, np.float32)])
            source = np.concatenate([source, np.full(extra, -1, np.int64)])
        return Examples(user, item, label, weight, source.astype(np.int64))[order]
