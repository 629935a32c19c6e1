"""Which training interactions come when: the same for any number of ranks, whatever lies in memory or on a disk.

The interactions are cut into shards, ranges of users. Each shard is shuffled by itself, and a batch is an equal part of
each, so that a rank reads its own shards only. A shard that is longer than a window is shuffled in two steps: its blocks
of neighbours, then the rows of as many blocks as a window holds (CorgiPile, Xu et al. 2022, section 4).

Everything depends on (seed, epoch, shard, window) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.data.dataset import Dataset
from twotower.encoders import Codes, Ints
from twotower.errors import ConfigError

BLOCK = 2**14
WINDOW = 2**22
"""Interactions that are shuffled together, a whole number of blocks."""


@dataclass(frozen=True)
class Examples:
    """Pairs in the order they are trained; aligned (n,) arrays."""

    user: Codes
    item: Codes
    label: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    source: Ints  # number of the interaction, -1 for a random negative

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, part: slice | Ints) -> Examples:
        return Examples(*(getattr(self, f.name)[part] for f in fields(self)))

    def pack(self) -> Ints:
        """All of it as whole numbers (n, 5), to be told to other ranks."""
        columns = (self.user, self.item, self.label.view(np.int32), self.weight.view(np.int32), self.source)
        return np.stack([c.astype(np.int64) for c in columns], 1)

    @classmethod
    def unpack(cls, packed: Ints) -> Examples:
        user, item, label, weight = packed[:, :4].T.astype(np.int32, order="C")
        return cls(user, item, label.view(np.float32), weight.view(np.float32), packed[:, 4].copy())

    @classmethod
    def join(cls, parts: list[Examples]) -> Examples:
        """One after another."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


class Shards:
    """The numbers of some interactions, cut into ranges of users of about as many interactions each."""

    def __init__(self, dataset: Dataset, numbers: npt.NDArray[Any], count: int, by_user: bool = False) -> None:
        """`numbers` rise, or are those of one user after another, which `by_user` says. Raises ConfigError if there are
        fewer interactions than shards."""
        if count > len(numbers):
            raise ConfigError(
                f"train.data_shards = {count}, and there are {len(numbers)} interactions to train; lower it"
            )
        if count == 1:
            self.numbers, self.bounds = numbers, np.array([0, len(numbers)])
            return
        users = dataset.pairs.user
        if by_user or dataset.by_user:
            ends = _shard_ends(users, numbers, count)
            self.numbers, self.bounds = numbers, np.array([0, *ends, len(numbers)])
            return
        per_user = np.cumsum(np.bincount(users[numbers]))
        last = np.searchsorted(per_user, np.arange(1, count) * len(numbers) // count)  # of each shard the last user
        shard = np.searchsorted(last, users[numbers])
        self.numbers = numbers[np.argsort(shard, kind="stable")]
        self.bounds = np.r_[0, np.cumsum(np.bincount(shard, minlength=count))]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def of(self, shard: int) -> npt.NDArray[Any]:
        return self.numbers[self.bounds[shard] : self.bounds[shard + 1]]


def _shard_ends(users: Codes, numbers: npt.NDArray[Any], count: int) -> list[int]:
    """Of each shard but the last the place where its last user ends: nobody is in two shards."""
    ends = []
    for n in range(1, count):
        place = n * len(numbers) // count
        wanted, low, high = users[numbers[place - 1]], place, len(numbers)
        while low < high:  # the users of `numbers` rise
            middle = (low + high) // 2
            low, high = (middle + 1, high) if users[numbers[middle]] <= wanted else (low, middle)
        ends.append(low)
    return ends


class ShuffleWindows:
    """The windows of one shard in one epoch: which of its places are shuffled together, and in what order they come."""

    def __init__(self, n: int, shuffle: bool, rng: Callable[[int], np.random.Generator], shards: int = 1) -> None:
        """`rng(w)` is that of window w. One window of each of the `shards` is held at a time, together about WINDOW rows."""
        self.n, self.shuffle, self.rng = n, shuffle, rng
        self._each = max(1, WINDOW // BLOCK // shards)
        self.count = max(1, -(-n // (self._each * BLOCK)))
        self._blocks = np.arange(-(-n // BLOCK))
        if shuffle and self.count > 1:
            whole = n // BLOCK  # the one that is not whole stays the last
            self._blocks[:whole] = rng(-1).permutation(whole)

    def blocks(self, window: int) -> Ints:
        """The blocks of a window."""
        each = self._each
        return self._blocks[window * each : (window + 1) * each]

    def places(self, window: int) -> Ints:
        """The places (m,) of a window's rows in the shard, not shuffled yet."""
        if self.count == 1:
            return np.arange(self.n)
        starts = self.blocks(window) * BLOCK
        return np.concatenate([np.arange(s, min(s + BLOCK, self.n)) for s in starts.tolist()])


WindowMaker = Callable[[int, int], Examples]


class Epoch:
    """The examples of one epoch, made a window at a time."""

    def __init__(self, lengths: list[list[int]], window: WindowMaker) -> None:
        """`lengths[s][w]` is the number of examples of window w of shard s, which `window(s, w)` makes."""
        self._ends = [np.cumsum(of) for of in lengths]
        self._window = window
        self._held: dict[int, tuple[int, Examples]] = {}

    def __len__(self) -> int:
        return sum(self.lengths)

    @cached_property
    def lengths(self) -> list[int]:
        """Examples of each shard."""
        return [int(ends[-1]) for ends in self._ends]

    def cut(self, number: int, size: int) -> list[slice]:
        """Of each shard the part that batch `number`, of `size` examples, takes: the parts of a shard are in proportion
        to it, so that all shards end together, in the last batch."""
        n = len(self)
        starts = [[min(of, b * size * of // n) for of in self.lengths] for b in (number, number + 1)]
        return [slice(a, b) for a, b in zip(*starts, strict=True)]

    def of(self, shard: int, part: slice) -> Examples:
        """Some examples of a shard; neighbouring parts are cheap."""
        ends = self._ends[shard]
        found = []
        for w in range(int(np.searchsorted(ends, part.start, side="right")), len(ends)):
            start = int(ends[w - 1]) if w else 0
            if start >= part.stop:
                break
            found.append(self._get(shard, w)[max(0, part.start - start) : part.stop - start])
        return Examples.join(found or [self._get(shard, 0)[:0]])

    def _get(self, shard: int, window: int) -> Examples:
        held = self._held.get(shard)
        if held is None or held[0] != window:
            self._held.pop(shard, None)
            self._held[shard] = held = (window, self._window(shard, window))
        return held[1]

    # All of it at once, shard after shard.

    @cached_property
    def _all(self) -> Examples:
        return Examples.join([self.of(s, slice(0, n)) for s, n in enumerate(self.lengths)])

    @property
    def user(self) -> Codes:
        return self._all.user

    @property
    def item(self) -> Codes:
        return self._all.item

    @property
    def label(self) -> npt.NDArray[np.float32]:
        return self._all.label

    @property
    def weight(self) -> npt.NDArray[np.float32]:
        return self._all.weight

    @property
    def source(self) -> Ints:
        return self._all.source
