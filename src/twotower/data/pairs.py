"""Pairs of users and items in the order of the interactions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Bools, Codes, Ints


@dataclass(frozen=True)
class Pairs:
    """Aligned (n,) arrays: user row, item row, and whether the user liked the item."""

    user: Codes
    item: Codes
    positive: Bools

    def __len__(self) -> int:
        return len(self.user)

    def take(self, keep: npt.NDArray[np.bool_ | np.integer] | slice) -> Pairs:
        """Return the pairs at `keep`, a mask, indices or a slice."""
        return Pairs(self.user[keep], self.item[keep], self.positive[keep])

    @classmethod
    def concatenated(cls, parts: Sequence[Pairs]) -> Pairs:
        """Return the pairs of all parts, one part after the other."""
        user, item = np.concatenate([p.user for p in parts]), np.concatenate([p.item for p in parts])
        return cls(user, item, np.concatenate([p.positive for p in parts]))

    def renumbered(self, user: Ints, item: Ints) -> Pairs:
        """Return the pairs with rows mapped by `user` (n_users,) and `item` (n_items,), without pairs that map to -1."""
        users, items = user[self.user], item[self.item]
        keep = (users >= 0) & (items >= 0)
        return Pairs(users[keep].astype(np.int32), items[keep].astype(np.int32), self.positive[keep])


COUNT_BLOCK_ROWS = 2**22
"""Values counted at a time, which bounds the memory of a count."""


def counts(values: npt.NDArray[np.integer], n: int) -> Ints:
    """Return (n,) counts of the values 0..n-1."""
    found = np.zeros(n, np.int64)
    for start in range(0, len(values), COUNT_BLOCK_ROWS):
        found += np.bincount(values[start : start + COUNT_BLOCK_ROWS], minlength=n)
    return found
