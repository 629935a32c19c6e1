"""Evidence that what is popular changes: rows near in time, compared with rows at random.

The statistic is the number of agreements, two rows of one item and of different users, within each of BLOCKS parts of
the log of equally many rows, one after another. If popularity does not change, a part has its share of the agreements
of the whole log. How far chance is off is measured by histories that are moved as wholes, each by any number of rows,
beyond the end from the beginning on: a session of one kind of item makes agreements come in clumps.
Rows of one user count for nothing, as they follow one another. Rows of equal time have no order and are shuffled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from twotower.arrays.types import Ints
from twotower.data.order_evidence import DRAWS, some_users

BLOCKS = 100
MAX_ROWS = 200_000
"""Interactions that are read; more are cut to those of users drawn at random."""
MIN_LIFT = 1.2
"""Lift from which what is popular changes. Logs of films and sessions have 1.0 to 1.2, of seasons 1.5 to 2.4, of news
and ads 8 and more (docs/log.md)."""
MIN_Z = 5.0
"""Deviations above chance from which what is popular changes."""
MIN_APART = 0.05
"""Share of the range of numbers that order a log. Numbers of which half of the users begin later than that are those of
all rows; else they may be places in the list of each user."""


@dataclass(frozen=True)
class DriftEvidence:
    """Agreements within hundredths of the log, and by chance."""

    agreements: float
    expected: float
    """Those within the same numbers of rows drawn from the whole log."""
    deviation: float = 1.0
    """Standard deviation of agreements less those expected, of moved histories; at least that of a Poisson variable,
    and at least 1."""

    @property
    def lift(self) -> float:
        """Ratio of agreements to those expected, one added to both. 1: what is popular does not change."""
        return (self.agreements + 1) / (self.expected + 1)

    @property
    def z(self) -> float:
        """Distance from chance, in deviations."""
        return (self.agreements - self.expected) / self.deviation

    @property
    def exists(self) -> bool:
        """True if rows near in time agree more than chance has it: a lift of MIN_LIFT or more, and a z of MIN_Z or
        more."""
        return self.lift >= MIN_LIFT and self.z >= MIN_Z

    def __str__(self) -> str:
        share = f"{self.lift:.2f} times as often as any two, z {self.z:.1f}"
        return f"rows of different users within a hundredth of the log are of one item {share}"


def drift_evidence(users: Ints, items: Ints, times: Ints, max_rows: int = MAX_ROWS) -> DriftEvidence:
    """Measure how what is popular changes, of interactions (n,) by the codes of their users and items, 0 or more, and
    by times of any unit. The same arguments give the same evidence."""
    rng = np.random.default_rng(0)
    if len(users) > max_rows:
        kept = some_users(users, max_rows, rng)
        users, items, times = users[kept], items[kept], times[kept]
    if not len(users):
        return DriftEvidence(0, 0)
    n, users = len(users), np.unique(users, return_inverse=True)[1].astype(np.int64)
    of_all, all_pairs = _agreements(np.zeros(n, np.int64), users, items)

    def within(places: Ints) -> tuple[float, float]:
        """Return the agreements within blocks of the rows in the order of such places, and those expected."""
        order = np.lexsort((rng.random(n), places))
        found, pairs = _agreements(np.arange(n) * BLOCKS // n, users[order], items[order])
        return found, of_all * pairs / max(1.0, all_pairs)

    found, expected = within(times)
    places = np.empty(n, np.int64)
    places[np.lexsort((rng.random(n), times))] = np.arange(n)
    moved = [np.subtract(*within((places + rng.integers(n, size=users.max() + 1)[users]) % n)) for _ in range(DRAWS)]
    return DriftEvidence(found, expected, max(float(np.std(moved, ddof=1)), math.sqrt(expected), 1.0))


def begin_apart(users: Ints, times: Ints) -> bool:
    """Return False if times may be places in each user's list: half of the users (n,) begin within MIN_APART of the
    range after its beginning. The range holds all times but the lowest and the highest hundredth."""
    first = np.full(int(users.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, users, times)
    begins = first[first < np.iinfo(np.int64).max]
    if not len(begins):
        return False
    low, high = np.quantile(times, (0.01, 0.99))
    return bool(np.median(begins) - low > MIN_APART * (high - low))


def _agreements(block: Ints, users: Ints, items: Ints) -> tuple[float, float]:
    """Return the numbers of pairs of rows of one item and block, and of one block, both of different users."""
    of_item = block * (int(items.max(initial=0)) + 1) + items
    n_users = int(users.max(initial=0)) + 1
    same_item, same_user, both = (_pairs(key) for key in (of_item, block * n_users + users, of_item * n_users + users))
    return same_item - both, _pairs(block) - same_user


def _pairs(keys: Ints) -> float:
    """Return the number of pairs of equal keys."""
    n = np.unique(keys, return_counts=True)[1].astype(np.float64)
    return float((n * (n - 1) / 2).sum())
