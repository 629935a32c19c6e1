"""Scores of recent popularity beside products of vectors, against dense matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from waves import N_ITEMS, world

from twotower.data.splits import TEST, VALIDATION
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.moments import asked_times
from twotower.scorers.recent_popularity import PopularityTerms, RecentPopularity
from twotower.scorers.trending import RecentScores, Trending

HALF_LIFE, WEIGHT = 20.0, 0.7
TERMS = PopularityTerms(HALF_LIFE, WEIGHT, -0.3, 0.2)
HELD = np.random.default_rng(3).random(N_ITEMS).astype(np.float32)


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    """Scores of test users and all items, one user after another."""
    data = world()
    known = RecentPopularity.before(data, TEST)
    asked = asked_times(data, TEST)
    return np.stack([known.scores(np.array([time]), TERMS)[0] - HELD for time in asked])


def scores() -> RecentScores:
    return RecentScores.of_part(world(), TEST, TERMS, HELD)


def test_the_log_of_a_part_is_what_comes_before_it() -> None:
    data = world()
    for part in (VALIDATION, TEST):
        known = RecentPopularity.before(data, part)
        assert len(known.items) == (data.parts < part).sum()
        assert (np.diff(known.times) >= 0).all()
        of = {(item, time) for item, time, p in zip(data.pairs.item, data.times, data.parts, strict=True) if p < part}
        assert {*zip(known.items, known.times, strict=True)} == of


def test_the_catalogue_of_a_user_has_the_time_of_its_first_pair(dense: np.ndarray) -> None:
    users = np.array([11, 200, 3, 11])
    found = scores().added_to(torch.ones(4, N_ITEMS), users)
    np.testing.assert_allclose(found.numpy(), 1 + dense[users], atol=1e-5)


def test_an_interaction_has_its_own_time() -> None:
    data, rows = world(), np.array([5, 900, 77])
    wanted = RecentPopularity.before(data, TEST).scores(data.times[rows], TERMS) - HELD
    found = scores().added_to(torch.zeros(3, N_ITEMS), data.pairs.user[rows].astype(np.int64), rows)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_pairs_have_the_scores_of_the_catalogue(dense: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    users, items = (rng.integers(n, size=700).astype(np.int32) for n in (len(dense), N_ITEMS))
    found = scores().of_pairs(users, items)
    np.testing.assert_allclose(found, dense[users, items], atol=1e-5)
    assert len(scores().of_pairs(users[:0], items[:0])) == 0


def test_some_rows_keep_their_scores(dense: np.ndarray) -> None:
    users, items = np.array([30, 4, 99]), np.array([8, 80, 1, 44])
    vectors = torch.zeros(len(dense), 1), torch.zeros(N_ITEMS, 1)
    some = Factors(*vectors, added=(scores(),)).take(users, items)
    np.testing.assert_allclose(some.catalogue_scores(np.arange(3)), dense[np.ix_(users, items)], atol=1e-5)
    again = some.take(np.array([2, 0]), np.array([3, 0]))
    np.testing.assert_allclose(
        again.catalogue_scores(np.arange(2)), dense[np.ix_(users[[2, 0]], items[[3, 0]])], atol=1e-5
    )


def test_a_weight_of_each_row_is_a_number_of_rows() -> None:
    found = scores()
    twice = replace(found.popularity, weights=np.full(len(found.popularity.items), 2, np.float32))
    once = np.expm1(found.popularity.at(found.asked[:9], HALF_LIFE))
    np.testing.assert_allclose(np.expm1(twice.at(found.asked[:9], HALF_LIFE)), 2 * once, rtol=1e-4)


def test_the_baseline_has_no_term_but_the_recent_count() -> None:
    found, users = scores(), np.array([30, 4, 99])
    scorer = Trending.alone(world(), TEST, EvaluationConfig(), [found])
    assert scorer is not None
    alone = scorer.catalogue_scores(users).numpy()
    np.testing.assert_allclose(alone, found.popularity.at(found.asked[users], HALF_LIFE), atol=1e-5)
