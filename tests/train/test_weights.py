"""The average follows the weights, and continues from its state."""

from __future__ import annotations

import torch
from torch import nn

from twotower.train.weights import MovingAverage, Weights


def test_without_a_decay_there_is_no_average() -> None:
    model = nn.Linear(1, 1, bias=False)
    off = MovingAverage(Weights(model), 0.0)
    off.update(1)
    off.load_state({"weight": torch.ones(1, 1)})
    assert not off.state()
