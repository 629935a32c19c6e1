"""Evidence that the order of a log exists: adjacent items of users, compared with shuffled histories.

A pair is two adjacent interactions of one user and of different times, (item, next item). The statistic is the number
of agreements, two pairs that are equal: n (n - 1) / 2 for each pair that occurs n times. Under the null hypothesis
every order of a user's interactions is as likely as any other, so shuffling each history gives draws of it, as a
permutation test (Good, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005, chapter 3). Histories keep
their items, so a popular item, or two items of one taste, count for nothing. Rows of equal time have no order and are
shuffled in the log too. They stay together in shuffled histories, so a row that was logged twice, or the items of one
basket, count for nothing either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twotower.arrays.types import Ints

MIN_LIFT = 1.2
"""Lift from which an order exists: a fifth more agreements than in shuffled histories."""
MIN_Z = 5.0
"""Deviations above the mean of shuffled histories from which an order exists."""
MAX_ROWS = 500_000
"""Interactions that are read; more are cut to those of users drawn at random."""
DRAWS = 10


@dataclass(frozen=True)
class OrderEvidence:
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
    def ratio(self) -> float:
        """Ratio of agreements in the log to those expected, one added to both."""
        return (self.agreements + 1) / (self.expected + 1)

    @property
    def lift(self) -> float:
        """Mean over all adjacent pairs of the ratio, which is 1 for those of equal time. 1: the order does not
        exist."""
        return 1 + (1 - self.ties) * (self.ratio - 1)

    @property
    def z(self) -> float:
        """Distance of the log from shuffled histories, in deviations."""
        return (self.agreements - self.expected) / self.deviation

    @property
    def exists(self) -> bool:
        """True if the log has more agreements than chance gives: a lift of MIN_LIFT or more, and a z of MIN_Z or
        more."""
        return self.lift >= MIN_LIFT and self.z >= MIN_Z

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
    agreements = _agreements(items, same_user & ~tied)
    moment = np.concatenate([np.zeros(min(1, len(users)), np.int64), np.cumsum(~tied)])
    shuffled = np.zeros(draws)
    for draw in range(draws):
        # Users in ascending order, so `same_user` holds for every draw.
        order = np.argsort(users + rng.random(len(users))[moment], kind="stable")
        shuffled[draw] = _agreements(items[order], same_user & (np.diff(moment[order]) != 0))
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


def _agreements(items: Ints, are_pairs: Ints) -> float:
    """Return the number of two equal pairs of adjacent items (n,), where `are_pairs` (n - 1,) is True."""
    width = int(items.max(initial=0)) + 1
    pairs = np.sort((items[:-1] * width + items[1:])[are_pairs.astype(bool)])
    ends = np.flatnonzero(np.diff(pairs, append=-1))
    counts = np.diff(ends, prepend=-1).astype(np.float64)
    return float((counts * (counts - 1) / 2).sum())
