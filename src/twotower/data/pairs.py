"""Pairs of users and items in the order of the interactions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from twotower.arrays.pieces import PIECE_ROWS, pieces, temporary_array
from twotower.arrays.ragged import run_indices, stable_order
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
        n, end = sum(len(p) for p in self._renumbered(user, item)), 0
        out = Pairs(temporary_array(n, np.int32), temporary_array(n, np.int32), temporary_array(n, np.bool_))
        for found in self._renumbered(user, item):
            part = slice(end, end := end + len(found))
            out.user[part], out.item[part], out.positive[part] = found.user, found.item, found.positive
        return out

    def _renumbered(self, user: Ints, item: Ints) -> Iterator[Pairs]:
        for part in pieces(len(self)):
            users, items = user[self.user[part]], item[self.item[part]]
            keep = (users >= 0) & (items >= 0)
            yield Pairs(users[keep].astype(np.int32), items[keep].astype(np.int32), self.positive[part][keep])


@dataclass(frozen=True)
class GroupedPairs:
    """Pairs of U users, grouped by user: those of user u are `starts[u]` to `starts[u] + lengths[u]` of (n,) arrays."""

    item: Codes
    positive: Bools
    starts: Ints
    lengths: Ints
    item_rows: Ints | None = None
    """New row of each value of `item`, -1 for an item that is left out; None without new rows."""

    @classmethod
    def of_sorted(cls, pairs: Pairs, n_users: int) -> GroupedPairs:
        """Group pairs whose user rows rise, without a copy."""
        ends = np.searchsorted(pairs.user, np.arange(n_users, dtype=pairs.user.dtype), side="right")
        starts = np.concatenate([[0], ends[:-1]])
        return cls(pairs.item, pairs.positive, starts, ends - starts)

    @classmethod
    def of(cls, pairs: Pairs, n_users: int) -> GroupedPairs:
        """Group pairs in any order; those of a user keep theirs."""
        order = stable_order(pairs.user)
        lengths = counts(pairs.user, n_users)
        return cls(pairs.item[order], pairs.positive[order], np.cumsum(lengths) - lengths, lengths)

    def take(self, users: Ints) -> Pairs:
        """Return the pairs of some user rows, one user after another; their user rows are places in `users`."""
        lengths = self.lengths[users]
        at = run_indices(self.starts[users], lengths)
        owner, item, positive = (
            np.repeat(np.arange(len(users), dtype=np.int32), lengths),
            self.item[at],
            self.positive[at],
        )
        if self.item_rows is None:
            return Pairs(owner, item, positive)
        item = self.item_rows[item].astype(np.int32)
        keep = item >= 0
        return Pairs(owner[keep], item[keep], positive[keep])

    def renumbered(self, users: Ints, items: Ints) -> GroupedPairs:
        """Return the pairs of some user rows, which become rows 0, 1, …; `items` is the new row of each item, -1 for none."""
        return replace(self, starts=self.starts[users], lengths=self.lengths[users], item_rows=items)


def counts(values: npt.NDArray[np.integer], n: int, where: Bools | None = None) -> Ints:
    """Return (n,) counts of the values 0..n-1, of all or of those in a mask."""
    found = np.zeros(n, np.int64)
    for part in pieces(len(values)):
        counted = values[part] if where is None else values[part][where[part]]
        if n > PIECE_ROWS:
            np.add.at(found, counted, 1)
        else:
            found += np.bincount(counted, minlength=n)
    return found
