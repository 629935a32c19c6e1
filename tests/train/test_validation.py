"""Scores are as good as others within what chance explains."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scored import random_factors

from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics.metric import UserValues
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.train.starts.search import CLOSE
from twotower.train.validation import Validation, monitored_by_user

SOME = EvaluationConfig(k=(5,), bootstrap=0)


def validation(data: Dataset, monitor: str) -> Validation:
    def metrics(scorer: Any, config: EvaluationConfig) -> dict[str, float]:
        return {f"validation.{name}": v for name, v in evaluate_part(scorer, data, VALIDATION, config).items()}

    context = DistributedContext()
    by_user = partial(monitored_by_user, dataset=data, monitor=monitor, context=context)
    return Validation(metrics, lambda found: found[monitor], by_user, context)


def near(factors: Factors, share: float) -> Factors:
    """Return vectors that differ by a share of random ones."""
    other = torch.randn(factors.items.shape, generator=torch.Generator().manual_seed(3))
    return replace(factors, items=factors.items + share * other)


def test_the_standard_error_is_that_of_the_weighted_mean_of_differences() -> None:
    rng = np.random.default_rng(0)
    values, others, weights = rng.random(200), rng.random(200), rng.integers(1, 4, 200).astype(float)
    a, b = (UserValues(np.arange(200), one, weights) for one in (values, others))
    drawn = rng.integers(0, 200, (4000, 200))
    means = [np.average((values - others)[row], weights=weights[row]) for row in drawn]
    assert a.error_of_difference(b) == pytest.approx(np.std(means), rel=0.1)
    assert a.error_of_difference(a) == 0


@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0])
def test_what_chance_explains_is_a_standard_error_up_to_a_share_of_the_score(spread: float, board: Dataset) -> None:
    rng = np.random.default_rng(0)
    best, other = random_factors(board), random_factors(board, 1)
    values = rng.random(400)
    of = {id(best): values, id(other): values + spread * rng.normal(size=400)}

    def by_user(scorer: Any, config: EvaluationConfig) -> UserValues:
        return UserValues(np.arange(400), of[id(scorer)], np.ones(400))

    measured = Validation(
        lambda scorer, _: {"m": float(of[id(scorer)].mean())}, lambda found: found["m"], by_user, DistributedContext()
    )
    error, most = float((of[id(best)] - of[id(other)]).std() / 20), CLOSE * values.mean()
    assert measured.tolerance(best, SOME)(other) == pytest.approx(min(error, most))
    assert (error > most) == (spread == 1.0)


def test_values_by_user_are_those_of_the_metric(board: Dataset) -> None:
    found, monitor = random_factors(board), "validation.recall@5"
    by_user = monitored_by_user(found, SOME, board, monitor, DistributedContext())
    assert by_user
    assert np.average(by_user.values, weights=by_user.weights) == pytest.approx(
        validation(board, monitor).score(found, SOME)
    )
    other_rank = replace(DistributedContext(), rank=1, world_size=2)
    assert monitored_by_user(found, SOME, board, monitor, other_rank) is None


def test_of_a_metric_that_is_no_mean_over_users_it_is_a_share_of_the_score(board: Dataset) -> None:
    found, measured = random_factors(board), validation(board, "validation.auc")
    score = measured.score(found, SOME)
    assert measured.tolerance(found, SOME)(near(found, 1.0)) == pytest.approx(CLOSE * score)


def test_scores_are_measured_with_what_stands_beside_them(board: Dataset) -> None:
    found, measured = random_factors(board), validation(board, "validation.recall@5")
    beside = measured.beside(lambda factors: replace(factors, items=-factors.items))
    other = replace(found, items=-found.items)
    assert beside.score(found, SOME) == measured.score(other, SOME) != measured.score(found, SOME)
    assert beside.tolerance(found, SOME)(near(found, 1.0)) == measured.tolerance(other, SOME)(
        replace(found, items=-near(found, 1.0).items)
    )


def test_users_of_one_mean_alone_are_left_out() -> None:
    a = UserValues(np.array([1, 2, 4, 7]), np.array([0.5, 0.1, 0.9, 0.3]), np.ones(4))
    b = UserValues(np.array([2, 3, 4, 7]), np.array([0.2, 0.8, 0.4, 0.3]), np.ones(4))
    difference = np.array([0.1 - 0.2, 0.9 - 0.4, 0.0])
    assert a.error_of_difference(b) == pytest.approx(difference.std() / 3**0.5)


def test_recall_has_a_metric_that_orders_equal_lists(board: Dataset) -> None:
    measured = validation(board, "validation.recall@5")
    assert measured.ordering(SOME, "validation.recall@5") == "validation.ndcg@5"
    assert measured.ordering(SOME, "validation.ndcg@5") == measured.ordering(SOME, "validation.auc") == ""
    found = random_factors(board)
    metrics = measured.metrics(found, SOME)
    assert measured.scores(found, SOME, "validation.ndcg@5") == (
        metrics["validation.ndcg@5"],
        metrics["validation.recall@5"],
    )
    assert measured.scores(found, SOME, "") == (metrics["validation.recall@5"],) * 2
