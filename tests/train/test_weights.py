"""The average follows the weights, and continues from its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twotower.train.weights import MovingAverage, Weights


def follow(model: nn.Linear, average: MovingAverage, steps: range) -> float:
    for step in steps:
        nn.init.constant_(model.weight, step)
        average.update(step)
    return float(average.weights["weight"])


def test_the_average_is_that_of_the_formula_also_after_a_resume() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 7.0)
    expected = 7.0
    for step in range(1, 100):
        decay = min(0.8, step / (step + 10))
        expected = decay * expected + (1 - decay) * step
    whole = MovingAverage(Weights(model), 0.8)
    part = MovingAverage(Weights(model), 0.8)
    found = follow(model, whole, range(1, 100))
    assert found == pytest.approx(expected, rel=1e-5)
    follow(model, part, range(1, 50))
    again = MovingAverage(Weights(model), 0.8)
    again.load_state({name: t.clone() for name, t in part.state().items()})
    assert follow(model, again, range(50, 100)) == found


def test_without_a_decay_there_is_no_average() -> None:
    model = nn.Linear(1, 1, bias=False)
    off = MovingAverage(Weights(model), 0.0)
    off.update(1)
    off.load_state({"weight": torch.ones(1, 1)})
    assert not off.state()
