"""One matrix product gives a tower's vector and its bias."""

from __future__ import annotations

import pytest
import torch
from model_worlds import close, not_none
from torch import nn

from twotower.model.towers import TowerHead

HIDDEN, JOINED = torch.randn(9, 6), torch.randn(9, 8)


def test_vector_and_bias_are_the_rows_of_one_layer_and_the_vector_alone_is_activated_and_normalised() -> None:
    head = TowerHead(6, 8, 4, bias=True, residual=True, activation="ReLU", norm=True)
    both = not_none(head.layer)(HIDDEN) + JOINED @ not_none(head.residual).weight.T
    vector, bias = head(HIDDEN, JOINED)
    assert both.shape == (9, 5)
    assert close(vector, nn.functional.layer_norm(both[:, :4].relu(), (4,)))
    assert torch.equal(bias, both[:, 4:])


@pytest.mark.parametrize(("width", "bias"), [(None, True), (None, False), (4, False)])
def test_without_a_layer_or_a_bias_there_is_none(width: int | None, bias: bool) -> None:
    head = TowerHead(6, 8, width, bias=bias)
    vector, none = head(HIDDEN, JOINED)
    assert none is None
    assert vector.shape == (9, head.width) == (9, width or 6)
    assert width or torch.equal(vector, HIDDEN)
