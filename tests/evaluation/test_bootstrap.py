"""Intervals against means over drawn users."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twotower.evaluation.bootstrap import bootstrap


def test_an_interval_is_that_of_the_means_over_drawn_users_for_every_column_as_if_alone() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.random((40, 3)), rng.random(40)
    draws = np.random.default_rng(7)
    picks = [draws.integers(0, 40, 40) for _ in range(30)]
    low, high = bootstrap(values, weights, 30, seed=7)
    for i, column in enumerate(values.T):
        means = [np.average(column[pick], weights=weights[pick]) for pick in picks]
        assert [low[i], high[i]] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), rel=1e-12)
        assert [low[i], high[i]] == pytest.approx([float(b) for b in bootstrap(column, weights, 30, seed=7)], rel=1e-12)


def test_an_interval_is_as_wide_as_the_normal_one_for_many_users() -> None:
    values = np.random.default_rng(0).normal(0, 2, 1000)
    low, high = bootstrap(values, np.ones(1000), 1000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(1000), rel=0.1)


def test_no_spread_gives_a_point_and_no_resamples_or_users_give_nothing() -> None:
    assert [float(x) for x in bootstrap(np.full(9, 0.25), np.ones(9), 20)] == [0.25, 0.25]
    assert all(math.isnan(x) for x in bootstrap(np.ones(9), np.ones(9), 0))
    assert all(math.isnan(x) for x in bootstrap(np.ones(0), np.ones(0), 20))
