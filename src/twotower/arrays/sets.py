"""Sets of rows: membership, keys of pairs, distinct rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Codes, Ints, Rows


@dataclass
class DistinctRows:
    """Finds the distinct rows of a batch without sorting, with a slot per row for the position of its last occurrence."""

    n: int
    _slot: Ints = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._slot = np.zeros(self.n, np.int64)

    def __call__(self, rows: Codes) -> tuple[Ints, Ints]:
        """Return the distinct rows (U,) of rows (B,), and the index (B,) of each of the B in them."""
        rows, here = rows.astype(np.int64), np.arange(len(rows))
        self._slot[rows] = here
        distinct = rows[self._slot[rows] == here]
        self._slot[distinct] = here[: len(distinct)]
        return distinct, self._slot[rows]


def is_in_sorted(members: Rows, values: Rows) -> npt.NDArray[np.bool_]:
    """Return a mask of those `values` that are in `members`, an ascending array."""
    if not len(members):
        return np.zeros(values.shape, np.bool_)
    return np.equal(members[np.minimum(np.searchsorted(members, values), len(members) - 1)], values)


def sorted_unique(rows: Rows) -> Rows:
    """Return the rows in ascending order without repeats; the same array if it is so already."""
    if (rows[1:] > rows[:-1]).all():
        return rows
    rows = np.sort(rows)
    unique: Rows = rows[np.concatenate([[True], rows[1:] != rows[:-1]])]
    return unique
