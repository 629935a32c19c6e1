"""Figures of the report of a run."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower.api import fit
from twotower.arrays.types import Bools
from twotower.data.splits import TEST
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.ranking import evaluation_queries
from twotower.reports.charts import (
    calibration,
    curves,
    groups,
    item_recall,
    recalls,
    spectra,
    variance_shares,
)


@pytest.fixture(scope="module")
def run() -> Any:
    """A run over ratings of a checkerboard, whose model does not matter."""
    config = settings(train={"epochs": 1}, split={"kind": "random", "test": 0.4}, evaluation={"k": [9]})
    return fit(checkerboard(), CHECKERBOARD_SCHEMA, config)


def wanted(run: Any, items: Bools) -> Factors:
    """Return vectors that rank a user's test targets among some items first."""
    pairs = run.dataset.pairs_of(TEST)
    scores = torch.zeros(len(run.dataset.users), len(run.dataset.items))
    keep = pairs.target & items[pairs.item]
    scores[torch.from_numpy(pairs.user[keep]), torch.from_numpy(pairs.item[keep])] = 1.0
    return Factors(scores, torch.eye(len(run.dataset.items)))


def test_groups_are_of_rising_numbers_and_equal_numbers_share_one() -> None:
    numbers = np.array([5, 0, 0, 7, 0, 6, 8, 0])
    found = groups(numbers, 4)
    assert np.array_equal(np.sum(found, 0), np.ones(8))
    assert [sorted(set(numbers[group])) for group in found] == [[0, 5], [6, 7, 8]]
    assert all(numbers[a].max() < numbers[b].min() for a, b in pairwise(found))
    assert len(groups(np.full(5, 3), 10)) == 1


def test_recall_of_a_group_counts_its_own_items_alone(run: Any) -> None:
    popularity = np.bincount(run.dataset.train.item, minlength=len(run.dataset.items))
    popular = popularity >= np.median(popularity)
    k = run.config.evaluation.k[0]
    queries = evaluation_queries(run.dataset, TEST, run.config.evaluation)
    assert queries.n_targets.max() <= k
    found: Any = recalls(run, wanted(run, np.ones(len(popular), bool)))
    by_item, by_user = found
    assert {x for x in by_item.series[0].x if not math.isnan(x)} == {1.0}
    assert set(by_user.series[0].x) == {1.0}
    best = queries.top_k(wanted(run, popular), k)
    hit = queries.hits(best)
    assert item_recall(queries, best, hit, popularity, popular)[1] == 1.0
    assert item_recall(queries, best, hit, popularity, ~popular)[1] < 1.0


def test_calibrated_probabilities_lie_on_the_line() -> None:
    """Of 80 pairs with the probability 1/4 a quarter is positive, of 80 with 3/4 three quarters."""
    positive = np.tile([True, False, False, False], 20)
    labels = np.concatenate([positive, ~positive])
    scores = np.repeat([-math.log(3), math.log(3)], 80)
    fake: Any = SimpleNamespace(
        dataset=SimpleNamespace(part=lambda _: SimpleNamespace(positive=labels)),
        config=SimpleNamespace(loss=SimpleNamespace(pointwise=True)),
    )
    scorer: Any = SimpleNamespace(part_scores=lambda *_: scores)
    figure: Any = calibration(fake, scorer)[0]
    assert np.allclose(figure.series[1].x, np.repeat([0.25, 0.75], 10))
    assert np.allclose(figure.series[1].y, figure.series[1].x)
    fake.config.loss.pointwise = False
    assert calibration(fake, scorer) == []


def test_the_spectrum_of_vectors_on_a_line_is_one_direction() -> None:
    line = torch.arange(6.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]]) + 5
    assert variance_shares(line) == pytest.approx([1.0])
    figure: Any = spectra(Factors(torch.eye(4)[:, :3], line))[0]
    assert len(figure.series[0].y) == 3
    assert sum(10**y for y in figure.series[0].y) == pytest.approx(1)
    assert figure.series[1].y == pytest.approx([0.0])
    assert variance_shares(torch.ones(5, 3)) == []


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (30, 1_001)])
def test_the_spectrum_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 3, shape[1])
    squares = np.linalg.svd((rows - rows.mean(0)).double().numpy(), compute_uv=False) ** 2
    shares = squares / squares.sum()
    assert variance_shares(rows) == pytest.approx(shares[shares > 1e-9], rel=1e-6)


def test_curves_name_only_metrics_that_have_values() -> None:
    """A part with one pair of each user has no AUC within users."""
    evaluation = EvaluationConfig(k=(10,))
    loss = SimpleNamespace(pointwise=True)
    history = [{"epoch": 1, "train.loss": 0.5, "validation.auc": 0.7, "validation.log_loss": 0.6}]
    run: Any = SimpleNamespace(
        history=history, metrics={"train.best_epoch": 1}, config=SimpleNamespace(evaluation=evaluation, loss=loss)
    )
    loss_curve, auc = curves(run)
    assert [t.name for t in loss_curve.series] == ["train loss (weighted)", "validation log loss"]
    assert [t.name for t in auc.series] == ["auc"]
    run.history = []  # of a model that is its start
    assert curves(run) == []
