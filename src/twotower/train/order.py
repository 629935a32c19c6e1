"""Order of an epoch: the same for any number of ranks, in memory and on disk.

Interactions are cut into shards, which are ranges of users. Each shard is shuffled separately, and a batch takes an
equal part of each shard, so a rank reads its own shards only. A shard longer than a window is shuffled in two steps:
first its blocks of adjacent rows, then the rows of the blocks in a window (CorgiPile, Xu et al. 2022, section 4).

The order depends on (seed, epoch, shard, window) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from twotower.arrays.types import Codes, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError


@dataclass(frozen=True)
class ShuffleSizes:
    """Numbers of interactions that are read and shuffled together. Memory is proportional to them."""

    block: int = 2**14
    """Adjacent interactions in a block; the blocks of a shard are shuffled."""
    window: int = 2**22
    """Interactions that are shuffled together, over all shards; a whole number of blocks."""
    user_run: int = 2**20
    """Interactions that are read together if whole users are shuffled, over all shards."""


@dataclass(frozen=True)
class Examples:
    """Pairs in training order."""

    user: Shaped[Codes, "n"]
    item: Shaped[Codes, "n"]
    label: Shaped[Floats, "n"]
    weight: Shaped[Floats, "n"]
    source: Shaped[Ints, "n"]  # index of the interaction; ~i for a pair drawn for the positive at index i

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, part: slice | Shaped[Ints, "m"]) -> Examples:
        return Examples(*(getattr(self, f.name)[part] for f in fields(self)))

    def pack(self) -> Shaped[Ints, "n 5"]:
        """Return all columns in one array, floats as their bits, to send to other ranks."""
        columns = (self.user, self.item, self.label.view(np.int32), self.weight.view(np.int32), self.source)
        return np.stack([c.astype(np.int64) for c in columns], 1)

    @classmethod
    def unpack(cls, packed: Shaped[Ints, "n 5"]) -> Examples:
        user, item, label, weight = packed[:, :4].T.astype(np.int32, order="C")
        return cls(user, item, label.view(np.float32), weight.view(np.float32), packed[:, 4].copy())

    @classmethod
    def concatenate(cls, parts: list[Examples]) -> Examples:
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


class Shards:
    """Indices of interactions, cut into ranges of users with about equally many interactions."""

    def __init__(self, dataset: Dataset, numbers: Shaped[Codes | Ints, "n"], count: int, by_user: bool = False) -> None:
        """Cut ascending `numbers`, or with `by_user` numbers in the order of users. Raises ConfigError if `count` >
        n."""
        if count > len(numbers):
            raise ConfigError(
                f"train.data_shards = {count} is more than the {len(numbers)} interactions of training; lower it"
            )
        if count == 1:
            self.numbers, self.bounds = numbers, np.array([0, len(numbers)])
            return
        users = dataset.pairs.user
        if by_user or dataset.grouped_by_user:
            ends = _shard_ends(users, numbers, count)
            self.numbers, self.bounds = numbers, np.array([0, *ends, len(numbers)])
            return
        per_user = np.cumsum(np.bincount(users[numbers]))
        last_user = np.searchsorted(per_user, np.arange(1, count) * len(numbers) // count)  # of each shard but the last
        shard = np.searchsorted(last_user, users[numbers])
        self.numbers = numbers[np.argsort(shard, kind="stable")]
        self.bounds = np.r_[0, np.cumsum(np.bincount(shard, minlength=count))]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, shard: int) -> Shaped[Codes | Ints, "n"]:
        return self.numbers[self.bounds[shard] : self.bounds[shard + 1]]


def _shard_ends(users: Shaped[Codes, "pairs"], numbers: Shaped[Codes | Ints, "n"], count: int) -> list[int]:
    """Return the end of each shard but the last. It is the end of a user, so that no user is in two shards."""
    ends = []
    for shard in range(1, count):
        place = shard * len(numbers) // count
        user, low, high = users[numbers[place - 1]], place, len(numbers)
        while low < high:  # a binary search: users ascend
            middle = (low + high) // 2
            low, high = (middle + 1, high) if users[numbers[middle]] <= user else (low, middle)
        ends.append(low)
    return ends


class ShuffleWindows:
    """Windows of one shard in one epoch: places that are shuffled together, and the order of the windows."""

    def __init__(
        self, n: int, shuffle: bool, rng: Callable[[int], np.random.Generator], shards: int = 1,
        sizes: ShuffleSizes | None = None,
    ) -> None:  # fmt: skip
        """Cut a shard of n rows. `rng(w)` returns the generator of window w, `rng(-1)` the generator of the blocks'
        order. One window of each of the `shards` is held at a time, about `sizes.window` rows in all."""
        sizes = sizes or ShuffleSizes()
        self.n, self.shuffle, self.rng, self.block = n, shuffle, rng, sizes.block
        self._blocks_per_window = max(1, sizes.window // sizes.block // shards)
        self.count = max(1, -(-n // (self._blocks_per_window * self.block)))
        self._blocks = np.arange(-(-n // self.block))
        if shuffle and self.count > 1:
            whole = n // self.block  # an incomplete block stays last
            self._blocks[:whole] = rng(-1).permutation(whole)

    def blocks(self, window: int) -> Shaped[Ints, "b"]:
        each = self._blocks_per_window
        return self._blocks[window * each : (window + 1) * each]

    def places(self, window: int) -> Shaped[Ints, "n"]:
        """Return the places of a window's rows in the shard, block by block, not shuffled yet."""
        if self.count == 1:
            return np.arange(self.n)
        starts = self.blocks(window) * self.block
        return np.concatenate([np.arange(s, min(s + self.block, self.n)) for s in starts.tolist()])


