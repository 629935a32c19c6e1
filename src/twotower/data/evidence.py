"""Evidence in a log: that its order exists, that what is popular changes, and that a column is a function of an id.

The first two are agreements above those of chance, by permutation tests (Good, "Permutation, Parametric and Bootstrap
Tests of Hypotheses", 2005, chapter 3). Their statistic is a number of agreements: n (n - 1) / 2 for what occurs n
times.

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
from typing import NamedTuple

import numpy as np
import polars as pl

from twotower.arrays.pieces import pieces
from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Ints
from twotower.data.context import numbered
from twotower.data.dataset import Dataset

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


# ---- columns of a log that are functions of the item, or of the user


MIN_SHARE = 0.99
"""Share of the rows that have the most frequent value of their id, from which a column is a function of the id."""
MIN_IDS = 20
"""Ids, at least, whose most frequent value is another than that of the whole log."""
MAX_LEFT = 0.1
"""Largest ratio of the rows without the most frequent value of their id to the rows without that of the log. A value
that nearly all rows have says nothing of an id."""
MAX_CONSTANT_ROWS, MAX_OF_ITEM = 500_000, 100
"""Training interactions that are measured; of more, those of some items, and about so many of each."""


class Constancy(NamedTuple):
    """Numbers of rows with a value of a column: one for each pair of ids, where the id has two or more."""

    rows: int = 0
    same: int = 0
    """Rows with the most frequent value of their id."""
    common: int = 0
    """Rows with the most frequent value of all."""
    ids: int = 0
    """Ids whose most frequent value is another than that of all."""

    @property
    def share(self) -> float:
        """Share of the rows with the most frequent value of their id."""
        return self.same / max(self.rows, 1)

    @property
    def explains(self) -> bool:
        """True if enough ids predict the values better than the most frequent value of all does."""
        return self.ids >= MIN_IDS and self.rows - self.same <= MAX_LEFT * (self.rows - self.common)

    @property
    def exists(self) -> bool:
        """True if the column is a function of the id."""
        return self.share >= MIN_SHARE and self.explains


def measure_constancy(values: pl.Series, ids: pl.Series, others: pl.Series) -> Constancy:
    """Return how far the values (n,) of a column are a function of ids (n,). A pair of ids counts once: a user who
    takes an item ten times on one device says nothing of the item. Rows without a value or an id are left out."""
    values, ids = (s.fill_nan(None) if s.dtype.is_float() else s for s in (values, ids))
    rows = pl.DataFrame({"id": ids, "other": others, "value": values.hash(), "missing": values.is_null()})
    rows = rows.filter(~pl.col("missing") & pl.col("id").is_not_null()).unique(["id", "other"], keep="first")
    counts = rows.group_by("id", "value").agg(n=pl.len()).filter(pl.col("n").sum().over("id") > 1)
    if not len(counts):
        return Constancy()
    total = counts.group_by("value").agg(pl.col("n").sum()).sort("n", "value", descending=True).row(0, named=True)
    is_common = pl.col("value") == total["value"]
    of_id = counts.group_by("id").agg(most=pl.col("n").max(), common=pl.col("n").filter(is_common).sum())
    rows_of_ids, same = int(counts["n"].sum()), int(of_id["most"].sum())
    return Constancy(rows_of_ids, same, int(total["n"]), int((of_id["most"] > of_id["common"]).sum()))


def contexts_of_items(dataset: Dataset) -> dict[str, Constancy]:
    """Return the features of the context that are functions of the item in the training interactions: a request cannot
    know them before the item. Text, which may be a search for the item, and what is computed from times are not
    measured."""
    features = [f for f in dataset.schema.side("context") if not (f.searchable or f.reads_time)]
    if not features:
        return {}
    rows = _some_rows(dataset)
    user, item = (pl.Series(column[rows]) for column in (dataset.pairs.user, dataset.pairs.item))
    found = {f.name: measure_constancy(_values(dataset.context[f.name], rows), item, user) for f in features}
    return {name: constancy for name, constancy in found.items() if constancy.exists}


def _some_rows(dataset: Dataset, max_rows: int = MAX_CONSTANT_ROWS, max_of_item: int = MAX_OF_ITEM) -> Ints:
    """Return the indices of the training interactions; of more than `max_rows` about `max_of_item` of each of some
    items."""
    rows, counts = dataset.train_indices, dataset.item_counts
    if len(rows) <= max_rows:
        return rows
    rng = np.random.default_rng(0)
    order = rng.permutation(len(counts))
    chosen = order[: np.searchsorted(np.cumsum(np.minimum(counts[order], max_of_item)), max_rows)]
    kept = np.zeros(len(counts), np.float32)
    kept[chosen] = max_of_item / np.maximum(counts[chosen], max_of_item)
    some = [rows[part] for part in pieces(len(rows))]
    return np.concatenate([r[rng.random(len(r), np.float32) < kept[dataset.pairs.item[r]]] for r in some])


def _values(column: Column, rows: Ints) -> pl.Series:
    """Return numbers (n,), equal for equal values of an encoded column, null for missing ones: no code, or zeros
    alone."""
    if isinstance(column, Ragged):
        is_missing = column.lengths[rows] == 0
    else:
        is_missing = ~column[rows].reshape(len(rows), -1).any(1)
    return pl.Series(numbered(column, rows)).set(pl.Series(is_missing), None)
