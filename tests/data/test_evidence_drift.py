"""Drift of what is popular: none in shuffled logs, by users who repeat, or by the order of rows of one time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from waves import waves

from twotower.arrays.types import Ints
from twotower.data.evidence import MIN_LIFT, MIN_Z, DriftEvidence, begin_apart, drift_evidence


def codes(share: float, seed: int = 0) -> tuple[Ints, Ints, Ints]:
    log = waves(share, seed=seed)
    users, items, times = (log[name].to_numpy().astype(np.int64) for name in ("user_id", "item_id", "at"))
    return users, items, times


def test_the_numbers_of_a_small_log_are_those_of_a_hand() -> None:
    # A hundred pairs of rows at one time: each pair is of one item and two users, and each item is in two pairs.
    items = np.repeat(np.arange(100) % 50, 2)
    users = np.tile([0, 1], 100)
    found = drift_evidence(users, items, np.repeat(np.arange(100), 2))
    assert found.agreements == 100
    # Of the 100 x 100 pairs of rows of different users 200 are of one item: for 100 pairs 2 by chance.
    assert found.expected == pytest.approx(2)
    assert found.lift == pytest.approx(101 / 3)
    assert 0 < found.z <= 98 / 2**0.5
    assert found.exists
    assert "33.67 times" in str(found)


def test_stronger_waves_have_a_higher_lift() -> None:
    found = [drift_evidence(*codes(share)) for share in (0.0, 0.1, 0.3, 0.7)]
    assert [e.exists for e in found] == [False, False, True, True]
    assert all(a.lift < b.lift for a, b in pairwise(found))


@pytest.mark.parametrize("seed", range(6))
def test_a_shuffled_log_has_no_drift(seed: int) -> None:
    users, items, times = codes(0.7, seed)
    found = drift_evidence(users, items, np.random.default_rng(seed).permutation(times))
    assert abs(found.z) < MIN_Z
    assert found.lift < MIN_LIFT


def test_a_user_who_repeats_is_no_drift() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(100), 40)
    items = np.repeat(rng.integers(1000, size=100), 40)
    assert not drift_evidence(users, items, np.arange(4000)).exists


@pytest.mark.parametrize("seed", range(10))
def test_sessions_of_one_kind_of_item_are_no_drift(seed: int) -> None:
    """Two sessions of one kind that are near in time agree in many rows at once."""
    rng = np.random.default_rng(seed)
    users, starts, kinds = np.repeat(np.arange(300), 10), rng.random(300) * 10**6, rng.integers(30, size=300)
    items = np.repeat(kinds, 10) * 10 + rng.integers(10, size=3000)
    times = (np.repeat(starts, 10) + np.tile(np.arange(10), 300) * 10).astype(np.int64)
    assert not drift_evidence(users, items, times).exists


def test_rows_of_one_time_have_no_order() -> None:
    """A table that is sorted by item, of ten days."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(500, size=6000), np.sort(rng.integers(100, size=6000))
    days = np.repeat(rng.permutation(10), 600)[rng.permutation(6000)]
    order = np.lexsort((items, days))
    assert not drift_evidence(users[order], items[order], days[order]).exists


def test_a_long_log_is_read_by_users() -> None:
    log = codes(0.7)
    some = drift_evidence(*log, max_rows=900)
    assert some.exists
    assert some.agreements < drift_evidence(*log).agreements / 2
    assert drift_evidence(*log, max_rows=900) == some


def test_logs_without_rows_and_of_one_user_have_none() -> None:
    none = np.zeros(0, np.int64)
    assert drift_evidence(none, none, none) == DriftEvidence(0, 0)
    one = np.zeros(50, np.int64)
    assert not drift_evidence(one, one, np.arange(50)).exists


@pytest.mark.parametrize("outlier", [(), (10**9,), (-(10**9),)])
def test_places_in_lists_are_told_from_numbers_of_all_rows_whatever_one_number_is(outlier: tuple[int, ...]) -> None:
    users, extra = np.repeat(np.arange(50), 20), [0] * len(outlier)
    places, rows = np.tile(np.arange(20), 50), np.arange(1_000)
    assert not begin_apart(np.append(users, extra).astype(np.int64), np.append(places, outlier).astype(np.int64))
    assert begin_apart(np.append(users, extra).astype(np.int64), np.append(rows, outlier).astype(np.int64))
