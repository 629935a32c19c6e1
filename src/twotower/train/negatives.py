"""Training pairs of every epoch, and random negatives, drawn in this one place.

Disliked negatives are training interactions that the user did not like. Random negatives are items of the whole catalogue,
fresh every epoch, that the user has not seen in training: never a positive, and never in a history. Draws depend on (seed,
epoch) and the place in the epoch only, so a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from twotower.arrays.ragged import Ragged, run_indices
from twotower.arrays.sets import is_in_sorted, pair_keys
from twotower.arrays.types import Bools, Codes, Ints
from twotower.data.dataset import Dataset
from twotower.section import Positive, Section
from twotower.train.order import Epoch, Examples, Shards, ShuffleSizes, ShuffleWindows

MAX_CACHED_PAIRS = 2**26
"""Pairs whose sorted keys are held (512 MiB), by default; beyond them, the keys of the users of a call are made for it."""


class NegativesConfig(Section):
    """Negatives: labelled pairs for the loss 'bce', candidates for contrastive losses."""

    random: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Random unseen items per positive. bce: negative pairs, redrawn every epoch. Other losses: "
        "per-positive candidates without repeats, redrawn every batch. 0: off.",
    )
    random_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of random negatives in the total weight of negatives, beside disliked ones (bce).",
    )
    full: bool = Field(
        False, description="All items of the catalogue as candidates. Excludes other sources of candidates."
    )
    in_batch: bool = Field(True, description="Positives of the batch as shared candidates.")
    uniform: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Number of items drawn uniformly from the catalogue for each batch, as shared candidates. 0: off.",
    )
    popularity: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Number of items drawn by popularity^popularity_alpha for each batch, as shared candidates. 0: "
        "off.",
    )
    popularity_alpha: float = Field(
        0.75, ge=0, le=1, description="Exponent of the popularity draw. 0: uniform. 1: proportional to popularity."
    )
    cross_batch_memory: int = Field(
        0, ge=0, description="Number of positives of earlier batches whose item vectors are shared candidates. 0: off."
    )
    disliked: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Number of items per positive drawn from the user's training interactions that are no positives. "
        "0: off.",
    )
    hard: int = Field(
        0, ge=0, le=16, description="Maximum number of hard negatives per positive. Values above 2 seldom help. 0: off."
    )
    hard_ranks: tuple[Positive, Positive] = Field(
        (101, 500),
        description="First and last rank, from 1, of the catalogue as the current model ranks it, from which hard "
        "negatives are drawn.",
    )
    hard_ratio: float = Field(100.0, gt=0, description="Minimum number of other candidates per hard negative.")
    hard_every: int = Field(
        1, ge=1, description="Epochs between refreshes of the hard negatives. The first epoch has none."
    )
    hard_margin: float = Field(
        0.0, ge=0, description="Drop hard negatives that score within this margin of the positive. 0: off."
    )
    attribute: str = Field(
        "",
        description="Item feature, such as a genre or a city, whose values candidates share with the positive. Empty:"
        " off.",
    )
    attribute_items: int = Field(
        1,
        ge=1,
        le=100_000,
        description="Number of items per positive that share a value of `attribute` with it.",
    )
    mask_positives: bool = Field(
        True, description="Exclusion of a user's other training positives from the candidates."
    )

    @model_validator(mode="after")
    def _check(self) -> NegativesConfig:
        if self.hard_ranks[0] > self.hard_ranks[1]:
            raise ValueError(f"negatives.hard_ranks {list(self.hard_ranks)} ends before it begins")
        if self.full and (drawn := self.drawn()):
            raise ValueError(
                f"negatives.full makes every item a candidate, so negatives.{drawn[0]} adds none; drop one of the two"
            )
        return self

    def drawn(self) -> list[str]:
        """Return the names of the sources of candidates that are on, without `full` and `in_batch`."""
        return [
            s
            for s in ("uniform", "popularity", "cross_batch_memory", "disliked", "hard", "attribute")
            if getattr(self, s)
        ]


class PairSet:
    """A set of (user, item) pairs that finds many pairs at once by one binary search."""

    def __init__(self, items: Ragged, n_items: int, max_cached_pairs: int = MAX_CACHED_PAIRS) -> None:
        """Take the `items` of each user, distinct and rising, out of `n_items`."""
        self.items, self.n_items = items, n_items
        self._cached = self._keys(np.arange(len(items))) if len(items.values) <= max_cached_pairs else None

    def _keys(self, users: Ints) -> Ints:
        """Return one rising number for each pair of distinct rising users."""
        rows = self.items.take(users)
        return pair_keys(np.repeat(users, rows.lengths), rows.values, self.n_items)

    def contains(self, users: Ints, items: Ints) -> Bools:
        """Return a flag for each pair (n, …) of broadcast users and items; False for an item of -1."""
        keys = self._keys(np.unique(users)) if self._cached is None else self._cached
        return is_in_sorted(keys, pair_keys(users, items, self.n_items))


class RandomNegatives:
    """Uniform draws from the items that a user has not seen, exact and without rejection.

    The r-th unseen item of a user is r plus the number of seen items before it; with the seen ones p_0 < p_1 < … that is
    r + #{j : p_j - j <= r}, one binary search for all draws together.
    """

    def __init__(self, seen_items: Ragged, n_items: int, max_cached_pairs: int = MAX_CACHED_PAIRS) -> None:
        """Take the `seen_items` of each user, distinct and rising, out of `n_items`; they are never drawn."""
        self._seen, self._n_items = seen_items, n_items
        self.unseen_counts = n_items - seen_items.lengths
        """(n_users,) number of items that the user has not seen."""
        self._cached = self._keys(np.arange(len(seen_items))) if len(seen_items.values) <= max_cached_pairs else None

    def _keys(self, users: Ints) -> tuple[Ints, Ints]:
        """Return rising keys of distinct rising users, and the place where each user's keys begin."""
        seen = self._seen.take(users)
        rank = np.arange(len(seen.values)) - np.repeat(seen.offsets[:-1], seen.lengths)
        return np.repeat(users, seen.lengths) * (self._n_items + 1) + seen.values - rank, seen.offsets

    def draw(self, users: Ints, rng: np.random.Generator) -> Codes:
        """Draw one item row for each of `users` (n,), best sorted, each with at least one unseen item."""
        return self._unseen_item(users, (rng.random(len(users)) * self.unseen_counts[users]).astype(np.int64))

    def draw_distinct(self, users: Ints, n: int, rng: np.random.Generator) -> Ints:
        """Draw item rows (len(users), n), distinct in each row; -1 where a user has fewer than n unseen items.

        Floyd's sampling without replacement (Bentley and Floyd 1987), with one column for each of its rounds.
        """
        top = self.unseen_counts[users][:, None] - n + np.arange(n)  # of each round; below 0 there is nothing to draw
        ranks = (rng.random((len(users), n)) * (top + 1).clip(min=1)).astype(np.int64)
        for j in range(1, n):
            again = ((ranks[:, :j] == ranks[:, j, None]) & (top[:, :j] >= 0)).any(1)
            ranks[again, j] = top[again, j]
        drawn = self._unseen_item(np.repeat(users, n), ranks.ravel()).reshape(ranks.shape)
        return np.where(top >= 0, drawn, -1).astype(np.int64)

    def _unseen_item(self, users: Ints, r: Ints) -> Codes:
        """Return the `r`-th unseen item (n,) of each of `users` (n,)."""
        if self._cached is not None:
            (keys, first), index = self._cached, users
        else:
            distinct, index = np.unique(users, return_inverse=True)
            keys, first = self._keys(distinct)
        before = np.searchsorted(keys, users * (self._n_items + 1) + r, side="right") - first[index]
        out: Codes = (r + before).astype(np.int32)
        return out


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
        windows = _shuffle_windows(self._shards, self._shuffle, self._seed, 0x6E65, index, self._sizes)

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
        windows = _shuffle_windows(self._shards, self._shuffle, self._seed, 0x706F, index, self._sizes)

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
                rng = _window_rng(self._seed, 0x706F, index, s)(0)
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

    def _examples(self, source: npt.NDArray[Any]) -> Examples:
        one = np.ones(len(source), np.float32)
        return Examples(self._pairs.user[source], self._pairs.item[source], one, one, source.astype(np.int64))


def _shuffle_windows(
    shards: Shards, shuffle: bool, seed: int, purpose: int, epoch: int, sizes: ShuffleSizes
) -> list[ShuffleWindows]:
    """Return the windows of every shard in an epoch."""
    return [
        ShuffleWindows(len(shards[s]), shuffle, _window_rng(seed, purpose, epoch, s), len(shards), sizes)
        for s in range(len(shards))
    ]


def _window_rng(seed: int, purpose: int, epoch: int, shard: int) -> Callable[[int], np.random.Generator]:
    """Return the function from a window of a shard to its generator; -1 is the order of the shard's blocks."""

    def rng(window: int) -> np.random.Generator:
        counter = [0, window % 2**32, shard, epoch]
        return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=counter))

    return rng
