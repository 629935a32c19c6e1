"""Verdict on a run: the best baseline, the difference with its interval, and what to do next."""

from __future__ import annotations

from typing import Any

import pytest
from worlds import settings

from twotower.config.experiment import Config
from twotower.reports.verdict import verdict


def monitored(metric: str, **sections: Any) -> Config:
    """A config that monitors a metric of validation."""
    sections["train"] = {"monitor": f"validation.{metric}"} | sections.get("train", {})
    return settings(evaluation={"k": [5]}, **sections)


NDCG = {"test.ndcg@5": 0.3, "baseline.popularity.ndcg@5": 0.2, "baseline.transitions.ndcg@5": 0.25}
CLEAR = {"difference.transitions.ndcg@5.low": 0.01, "difference.transitions.ndcg@5.high": 0.09}


def test_a_model_that_is_better_than_its_best_baseline_is_published() -> None:
    found = verdict(NDCG | CLEAR, monitored("ndcg@5"))
    assert found
    assert found.is_better
    assert found.sentences == (
        "The best simple baseline by ndcg@5, the monitored metric, is transition counts: 0.2500 on the test part.",
        "The model has 0.3000, a difference of +0.0500 (95 % interval +0.0100 to +0.0900, paired by test user): the "
        "model is better.",
        "Publish the model, or compare it with a run of other settings.",
    )
    assert found.text == " ".join(found.sentences)


@pytest.mark.parametrize("low", [-0.09, None])
def test_a_count_that_wins_is_named_with_what_helps(low: float | None) -> None:
    ends = (
        {} if low is None else {"difference.transitions.ndcg@5.low": low, "difference.transitions.ndcg@5.high": -0.01}
    )
    found = verdict(NDCG | {"test.ndcg@5": 0.2} | ends, monitored("ndcg@5"))
    assert found
    assert not found.is_better
    between = (
        "without an interval): transition counts is ahead." if low is None else "user): transition counts is better."
    )
    assert found.sentences[1].endswith(between)
    assert "kind = 'transitions'" in found.sentences[2]
    assert found.sentences[2].endswith("Run the doctor, which names likely causes, or train another recipe.")


def test_an_interval_with_zero_in_it_is_no_win() -> None:
    found = verdict(NDCG | CLEAR | {"difference.transitions.ndcg@5.low": -0.01}, monitored("ndcg@5"))
    assert found
    assert not found.is_better
    assert found.sentences[1].endswith(": the difference may be chance.")


def said(metrics: dict[str, float], config: Config) -> str:
    """Return the text of a verdict."""
    found = verdict(metrics, config)
    assert found
    return found.text


def test_the_help_is_the_option_that_adds_the_baseline_and_is_not_set_yet() -> None:
    own = {"test.ndcg@5": 0.1, "baseline.repeats.ndcg@5": 0.2}
    biased = {"test.auc": 0.6, "baseline.bias.auc": 0.7}
    assert "'repeats'" in said(own, monitored("ndcg@5"))
    assert "'repeats'" not in said(own, monitored("ndcg@5", scorers=[{"kind": "repeats", "history": "history"}]))
    assert "model.bias = true" in said(biased, monitored("auc", model={"bias": False}))
    assert "model.bias" not in said(biased, monitored("auc", model={"bias": True}))


def test_a_monitored_loss_is_judged_by_auc() -> None:
    metrics = {"test.log_loss": 0.5, "test.auc": 0.8, "baseline.bias.auc": 0.7, "baseline.popularity.auc": 0.6}
    found = verdict(metrics, monitored("log_loss"))
    assert found
    assert found.sentences[0].startswith(
        "The best simple baseline by auc, as no baseline has log_loss, is user+item bias: 0.7000"
    )


def test_there_is_no_verdict_without_a_test_part_or_a_baseline() -> None:
    assert verdict({"validation.ndcg@5": 0.5}, monitored("ndcg@5")) is None
    assert verdict({"test.ndcg@5": 0.5}, monitored("ndcg@5")) is None
