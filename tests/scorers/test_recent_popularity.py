"""Counts of the latest rows of a log, against a loop over them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twotower.arrays.pieces import ones
from twotower.arrays.types import Floats, Ints
from twotower.scorers.recent_popularity import PopularityTerms, RecentPopularity

N_ITEMS = 7
RNG = np.random.default_rng(0)
ITEMS = RNG.integers(N_ITEMS - 1, size=400).astype(np.int32)  # nobody takes the last one
TIMES = np.sort(RNG.integers(300, size=400))
WEIGHTS = RNG.random(400).astype(np.float32)


def by_loop(time: int, half_life: float, weights: Floats) -> list[float]:
    n, places = [0.0] * N_ITEMS, [at for at in range(400) if TIMES[at] < time]
    for at in places:
        n[ITEMS[at]] += float(weights[at]) * 0.5 ** ((len(places) - 1 - at) / half_life)
    return [math.log(1 + value) for value in n]


@pytest.mark.parametrize("weights", [ones(400), WEIGHTS])
@pytest.mark.parametrize("half_life", [1.0, 3.0, 50.0, 4000.0])
def test_each_time_counts_the_rows_before_it(half_life: float, weights: Floats) -> None:
    """With 1 and 3 most rows are beyond those that are read."""
    log, times = RecentPopularity(ITEMS, TIMES, weights, N_ITEMS), np.array([150, 0, 299, 10, 150, 400, -5])
    found = log.at(times, half_life)
    assert found.shape == (7, N_ITEMS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [by_loop(t, half_life, weights) for t in times], atol=1e-6)
    assert not found[1].any(), "no row is before the first"
    recent = PopularityTerms(half_life, 0.5)
    np.testing.assert_allclose(2 * log.scores_at_end(recent), by_loop(1000, half_life, weights), atol=1e-6)


@pytest.mark.parametrize("weights", [ones(400), WEIGHTS, np.where(TIMES < 40, 0, WEIGHTS).astype(np.float32)])
@pytest.mark.parametrize(("total", "age"), [(-0.3, 0.2), (0.3, -0.2), (-0.3, -0.2), (0.3, 0.2)])
@pytest.mark.parametrize("new", [0.0, -0.2, 0.1])
def test_terms_are_the_count_by_all_rows_and_the_rows_since_the_first(
    weights: Floats, total: float, age: float, new: float
) -> None:
    """An item without a row has a weight of its own."""
    log, times = RecentPopularity(ITEMS, TIMES, weights, N_ITEMS), np.array([150, 0, 45, 400])
    terms = PopularityTerms(20.0, 0.5, total, age, new)
    wanted = np.zeros((len(times), N_ITEMS))
    for row, time in zip(wanted, times.tolist(), strict=True):
        before, weight = time > TIMES, np.ones(400) if weights is None else weights
        for item in range(N_ITEMS):
            own = np.flatnonzero(before & (item == ITEMS) & (weight > 0))
            row[item] = total * np.log1p(weight[own].sum())
            row[item] += age * np.log1p(before.sum() - own[0]) if len(own) else new * np.log1p(before.sum())
        row += 0.5 * np.array(by_loop(time, 20.0, weights))
    found = log.scores(times, terms)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    asked, items = np.repeat(times, N_ITEMS), np.tile(np.arange(N_ITEMS), len(times)).astype(np.int32)
    np.testing.assert_allclose(log.scores_of_pairs(asked, items, terms), wanted.ravel(), atol=1e-5)
    np.testing.assert_allclose(log.scores_at_end(terms), wanted[-1], atol=1e-5)


@pytest.mark.parametrize("times", [[17, 230], [230], [3, 4, 5, 17, 18, 230]])
def test_a_time_counts_alike_beside_any_others(times: list[int]) -> None:
    log = RecentPopularity(ITEMS, TIMES, ones(400), N_ITEMS)
    alone: Ints = np.array([230])
    np.testing.assert_array_equal(log.at(np.array(times), 5.0)[-1], log.at(alone, 5.0)[0])


@pytest.mark.parametrize("weights", [ones(400), WEIGHTS])
@pytest.mark.parametrize("half_life", [0.5, 1.0, 3.0, 50.0, 4000.0])
def test_a_pair_counts_as_in_the_catalogue(half_life: float, weights: Floats) -> None:
    """With a half-life of .5 a block of rows that are summed is 20 rows."""
    log, rng = RecentPopularity(ITEMS, TIMES, weights, N_ITEMS), np.random.default_rng(1)
    times, items = rng.integers(-5, 310, 900), rng.integers(N_ITEMS, size=900).astype(np.int32)
    found = log.of_pairs(times, items, half_life)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, log.at(times, half_life)[np.arange(900), items], atol=1e-6)
    assert len(log.of_pairs(times[:0], items[:0], half_life)) == 0


def test_a_log_without_rows_counts_nothing() -> None:
    log = RecentPopularity(ITEMS[:0], TIMES[:0], ones(0), N_ITEMS)
    assert not log.at(np.array([5]), 2.0).any()
    assert not log.scores_at_end(PopularityTerms(2.0, 1.0, 1.0, 1.0)).any()
    assert not log.of_pairs(np.array([5]), ITEMS[:1], 2.0).any()
