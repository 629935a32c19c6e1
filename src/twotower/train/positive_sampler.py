"""Training positives of every epoch, for contrastive losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.arrays.ragged import run_indices
from twotower.arrays.types import Shaped
from twotower.data.dataset import Dataset
from twotower.train.order import Epoch, Examples, Shards, ShuffleSizes, shuffle_windows, window_rng


class PositiveSampler:
    """Training positives of every epoch, for contrastive losses."""

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        shuffle: bool = True,
        by_user: bool = False,
        shards: int = 1,
        sizes: ShuffleSizes | None = None,
    ) -> None:
        """Cut the positives into shards. `by_user` keeps the positives of a user together, oldest first, and shuffles the
        users. Raises ConfigError if there are more `shards` than training positives."""
        self._seed, self._shuffle, self._by_user, self._sizes = seed, shuffle, by_user, sizes or ShuffleSizes()
        self._pairs = dataset.pairs
        numbers: npt.NDArray[Any] = dataset.positives_by_user.values if by_user else dataset.positive_indices
        self._shards = Shards(dataset, numbers, shards, by_user)
        self._first = dataset.positives_by_user.offsets if by_user else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._shards.numbers)

    def epoch(self, index: int) -> Epoch:
        """Return the positives of epoch `index` (0, 1, …)."""
        if self._by_user:
            return self._epoch_by_user(index)
        windows = shuffle_windows(self._shards, self._shuffle, self._seed, 0x706F, index, self._sizes)

        def make_window(shard: int, w: int) -> Examples:
            numbers, places = self._shards[shard], windows[shard].places(w)
            if not self._shuffle:
                return self._examples(numbers[places])
            return self._examples(numbers[places][windows[shard].rng(w).permutation(len(places))])

        lengths = [[len(s.places(w)) if s.count > 1 else s.n for w in range(s.count)] for s in windows]
        return Epoch(lengths, make_window)

    def _epoch_by_user(self, index: int) -> Epoch:
        """Return an epoch of whole users in a new order; a window is a run of users of that order."""
        runs_of_shard, lengths = [], []
        for s in range(len(self._shards)):
            low, high = (int(np.searchsorted(self._first, b, side="left")) for b in self._shards.bounds[s : s + 2])
            users = np.arange(low if s else 0, high)
            if self._shuffle:
                rng = window_rng(self._seed, 0x706F, index, s)(0)
                users = users[np.argsort(rng.permutation(len(users)), kind="stable")]
            ends = np.cumsum(self._first[users + 1] - self._first[users])
            total = int(ends[-1]) if len(ends) else 0
            size = max(1, self._sizes.user_run // len(self._shards))
            cuts = np.searchsorted(ends, np.arange(size, max(total, 1), size)) + 1
            runs = np.split(users, np.unique(cuts[cuts < len(users)]))
            runs_of_shard.append(runs)
            lengths.append([int((self._first[run + 1] - self._first[run]).sum()) for run in runs])

        def make_window(shard: int, w: int) -> Examples:
            users = runs_of_shard[shard][w]
            n = self._first[users + 1] - self._first[users]
            return self._examples(self._shards.numbers[run_indices(self._first[users], n)])

        return Epoch(lengths, make_window)

    def _examples(self, source: Shaped[npt.NDArray[Any], "n"]) -> Examples:
        one = np.ones(len(source), np.float32)
        weight = one if self._pairs.weight is None else self._pairs.weight[source]
        return Examples(self._pairs.user[source], self._pairs.item[source], one, weight, source.astype(np.int64))
