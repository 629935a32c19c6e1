"""Order of a log: none in shuffled histories and in ties, some in chains, and more in stronger ones."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from twotower.arrays.types import Ints
from twotower.data.evidence import OrderEvidence, order_evidence


def chains(
    strength: float, n_users: int = 300, length: int = 20, n_items: int = 60, seed: int = 0
) -> tuple[Ints, Ints]:
    """Users and items, oldest first: with the probability `strength` an item precedes its successor, else any."""
    rng = np.random.default_rng(seed)
    items = rng.integers(n_items, size=(n_users, length))
    for at in range(1, length):
        follows = rng.random(n_users) < strength
        items[follows, at] = (items[follows, at - 1] + 1) % n_items
    return np.repeat(np.arange(n_users), length), items.ravel()


def test_the_numbers_of_a_small_log_are_those_of_a_hand() -> None:
    # Each of three users takes 0, 1, 2: the pairs 0-1 and 1-2 occur three times, so 3 + 3 agreements.
    users, items = np.repeat(np.arange(3), 3), np.tile(np.arange(3), 3)
    found = order_evidence(users, items, items, draws=2000)
    assert (found.pairs, found.agreements, found.ties) == (6, 6.0, 0.0)
    # A pair a-b is in a shuffled history with probability 1/3: three users, so 3 * 1/9 agreements for each of 6 pairs.
    assert found.expected == pytest.approx(2, abs=0.15)
    assert found.lift == pytest.approx(7 / 3, abs=0.15)


@pytest.mark.parametrize("seed", range(8))
def test_a_shuffled_log_has_no_order(seed: int) -> None:
    users, items = chains(0.9, seed=seed)
    times = np.random.default_rng(seed).permutation(len(users))
    assert not order_evidence(users, items, times).exists


def test_stronger_chains_have_a_higher_lift() -> None:
    found = [order_evidence(*chains(s), np.arange(6000)) for s in (0.0, 0.05, 0.1, 0.3, 0.9)]
    assert [e.exists for e in found] == [False, False, True, True, True]
    assert all(a.lift < b.lift and a.z < b.z for a, b in pairwise(found))


def test_popularity_and_taste_are_no_order() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(300), 20)
    items = 10 * (users % 5) + np.minimum(rng.geometric(0.3, len(users)) - 1, 9)
    assert not order_evidence(users, items, np.arange(len(users))).exists


def test_rows_of_one_time_have_no_order_however_they_are_sorted() -> None:
    users, items = chains(0.9)
    found = order_evidence(users, np.sort(items.reshape(300, 20)).ravel(), np.zeros(len(users), np.int64))
    assert found.ties == 1
    assert not found.exists


def test_rows_that_were_logged_twice_and_baskets_are_no_order() -> None:
    users, items = chains(0.0)
    times, twice = np.arange(len(users)), np.arange(len(users)).repeat(1 + (np.arange(len(users)) % 4 == 0))
    assert not order_evidence(users[twice], items[twice], times[twice]).exists
    rng = np.random.default_rng(0)
    sets = rng.permutation(60).reshape(20, 3)[rng.integers(20, size=2000)]  # three goods of a set in each basket
    found = order_evidence(np.repeat(np.arange(200), 30), sets.ravel(), np.repeat(np.arange(2000), 3))
    assert found.ties == pytest.approx(20 / 29)
    assert not found.exists


def test_an_order_of_few_pairs_among_rows_of_equal_time_counts_for_little() -> None:
    users, items = chains(0.9)
    found = [order_evidence(users, items, np.arange(6000) // rows) for rows in (1, 2, 10)]
    assert [e.exists for e in found] == [True, True, False]
    assert found[0].lift > found[1].lift > found[2].lift


def test_codes_and_the_order_of_rows_do_not_matter() -> None:
    users, items = chains(0.3)
    times, rows = np.arange(len(users)), np.random.default_rng(1).permutation(len(users))
    whole, other = order_evidence(users, items, times), order_evidence(users[rows] * 7, 1000 - items[rows], times[rows])
    assert (whole.agreements, whole.pairs) == (other.agreements, other.pairs)
    assert whole.lift == pytest.approx(other.lift, rel=0.05)


def test_a_long_log_is_cut_to_whole_users() -> None:
    users, items = chains(0.3)
    found = order_evidence(users, items, np.arange(len(users)), max_rows=1000)
    assert found.pairs == 50 * 19
    assert found.exists


@pytest.mark.parametrize("n", [0, 1])
def test_a_log_without_pairs_has_no_order(n: int) -> None:
    none = np.zeros(n, np.int64)
    assert order_evidence(none, none, none) == OrderEvidence(0, 0.0, 0.0, 1.0, 0.0)
