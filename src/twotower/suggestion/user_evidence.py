"""Evidence that columns of users tell what they take: users who share all values, against users whose values are shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from twotower.arrays.types import Floats, Ints

MIN_USER_LIFT = 1.4
"""Lift from which columns tell more than a short history does (docs/log.md)."""
MIN_USER_Z = 5.0
"""Deviations above the mean of shuffled users from which a column tells something."""
MIN_GAIN = 1.03
"""Least factor by which a further column raises the lift of the others."""
MIN_ROWS = 20
"""Rows, on average, of each value of a column, and of each combination of values of several."""
MIN_KNOWN = 0.5
"""Share of the rows whose user has a value, at least."""
MAX_OF_USER = 10
"""Rows of a user that are looked at; a user of many rows counts no more."""
MAX_ROWS = 200_000
"""Rows that are looked at; of more, those of some users."""
SHUFFLES, MORE_SHUFFLES = 8, 32
"""Times that users are shuffled: for each column, and again for one that seems to tell something."""


@dataclass(frozen=True)
class UserEvidence:
    """Lift of columns together: how often two users who share their values take one item, in multiples of two users at random."""

    columns: tuple[str, ...] = ()
    """Columns that are looked at together."""
    lift: float = 1.0
    z: float = 0.0
    """Distance from shuffled users in standard deviations."""
    looked_at: int = 0
    """Number of columns that were looked at."""
    beside: tuple[str, ...] = ()
    """Columns that tell something alone, whose combinations with the others have too few rows."""

    @property
    def exists(self) -> bool:
        """True if the columns tell much, and clearly more than by chance."""
        return self.lift >= MIN_USER_LIFT and self.z >= MIN_USER_Z

    @property
    def names(self) -> tuple[str, ...]:
        """Columns that tell something."""
        return (*self.columns, *self.beside)

    def __str__(self) -> str:
        if not self.columns:
            return (
                "no column of the users tells what they take"
                if self.looked_at
                else "the users have no columns of one value to look at"
            )
        names = ", ".join(f"'{name}'" for name in self.columns)
        return (
            f"two users of the same {names} take one item {self.lift:.2f} times as often as two users at random (thresholds {MIN_USER_LIFT:g} times "
            f"and z {MIN_USER_Z:g}; z {self.z:.0f})"
        )


def user_evidence(
    users: Ints, items: Ints, columns: Sequence[tuple[str, Ints]], max_rows: int = MAX_ROWS
) -> UserEvidence:
    """Return the evidence of rows (n,) of the codes of users and items, 0 or more, and of named columns (users,), a code for each user,
    -1 for none."""
    if not (columns and len(users)):
        return UserEvidence()
    users, items = _some_rows(users, items, max_rows, np.random.default_rng(0))
    found = list[tuple[UserEvidence, Ints]]()
    for name, codes in columns:
        for shuffles in (SHUFFLES, MORE_SHUFFLES):
            evidence = _measured((name,), codes, users, items, shuffles)
            if evidence is None or evidence.z < MIN_USER_Z:
                break
        else:
            assert evidence is not None
            found.append((evidence, codes))
    found.sort(key=lambda pair: -pair[0].lift)
    if not found:
        return UserEvidence(looked_at=len(columns))
    (best, joint), beside = found[0], list[str]()
    for evidence, codes in found[1:]:
        both = np.where((joint < 0) | (codes < 0), -1, joint * (int(codes.max()) + 1) + codes)
        together = _measured((*best.columns, *evidence.columns), both, users, items, MORE_SHUFFLES)
        if together is None:
            beside += evidence.columns
        elif together.z >= MIN_USER_Z and together.lift >= MIN_GAIN * best.lift:
            best, joint = together, np.unique(both, return_inverse=True)[1].astype(np.int64) - int(both.min() < 0)
    return UserEvidence(best.columns, best.lift, best.z, len(columns), tuple(beside))


def column_codes(values: pl.Series, buckets: int = 0) -> Ints:
    """Return a code of 0 or more for each value of a column, -1 for a missing one; with `buckets`, of so many ranges of numbers with equally
    many values."""
    if values.dtype.is_float():
        values = values.set(~values.is_finite(), None)
    if buckets:
        values = (values.rank("average") * buckets / (values.len() - values.null_count() + 1)).floor()
    return values.rank("dense").fill_null(0).to_numpy().astype(np.int64) - 1


def _some_rows(users: Ints, items: Ints, max_rows: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Return distinct pairs by user: at most MAX_OF_USER of each, drawn at random, and those of some users if there are more than `max_rows`."""
    n_items = int(items.max()) + 1
    pairs = rng.permutation(np.unique(users * n_items + items))
    users, items = np.divmod(pairs, n_items)
    order = np.argsort(users, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(users[order])) + 1]
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    order = order[place < MAX_OF_USER]
    if len(order) > max_rows:
        drawn = rng.random(int(users.max()) + 1) < max_rows / len(order)
        order = order[drawn[users[order]]]
    return users[order], items[order]


def _measured(names: tuple[str, ...], codes: Ints, users: Ints, items: Ints, shuffles: int) -> UserEvidence | None:
    """Return the evidence of one column of codes (users,), None for one of too few values or too few rows for each."""
    known = codes[users] >= 0
    if known.sum() < MIN_KNOWN * len(users) or len(np.unique(codes[users[known]])) * MIN_ROWS > known.sum():
        return None
    rng = np.random.default_rng(1)
    here, of_row = np.unique(users[known], return_inverse=True)
    items, own = items[known], np.bincount(of_row).astype(float)
    of_one_user = float((own * (own - 1)).sum())
    values = codes[here]
    chance: Floats = np.array(
        [_agreement(rng.permutation(values)[of_row], items, of_one_user) for _ in range(shuffles)]
    )
    found, mean, deviation = _agreement(values[of_row], items, of_one_user), float(chance.mean()), float(chance.std())
    if not (mean and deviation):
        return None
    return UserEvidence(names, found / mean, (found - mean) / deviation)


def _agreement(values: Ints, items: Ints, of_one_user: float) -> float:
    """Return the share of pairs of rows (n,) of one value that are of one item, among those of different users."""
    pairs = _pairs(values) - of_one_user  # the rows of one user are of different items
    return _pairs(values * (int(items.max()) + 1) + items) / pairs if pairs > 0 else 0.0


def _pairs(codes: Ints) -> float:
    """Return the number of ordered pairs of equal codes."""
    n = np.unique(codes, return_counts=True)[1].astype(float)
    return float((n * (n - 1)).sum())
