"""Sets of rows and of pairs: membership, keys of pairs, distinct rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Bools, Ints, Rows

Sorted = npt.NDArray[np.number]
MAX_CACHED_PAIRS = 2**26
"""Default number of pairs whose sorted keys are cached (512 MiB); above it, each call makes the keys of its users."""


@dataclass
class DistinctRows:
    """Finds the distinct rows of a batch without sorting, by the position of the last occurrence of each row."""

    n: int
    _slot: Ints = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._slot = np.zeros(self.n, np.int64)

    def __call__(self, rows: npt.NDArray[np.integer]) -> tuple[Ints, Ints]:
        """Return the distinct rows (U,) of rows (B,), and the index (B,) of each of the B in them."""
        rows, here = rows.astype(np.int64), np.arange(len(rows))
        self._slot[rows] = here
        distinct = rows[self._slot[rows] == here]
        self._slot[distinct] = here[: len(distinct)]
        return distinct, self._slot[rows]


def distinct_keys(keys: Ints) -> Ints:
    """Return the distinct keys, ascending. `numpy.unique` hashes long arrays of distinct keys, twenty times slower."""
    ordered = np.sort(keys, kind="stable")  # keys of pairs are often in the order of their users
    return ordered[np.r_[True, ordered[1:] != ordered[:-1]]] if len(ordered) else ordered


def is_in_sorted(members: Sorted, values: Sorted) -> Bools:
    """Return a mask (n, …): True if a value is in `members`, an ascending array."""
    return find_in_sorted(members, values)[1]


def find_in_sorted(members: Sorted, values: Sorted) -> tuple[Ints, Bools]:
    """Return the place of each of `values` (n, …) in `members`, an ascending array, and a mask of present values.

    The place of an absent value is any place of the array, 0 for an empty array."""
    if not len(members):
        return np.zeros(values.shape, np.int64), np.zeros(values.shape, np.bool_)
    places: Ints = np.minimum(np.searchsorted(members, values), len(members) - 1)
    return places, np.equal(members[places], values)


def pair_keys(users: npt.NDArray[np.integer], items: npt.NDArray[np.integer], n_items: int) -> Ints:
    """Return a number for each pair of broadcast users and items, ordered by user, then item."""
    keys: Ints = users.astype(np.int64) * n_items + items
    return keys


def sorted_unique(rows: Rows) -> Rows:
    """Return the distinct rows, ascending; the same array if it already is."""
    if (rows[1:] > rows[:-1]).all():
        return rows
    rows = np.sort(rows)
    unique: Rows = rows[np.concatenate([[True], rows[1:] != rows[:-1]])]
    return unique


def places_of_rows(rows: Ints, n: int) -> Ints:
    """Return the place (n,) of each row 0..n-1 in distinct `rows`, -1 for an absent row."""
    places = np.full(n, -1, np.int64)
    places[rows] = np.arange(len(rows))
    return places


class PairSet:
    """A set of (user, item) pairs that finds many pairs by one binary search."""

    def __init__(self, items: Ragged, n_items: int, max_cached_pairs: int = MAX_CACHED_PAIRS) -> None:
        """Take the distinct ascending `items` (0..n_items-1) of each user."""
        self.items, self.n_items = items, n_items
        self._cached = self._keys(np.arange(len(items))) if len(items.values) <= max_cached_pairs else None

    def _keys(self, users: Ints) -> Ints:
        """Return the ascending keys of the pairs of distinct ascending users."""
        rows = self.items.take(users)
        return pair_keys(np.repeat(users, rows.lengths), rows.values, self.n_items)

    def contains(self, users: Ints, items: Ints) -> Bools:
        """Return a flag for each pair (n, …) of broadcast users and items; False for an item of -1."""
        keys = self._keys(np.unique(users)) if self._cached is None else self._cached
        return is_in_sorted(keys, pair_keys(users, items, self.n_items))
