"""Pairs of users and items in the order of the interactions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import numpy.typing as npt

from twotower.arrays.pieces import PIECE_ROWS, is_constant, pieces, selected, temporary_array
from twotower.arrays.ragged import run_indices, stable_order
from twotower.arrays.types import Bools, Codes, Doubles, Floats, Ints, Numbers
from twotower.data.interaction_columns import Columns
from twotower.features.side import SideName

_ONE_NUMBER = ("weight", "event")
"""Columns that one number may stand for."""


@dataclass(frozen=True)
class Pairs:
    """Aligned (n,) arrays: user row, item row, whether the user liked the item, weight and type of event."""

    user: Codes
    item: Codes
    positive: Bools
    weight: Floats = field(default_factory=lambda: np.ones((), np.float32))
    """Weights, finite and at least 0; ones if the log has none. One number stands for all."""
    event: Codes = field(default_factory=lambda: np.zeros((), np.int32))
    """Code of the type of each event, 0 for one that the schema does not name; zeros if no history reads them."""

    def __post_init__(self) -> None:
        for name in _ONE_NUMBER:
            if not (column := getattr(self, name)).ndim:
                object.__setattr__(self, name, np.broadcast_to(column, len(self.user)))

    def __len__(self) -> int:
        return len(self.user)

    @property
    def target(self) -> Bools:
        """True for a positive of a weight above 0: one that models learn and are measured by."""
        return target_mask(self.positive, self.weight if self.weighted else None)

    @property
    def weighted(self) -> bool:
        """True if the log has weights."""
        return not is_constant(self.weight)

    @property
    def labels(self) -> Bools:
        """Labels of the pairs of a weight above 0, those that count; with weights a temporary array."""
        return selected(self.positive, self.weight > 0) if self.weighted else self.positive

    @property
    def counted(self) -> Pairs:
        """The pairs of a weight above 0."""
        return self.take(self.weight > 0) if self.weighted else self

    def sums(self, side: SideName, n: int, where: Bools | None = None) -> Numbers:
        """Return (n,) the sum of the weights of the pairs of each row of a side, of all or of those in a mask; whole
        numbers if the log has no weights."""
        rows = self.user if side == "user" else self.item
        return weight_sums(rows, n, self.weight, where) if self.weighted else counts(rows, n, where)

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Return the names of all columns."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def of(cls, columns: Columns) -> Pairs:
        """Take the columns of pairs that are among those of interactions."""
        return cls(**{name: columns[name] for name in cls.columns() if name in columns})

    @property
    def arrays(self) -> Columns:
        """Columns by name, without weights and events that are all one number."""
        found: Columns = {name: getattr(self, name) for name in self.columns()}
        return {name: c for name, c in found.items() if name not in _ONE_NUMBER or not is_constant(c)}

    def take(self, keep: npt.NDArray[np.bool_ | np.integer] | slice) -> Pairs:
        """Return the pairs at `keep`, a mask, indices or a slice."""
        return Pairs(**{name: column[keep] for name, column in self.arrays.items()})

    @classmethod
    def concatenated(cls, parts: Sequence[Pairs]) -> Pairs:
        """Return the pairs of all parts, one part after the other."""
        names = dict.fromkeys(name for p in parts for name in p.arrays)
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})

    def renumbered(self, user: Ints, item: Ints) -> Pairs:
        """Return the pairs with rows mapped by `user` (n_users,) and `item` (n_items,), without pairs that map to
        -1."""
        n, end = sum(len(p) for p in self._renumbered(user, item)), 0
        types = {name: column.dtype.type for name, column in self.arrays.items()} | {"user": np.int32, "item": np.int32}
        out = Pairs(**{name: temporary_array(n, dtype) for name, dtype in types.items()})
        for found in self._renumbered(user, item):
            part = slice(end, end := end + len(found))
            for name, column in found.arrays.items():
                out.arrays[name][part] = column
        return out

    def _renumbered(self, user: Ints, item: Ints) -> Iterator[Pairs]:
        for part in pieces(len(self)):
            some = self.take(part)
            users, items = user[some.user].astype(np.int32), item[some.item].astype(np.int32)
            yield replace(some, user=users, item=items).known()

    def known(self) -> Pairs:
        """Return the pairs whose rows are not -1."""
        return self.take((self.user >= 0) & (self.item >= 0))


@dataclass(frozen=True)
class GroupedPairs:
    """Pairs of U users, grouped by user: those of user u are `starts[u]` to `starts[u] + lengths[u]` of (n,) arrays."""

    columns: Columns
    """Columns of the pairs by name, without `user`."""
    starts: Ints
    lengths: Ints
    item_rows: Ints | None = None
    """New row of each value of the column `item`, -1 for an item that is left out; None without new rows."""

    @classmethod
    def of_sorted(cls, pairs: Pairs, n_users: int) -> GroupedPairs:
        """Group pairs whose user rows rise, without a copy."""
        ends = np.searchsorted(pairs.user, np.arange(n_users, dtype=pairs.user.dtype), side="right")
        starts = np.concatenate([[0], ends[:-1]])
        return cls(_without_user(pairs), starts, ends - starts)

    @classmethod
    def of(cls, pairs: Pairs, n_users: int) -> GroupedPairs:
        """Group pairs in any order; those of a user keep theirs."""
        order = stable_order(pairs.user)
        lengths = counts(pairs.user, n_users)
        columns = {name: column[order] for name, column in _without_user(pairs).items()}
        return cls(columns, np.cumsum(lengths) - lengths, lengths)

    def take(self, users: Ints) -> Pairs:
        """Return the pairs of some user rows, one user after another; their user rows are places in `users`."""
        lengths = self.lengths[users]
        at = run_indices(self.starts[users], lengths)
        owner = np.repeat(np.arange(len(users), dtype=np.int32), lengths)
        found = Pairs(owner, **{name: column[at] for name, column in self.columns.items()})
        if self.item_rows is None:
            return found
        return replace(found, item=self.item_rows[found.item].astype(np.int32)).known()

    def renumbered(self, users: Ints, items: Ints) -> GroupedPairs:
        """Return the pairs of some user rows, which become rows 0, 1, …; `items` is the new row of each item, -1 for
        none."""
        return replace(self, starts=self.starts[users], lengths=self.lengths[users], item_rows=items)


def _without_user(pairs: Pairs) -> Columns:
    return {name: column for name, column in pairs.arrays.items() if name != "user"}


def target_mask(positive: Bools, weight: Floats | None) -> Bools:
    """Return the mask (n,) of positives whose weight is above 0."""
    return positive if weight is None else positive & (weight > 0)


def weight_sums(values: npt.NDArray[np.integer], n: int, weight: Floats, where: Bools | None = None) -> Doubles:
    """Return (n,) the sums of the weights of the values 0..n-1, of all or of those in a mask."""
    sums = np.zeros(n)
    for part in pieces(len(values)):
        keep = slice(None) if where is None else where[part]
        np.add.at(sums, values[part][keep], weight[part][keep])
    return sums


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
