"""The best weights are kept, patience runs out, and signals are requests."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from torch import nn

from twotower.errors import ConfigError
from twotower.train.stopping import BestWeights, StopSignals
from twotower.train.weights import Weights


def observed(best: BestWeights, values: list[float], first: int = 1) -> BestWeights:
    model = nn.Linear(1, 1, bias=False)
    for epoch, value in enumerate(values, first):
        nn.init.constant_(model.weight, epoch)
        best.observe({"validation.auc": value, "validation.log_loss": value}, epoch, Weights(model))
    return best


@pytest.mark.parametrize(
    ("monitor", "values", "epoch"),
    [
        ("validation.auc", [0.5, 0.8, 0.7, 0.8], 2),
        ("validation.log_loss", [0.5, 0.2, 0.3, 0.2], 2),
        ("validation.auc", [-1.0], 1),
    ],
)
def test_the_first_of_the_best_epochs_is_kept(monitor: str, values: list[float], epoch: int) -> None:
    best = observed(BestWeights(monitor, 0, higher_is_better=monitor != "validation.log_loss"), values)
    assert best.epoch == epoch
    assert best.weights["weight"].tolist() == [[epoch]]
    assert not best.out_of_patience


def test_patience_counts_the_validations_since_the_best_also_after_a_resume() -> None:
    best = observed(BestWeights("validation.auc", patience=3), [0.5, 0.4, 0.4])
    again = BestWeights("validation.auc", patience=3)
    again.load_state(best.state())
    assert again.state().keys() == best.state().keys()
    for one in (best, again):
        assert not one.out_of_patience
        assert observed(one, [0.5], first=4).out_of_patience
        assert one.epoch == 1
        assert not observed(one, [0.6], first=5).out_of_patience


def test_a_state_before_the_first_validation_continues() -> None:
    again = BestWeights("validation.auc", patience=1)
    again.load_state(BestWeights("validation.auc", patience=1).state())
    assert observed(again, [-5.0]).epoch == 1


def test_a_monitor_that_is_not_measured_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'validation\.gauc' cannot be measured .* allowed: validation\.auc"):
        observed(BestWeights("validation.gauc", patience=0), [0.5])


def test_signals_are_noted_and_other_threads_leave_the_handlers_alone() -> None:
    before, signals = signal.getsignal(signal.SIGTERM), StopSignals()
    with signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere() -> None:
        with StopSignals().handled():
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[object] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]
