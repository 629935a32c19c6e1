"""Figures of the report of a run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from twotower.evaluation.config import EvaluationConfig
from twotower.reports.charts import calibration, curves, negatives


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


def test_each_source_of_negatives_is_a_line_over_the_epochs_in_which_it_drew() -> None:
    history = [
        {"epoch": 1, "train.negatives.uniform.share": 1.0, "train.negatives.uniform.above": 0.3,
            "train.negatives.uniform.n": 99.4},
        {"epoch": 2},
        {
            "epoch": 3, "train.negatives.uniform.share": 0.75, "train.negatives.uniform.above": 0.2,
            "train.negatives.uniform.n": 98.0,
            "train.negatives.my.kinds:Near.share": 0.25, "train.negatives.my.kinds:Near.above": 0.5,
            "train.negatives.my.kinds:Near.n": 2.5,
        },
    ]  # fmt: skip
    run: Any = SimpleNamespace(history=history)
    share, above = negatives(run)
    assert [(t.name, t.x, t.y) for t in share.series] == [
        ("uniform (98 a positive)", [1, 3], [1.0, 0.75]),
        ("Near (2.5 a positive)", [3], [0.25]),
    ]
    assert [t.y for t in above.series] == [[0.3, 0.2], [0.5]]
    run.history = [{"epoch": 1, "train.loss": 0.5}]
    assert negatives(run) == []


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
