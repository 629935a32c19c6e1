"""Samplers of the examples of every epoch: labelled pairs for pointwise losses, positives for contrastive losses.

Draws depend on (seed, epoch) and the place in the epoch only, so a resumed run draws the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.arrays.pieces import pieces
from twotower.arrays.ragged import run_indices, stable_order
from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.mixture import ContextPositives
from twotower.train.order import Epoch, Examples, Shards, ShuffleSizes, ShuffleWindows, shuffle_windows, window_rng


class PositiveSampler:
    """Training positives of every epoch, for contrastive losses."""

    def __init__(
        self, dataset: Dataset, seed: int, shuffle: bool = True, by_user: bool = False, shards: int = 1,
        sizes: ShuffleSizes | None = None,
    ) -> None:  # fmt: skip
        """Cut the positives into shards. `by_user` shuffles users and keeps each user's positives together, oldest
        first. Raises ConfigError if there are more `shards` than positives."""
        self._seed, self._shuffle, self._by_user, self._sizes = seed, shuffle, by_user, sizes or ShuffleSizes()
        self._pairs = dataset.pairs
        numbers: npt.NDArray[Any] = dataset.positives_by_user.values if by_user else dataset.positive_indices
        self._shards = Shards(dataset, numbers, shards, by_user)
        self._first = dataset.positives_by_user.offsets if by_user else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._shards.numbers)

    def epoch(self, index: int) -> Epoch:
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
        """Return an epoch of whole users in a new order; a window is a run of users."""
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
        pairs, label = self._pairs, np.ones(len(source), np.float32)
        return Examples(pairs.user[source], pairs.item[source], label, pairs.weight[source], source.astype(np.int64))


class PairSampler:
    """Labelled pairs of every epoch, for pointwise losses: the training interactions, and pairs that sources draw anew.

    A source draws n pairs for each positive of a user that it has items for. A drawn pair weighs w times its positive's
    weight. With w = s / (1 - sum of shares) * dislikes / pairs, both summed by weight, the source has the share s of
    the weight of all negatives. Without dislikes w is 1. A pair whose item is one of the user's positives in the same
    context has weight 0.
    """

    def __init__(
        self, dataset: Dataset, config: NegativesConfig, seed: int, shuffle: bool = True, shards: int = 1,
        sizes: ShuffleSizes | None = None,
    ) -> None:  # fmt: skip
        """Count the pairs of each shard. Raises ConfigError if there are more `shards` than interactions."""
        self._seed, self._shuffle, self._sizes = seed, shuffle, sizes or ShuffleSizes()
        self._pairs = dataset.pairs
        self._masks = [ContextPositives(dataset)] if dataset.schema.side("context") else []
        self._shards = Shards(dataset, dataset.train_indices, shards)
        sources = config.pairs
        self._draws = [(source.build_pairs(dataset), source.n) for source in sources]
        totals = np.zeros(len(sources))
        self._counts = [self._count_by_block(shard, totals) for shard in range(shards)]
        disliked = self._weight_of(dataset.train_indices) - self._weight_of(dataset.positive_indices)
        rest = 1 - sum(source.share for source in sources)
        self.weights = [
            source.share / rest * disliked / total if disliked and total else 1.0
            for source, total in zip(sources, totals.tolist(), strict=True)
        ]
        """Weight of a drawn pair of each source."""

    def _weight_of(self, rows: Shaped[npt.NDArray[Any], "n"]) -> float:
        weight = self._pairs.weight
        return sum(float(weight[rows[part]].sum(dtype=np.float64)) for part in pieces(len(rows)))

    def _count_by_block(self, shard: int, totals: Shaped[Doubles, "sources"]) -> Shaped[Ints, "sources blocks"]:
        """Return the number of drawn pairs of each block of a shard, and add their weights to `totals`."""
        rows, size = self._shards[shard], self._sizes.block
        blocks = [self._positives_to_draw_for(rows[b : b + size]) for b in range(0, len(rows), size)]
        for block in blocks:
            totals += [self._weight_of(positives) for positives in block]
        counts = np.array([[len(positives) for positives in block] for block in blocks], np.int64)
        return counts.reshape(len(blocks), len(self._draws)).T

    def _positives_to_draw_for(self, rows: Shaped[npt.NDArray[Any], "n"]) -> list[Shaped[npt.NDArray[Any], "_"]]:
        """Return for each source the positives that it draws pairs for, once per pair and sorted by user."""
        rows = rows[self._pairs.positive[rows] & (self._pairs.weight[rows] > 0)]
        users, found = self._pairs.user[rows], []
        for draws, n in self._draws:
            can = draws.can_draw(users)
            found.append(np.repeat(rows[can][stable_order(users[can])], n))
        return found

    def __len__(self) -> int:
        return len(self._shards.numbers) + sum(int(counts.sum()) for counts in self._counts)

    def epoch(self, index: int) -> Epoch:
        windows = shuffle_windows(self._shards, self._shuffle, self._seed, 0x6E65, index, self._sizes)

        def make_window(shard: int, w: int) -> Examples:
            return self._make_window(self._shards[shard], windows[shard], w)

        def length(shard: int, w: int) -> int:
            several = windows[shard].count > 1
            rows = len(windows[shard].places(w)) if several else windows[shard].n
            blocks = windows[shard].blocks(w) if several else slice(None)
            return rows + int(self._counts[shard][:, blocks].sum())

        return Epoch([[length(s, w) for w in range(of_shard.count)] for s, of_shard in enumerate(windows)], make_window)

    def _make_window(self, rows: Shaped[npt.NDArray[Any], "_"], windows: ShuffleWindows, w: int) -> Examples:
        """Return the examples of window w of a shard with the interactions `rows`."""
        rng = windows.rng(w)
        source = rows[windows.places(w)] if windows.count > 1 else rows
        positives = self._positives_to_draw_for(source)
        users = [self._pairs.user[of] for of in positives]
        n, extra = len(source), sum(map(len, users))
        order = rng.permutation(n + extra) if self._shuffle else np.arange(n + extra)
        drawn = [draws.draw(u.astype(np.int64), rng) for (draws, _), u in zip(self._draws, users, strict=True)]
        weights = np.repeat(np.array(self.weights, np.float32), list(map(len, users)))
        weights *= np.concatenate([np.zeros(0, np.float32), *(self._pairs.weight[of] for of in positives)])
        for mask in self._masks:  # a source does not read the context
            drawn_for, items = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (positives, drawn))
            weights *= ~mask.include(drawn_for, items)
        return Examples(
            user=np.concatenate([self._pairs.user[source], *users]),
            item=np.concatenate([self._pairs.item[source], *drawn]),
            label=np.concatenate([self._pairs.positive[source], np.zeros(extra, bool)]).astype(np.float32),
            weight=np.concatenate([self._pairs.weight[source], weights]),
            source=np.concatenate([source, *(~of.astype(np.int64) for of in positives)]).astype(np.int64),
        )[order]
