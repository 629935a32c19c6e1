"""Evidence that columns of users tell what they take: users who share all values, against users whose values are shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from twotower.arrays.types import Ints

MIN_USER_LIFT = 1.4
"""Lift from which columns tell more than a short history does (docs/log.md)."""
MIN_USER_Z = 5.0
"""Deviations above the mean of shuffled users from which a column tells something."""
MIN_ROWS = 20
"""Rows, on average, of each combination of the values of columns that are looked at together."""
MAX_ROWS = 200_000
"""Rows that are looked at; of more, those of some users."""
SHUFFLES = 8


@dataclass(frozen=True)
class UserEvidence:
    """Lift of columns together: how often two users who share their values take one item, in multiples of two users with shuffled values."""

    columns: tuple[str, ...] = ()
    """Columns that tell something, those with the greatest lift first."""
    lift: float = 1.0
    z: float = 0.0
    """Distance from shuffled users in standard deviations."""

    @property
    def exists(self) -> bool:
        """True if the columns tell much, and clearly more than by chance."""
        return self.lift >= MIN_USER_LIFT and self.z >= MIN_USER_Z

    def __str__(self) -> str:
        if not self.columns:
            return "no column of the users tells what they take"
        names = ", ".join(f"'{name}'" for name in self.columns)
        return (
            f"two users of the same {names} take one item {self.lift:.2f} times as often as two others (thresholds {MIN_USER_LIFT:g} times "
            f"and z {MIN_USER_Z:g}; z {self.z:.0f})"
        )


def user_evidence(users: Ints, items: Ints, columns: Sequence[tuple[str, Ints]]) -> UserEvidence:
    """Return the evidence of rows (n,) of the codes of users and items, 0 or more, and of named columns (users,), a code for each user."""
    rng = np.random.default_rng(0)
    n_users = int(users.max(initial=-1)) + 1
    if len(users) > MAX_ROWS:
        drawn = rng.random(n_users) < MAX_ROWS / len(users)
        users, items = users[drawn[users]], items[drawn[users]]
    orders = [rng.permutation(n_users) for _ in range(SHUFFLES)]
    if not columns:
        return UserEvidence()
    users, items = np.divmod(np.unique(users * (int(items.max(initial=0)) + 1) + items), int(items.max(initial=0)) + 1)
    own = np.bincount(users).astype(float)
    of_one_user = float((own * (own - 1)).sum())

    def measured(names: tuple[str, ...], codes: Ints) -> UserEvidence:
        chance = np.array([_agreement(codes[order][users], items, of_one_user) for order in orders])
        found, mean = _agreement(codes[users], items, of_one_user), float(chance.mean())
        if not mean:
            return UserEvidence(names)
        return UserEvidence(names, found / mean, (found - mean) / max(float(chance.std()), 1e-12))

    single = [(measured((name,), codes), codes) for name, codes in columns]
    telling = sorted(
        (pair for pair in single if pair[0].z >= MIN_USER_Z and pair[0].lift > 1), key=lambda pair: -pair[0].lift
    )
    if not telling:
        return UserEvidence()
    best, joint = telling[0]
    for evidence, codes in telling[1:]:
        both = np.unique(joint * (int(codes.max()) + 1) + codes, return_inverse=True)[1].astype(np.int64)
        if len(np.unique(both[users])) * MIN_ROWS > len(users):
            continue
        together = measured((*best.columns, *evidence.columns), both)
        if together.z >= MIN_USER_Z and together.lift > best.lift:
            best, joint = together, both
    return best


def _agreement(values: Ints, items: Ints, of_one_user: float) -> float:
    """Return the share of pairs of rows (n,) of one value that are of one item, among those of different users."""
    pairs = _pairs(values) - of_one_user  # the rows of one user are of different items
    return _pairs(values * (int(items.max(initial=0)) + 1) + items) / pairs if pairs > 0 else 0.0


def _pairs(codes: Ints) -> float:
    """Return the number of ordered pairs of equal codes."""
    n = np.unique(codes, return_counts=True)[1].astype(float)
    return float((n * (n - 1)).sum())


def column_codes(values: pl.Series, buckets: int = 0) -> Ints:
    """Return a code of 0 or more for each value of a column; with `buckets`, of so many ranges of numbers with equally many values. A missing one is a value of its own."""
    if buckets:
        values = (values.rank("average") * buckets / (len(values) + 1)).floor()
    return values.rank("dense").fill_null(0).to_numpy().astype(np.int64)
