"""Sets of rows: membership, keys of pairs, distinct rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Bools, Codes, Ints, Rows

Sorted = npt.NDArray[np.number]


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


def is_in_sorted(members: Sorted, values: Sorted) -> Bools:
    """Return a mask of those `values` (n, …) that are in `members`, an ascending array."""
    return find_in_sorted(members, values)[1]


def find_in_sorted(members: Sorted, values: Sorted) -> tuple[Ints, Bools]:
    """Return the place of each of `values` (n, …) in `members`, an ascending array, and a mask of those that are in it; the
    place of an absent value is one of the array, or 0 in an empty one."""
    if not len(members):
        return np.zeros(values.shape, np.int64), np.zeros(values.shape, np.bool_)
    places: Ints = np.minimum(np.searchsorted(members, values), len(members) - 1)
    return places, np.equal(members[places], values)


def pair_keys(users: npt.NDArray[np.integer], items: npt.NDArray[np.integer], n_items: int) -> Ints:
    """Return one number for each pair of broadcast users and items, in the order of users and then items."""
    keys: Ints = users.astype(np.int64) * n_items + items
    return keys


def sorted_unique(rows: Rows) -> Rows:
    """Return the rows in ascending order without repeats; the same array if it is so already."""
    if (rows[1:] > rows[:-1]).all():
        return rows
    rows = np.sort(rows)
    unique: Rows = rows[np.concatenate([[True], rows[1:] != rows[:-1]])]
    return unique


def places_of_rows(rows: Ints, n: int) -> Ints:
    """Return the place (n,) of each row 0..n-1 in distinct `rows`, -1 for a row that is absent."""
    places = np.full(n, -1, np.int64)
    places[rows] = np.arange(len(rows))
    return places
