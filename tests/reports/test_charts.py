"""Figures of the report of a run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from twotower.evaluation.config import EvaluationConfig
from twotower.reports.charts import calibration, curves


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
