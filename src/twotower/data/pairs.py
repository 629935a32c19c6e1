"""Pairs of users and items in the order of the interactions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    def take(self, keep: Any) -> Pairs:
        """Return the pairs at `keep`, a mask, indices or a slice."""
        return Pairs(self.user[keep], self.item[keep], self.positive[keep])


COUNT_BLOCK_ROWS = 2**22
"""Values counted at a time, which bounds the memory of a count."""


def counts(values: npt.NDArray[Any], n: int) -> Ints:
    """Return (n,) counts of the values 0..n-1."""
    found = np.zeros(n, np.int64)
    for start in range(0, len(values), COUNT_BLOCK_ROWS):
        found += np.bincount(values[start : start + COUNT_BLOCK_ROWS], minlength=n)
    return found
