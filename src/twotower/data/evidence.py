"""Evidence in a log, as agreements above those of chance: that its order exists, and that what is popular changes.

Both are permutation tests (Good, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005, chapter 3), whose
statistic is a number of agreements: n (n - 1) / 2 for what occurs n times.

Order: two adjacent interactions of one user and of different times are a pair (item, next item), and two equal pairs
agree. Under the null hypothesis every order of a user's interactions is as likely as any other, so shuffling each
history gives draws of it. Histories keep their items, so a popular item, or two items of one taste, count for nothing.
Rows of equal time have no order and are shuffled in the log too. They stay together in shuffled histories, so a row
that was logged twice, or the items of one basket, count for nothing either.

Drift: two rows of one item and of different users agree, within each of BLOCKS parts of the log of equally many rows,
one after another. If popularity does not change, a part has its share of the agreements of the whole log. How far
chance is off is measured by histories that are moved as wholes, each by any number of rows, beyond the end from the
beginning on: a session of one kind of item makes agreements come in clumps. Rows of one user count for nothing, as they
follow one another. Rows of equal time have no order and are shuffled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from twotower.arrays.types import Ints

MIN_LIFT = 1.2
"""Lift from which an order exists, or what is popular changes: a fifth more agreements than by chance. Logs of films or
sessions have a drift of 1.0 to 1.2, of seasons 1.5 to 2.4, of news and ads 8 and more (docs/log.md)."""
MIN_Z = 5.0
"""Deviations above chance from which an order exists, or what is popular changes."""
MAX_ROWS, MAX_DRIFT_ROWS = 500_000, 200_000
"""Interactions that are read; more are cut to those of users drawn at random."""
DRAWS, BLOCKS = 10, 100
MIN_APART = 0.05
"""Share of the range of numbers that order a log. Numbers of which half of the users begin later than that are those of
all rows; else they may be places in the list of each user."""


class Evidence:
    """Agreements in a log and by chance."""

    agreements: float
    expected: float
    deviation: float

    @property
    def ratio(self) -> float:
        """Ratio of agreements in the log to those expected, one added to both. 1: chance."""
        return (self.agreements + 1) / (self.expected + 1)

    @property
    def lift(self) -> float:
        """The ratio, of all that the log compares."""
        return self.ratio

    @property
    def z(self) -> float:
        """Distance of the log from chance, in deviations."""
        return (self.agreements - self.expected) / self.deviation

    @property
    def exists(self) -> bool:
        """True if the log has more agreements than chance gives: a lift of MIN_LIFT or more, and a z of MIN_Z or
        more."""
        return self.lift >= MIN_LIFT and self.z >= MIN_Z


@dataclass(frozen=True)
class OrderEvidence(Evidence):
    """Agreements of adjacent pairs in the log and in shuffled histories."""

    pairs: int
    """Adjacent rows of users in the log."""
    agreements: float
    """Number of two equal pairs in the log, of rows of different times."""
    expected: float
    """Its mean over shuffled histories."""
    deviation: float
    """Its standard deviation over shuffled histories, at least that of a Poisson variable, and at least 1."""
    ties: float
    """Share, 0 to 1, of adjacent pairs of equal time."""

    @property
    def lift(self) -> float:
        """Mean over all adjacent pairs of the ratio, which is 1 for those of equal time. 1: the order does not
        exist."""
        return 1 + (1 - self.ties) * (self.ratio - 1)

    def __str__(self) -> str:
        return (
            f"pairs (item, next item) agree {self.ratio:.2f} times as often as in shuffled histories"
            + (f", {self.lift:.2f} times with the {self.ties:.0%} of equal time as chance" if self.ties else "")
            + f", z {self.z:.1f} ({self.pairs:,} pairs)"
        )


def order_evidence(
    users: Ints, items: Ints, times: Ints, draws: int = DRAWS, max_rows: int = MAX_ROWS
) -> OrderEvidence:
    """Measure the order of interactions (n,) by the codes of their users and items and by times of any unit.

    Codes are 0 or more; two times need only compare. The same arguments give the same evidence."""
    rng = np.random.default_rng(0)
    if len(users) > max_rows:
        kept = some_users(users, max_rows, rng)
        users, items, times = users[kept], items[kept], times[kept]
    users = np.unique(users, return_inverse=True)[1].astype(np.int64)
    items = np.unique(items, return_inverse=True)[1].astype(np.int64)
    by_time = np.lexsort((rng.random(len(users)), times, users))
    users, items, times = users[by_time], items[by_time], times[by_time]
    same_user = np.diff(users) == 0
    tied = (np.diff(times) == 0) & same_user
    agreements = _equal_pairs(items, same_user & ~tied)
    moment = np.concatenate([np.zeros(min(1, len(users)), np.int64), np.cumsum(~tied)])
    shuffled = np.zeros(draws)
    for draw in range(draws):
        # Users in ascending order, so `same_user` holds for every draw.
        order = np.argsort(users + rng.random(len(users))[moment], kind="stable")
        shuffled[draw] = _equal_pairs(items[order], same_user & (np.diff(moment[order]) != 0))
    expected = float(shuffled.mean())
    n = int(same_user.sum())
    return OrderEvidence(
        n, agreements, expected, max(float(shuffled.std(ddof=1)), expected**0.5, 1.0), float(tied.sum() / max(1, n))
    )


def some_users(users: Ints, max_rows: int, rng: np.random.Generator) -> Ints:
    """Return the rows of users drawn at random, of about `max_rows` rows."""
    known, counts = np.unique(users, return_counts=True)
    order = rng.permutation(len(known))
    kept = known[order[: max(1, int(np.searchsorted(np.cumsum(counts[order]), max_rows, side="right")))]]
    return np.flatnonzero(np.isin(users, kept))


def _equal_pairs(items: Ints, are_pairs: Ints) -> float:
    """Return the number of two equal pairs of adjacent items (n,), where `are_pairs` (n - 1,) is True."""
    width = int(items.max(initial=0)) + 1
    return _agreements((items[:-1] * width + items[1:])[are_pairs.astype(bool)])


@dataclass(frozen=True)
class DriftEvidence(Evidence):
    """Agreements within hundredths of the log, and by chance."""

    agreements: float
    expected: float
    """Those within the same numbers of rows drawn from the whole log."""
    deviation: float = 1.0
    """Standard deviation of agreements less those expected, of moved histories; at least that of a Poisson variable,
    and at least 1."""

    def __str__(self) -> str:
        share = f"{self.lift:.2f} times as often as any two, z {self.z:.1f}"
        return f"rows of different users within a hundredth of the log are of one item {share}"


def drift_evidence(users: Ints, items: Ints, times: Ints, max_rows: int = MAX_DRIFT_ROWS) -> DriftEvidence:
    """Measure how what is popular changes, of interactions (n,) by the codes of their users and items, 0 or more, and
    by times of any unit. The same arguments give the same evidence."""
    rng = np.random.default_rng(0)
    if len(users) > max_rows:
        kept = some_users(users, max_rows, rng)
        users, items, times = users[kept], items[kept], times[kept]
    if not len(users):
        return DriftEvidence(0, 0)
    n, users = len(users), np.unique(users, return_inverse=True)[1].astype(np.int64)
    of_all, all_pairs = _items_and_pairs(np.zeros(n, np.int64), users, items)

    def within(places: Ints) -> tuple[float, float]:
        """Return the agreements within blocks of the rows in the order of such places, and those expected."""
        order = np.lexsort((rng.random(n), places))
        found, pairs = _items_and_pairs(np.arange(n) * BLOCKS // n, users[order], items[order])
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


def _items_and_pairs(block: Ints, users: Ints, items: Ints) -> tuple[float, float]:
    """Return the numbers of pairs of rows of one item and block, and of one block, both of different users."""
    of_item = block * (int(items.max(initial=0)) + 1) + items
    n_users = int(users.max(initial=0)) + 1
    same_item, same_user, both = (
        _agreements(key) for key in (of_item, block * n_users + users, of_item * n_users + users)
    )
    return same_item - both, _agreements(block) - same_user


def _agreements(keys: Ints) -> float:
    """Return the number of pairs of equal keys."""
    n = np.unique(keys, return_counts=True)[1].astype(np.float64)
    return float((n * (n - 1) / 2).sum())
