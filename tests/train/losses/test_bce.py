"""Binary cross-entropy equals a loop over its pairs, gradient included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.train.losses.bce import Bce

PAIR = st.tuples(st.floats(-15, 15, allow_nan=False), st.sampled_from([0.0, 1.0]), st.sampled_from([0.25, 1.0, 3.0]))


@settings(deadline=None, max_examples=60)
@given(st.lists(PAIR, min_size=1, max_size=12))
def test_loss_and_gradient_equal_a_loop_over_the_pairs(pairs: list[tuple[float, float, float]]) -> None:
    logits, labels, weights = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs, strict=True))
    logits.requires_grad_()
    loss = Bce()(logits, labels, weights)
    torch.autograd.backward(loss)
    total = sum(w for _, _, w in pairs)
    expected = 0.0
    for x, y, w in pairs:
        p = 1 / (1 + math.exp(-x))
        expected -= w * (y * math.log(p) + (1 - y) * math.log1p(-p)) / total
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    gradient = [w * (1 / (1 + math.exp(-x)) - y) / total for x, y, w in pairs]
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx(gradient, rel=1e-7, abs=1e-12)


def test_huge_logits_give_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = Bce()(logits, torch.tensor([0.0, 1.0]), torch.ones(2))
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(500.0)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.5, -0.5])