WindowMaker = Callable[[int, int], Examples]
"""(shard, window) -> the shuffled examples of the window."""


class Epoch:
    """Examples of one epoch, made one window at a time."""

    def __init__(self, lengths: list[list[int]], make_window: WindowMaker) -> None:
        """Describe an epoch: `make_window(s, w)` returns the `lengths[s][w]` examples of window w of shard s."""
        self._ends = [np.cumsum(shard) for shard in lengths]
        self._make_window = make_window
        self._held: dict[int, tuple[int, Examples]] = {}

    def __len__(self) -> int:
        return sum(self.lengths)

    @cached_property
    def lengths(self) -> list[int]:
        """The number of examples of each shard."""
        return [int(ends[-1]) for ends in self._ends]

    def batch_slices(self, batch: int, size: int) -> list[slice]:
        """Return each shard's part of a batch (0, 1, …) of `size` examples, in proportion to the shard's length."""
        n = len(self)
        starts = [[min(length, b * size * length // n) for length in self.lengths] for b in (batch, batch + 1)]
        return [slice(a, b) for a, b in zip(*starts, strict=True)]

    def take(self, shard: int, part: slice) -> Examples:
        """Return a part of a shard's examples. Ascending parts are cheap: one window of each shard is held."""
        ends = self._ends[shard]
        parts = []
        for w in range(int(np.searchsorted(ends, part.start, side="right")), len(ends)):
            start = int(ends[w - 1]) if w else 0
            if start >= part.stop:
                break
            parts.append(self._window(shard, w)[max(0, part.start - start) : part.stop - start])
        return Examples.concatenate(parts or [self._window(shard, 0)[:0]])

    def _window(self, shard: int, window: int) -> Examples:
        held = self._held.get(shard)
        if held is None or held[0] != window:
            self._held.pop(shard, None)
            self._held[shard] = held = (window, self._make_window(shard, window))
        return held[1]

    @cached_property
    def all(self) -> Examples:
        """The whole epoch, shard by shard."""
        return Examples.concatenate([self.take(s, slice(0, n)) for s, n in enumerate(self.lengths)])


def shuffle_windows(
    shards: Shards, shuffle: bool, seed: int, purpose: int, epoch: int, sizes: ShuffleSizes
) -> list[ShuffleWindows]:
    return [
        ShuffleWindows(len(shards[s]), shuffle, window_rng(seed, purpose, epoch, s), len(shards), sizes)
        for s in range(len(shards))
    ]


def window_rng(seed: int, purpose: int, epoch: int, shard: int) -> Callable[[int], np.random.Generator]:
    """Return the function from a window of a shard to its generator; -1 is the window of the blocks' order."""

    def rng(window: int) -> np.random.Generator:
        counter = [0, window % 2**32, shard, epoch]
        return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=counter))

    return rng
