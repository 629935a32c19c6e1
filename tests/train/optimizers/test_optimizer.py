"""Every optimizer keeps its protocol: those that are registered, and the example from outside the package."""

from __future__ import annotations

import pytest
import torch
from mykinds.optimizers import RmsProp
from torch import Tensor

from twotower.train.optimizers import OPTIMIZERS
from twotower.train.optimizers.optimizer import Optimizer

ALL: list[Optimizer] = [*(kind() for kind in OPTIMIZERS), RmsProp()]
every = pytest.mark.parametrize("optimizer", ALL, ids=repr)


def table() -> Tensor:
    return torch.ones(4, 3).requires_grad_()


def steps(
    optimizer: Optimizer, weight: Tensor, n: int, decay: float = 0.0, fused: bool = True
) -> torch.optim.Optimizer:
    """Make n steps in which the last two rows have no gradient."""
    made = optimizer.build([{"params": [weight], "weight_decay": decay}], 0.1, fused)
    for number in range(n):
        weight.grad = torch.zeros(4, 3)
        weight.grad[:2] = 1.0 + number
        made.step()
    return made


@every
def test_an_optimizer_is_documented_and_is_read_from_what_it_is_written_as(optimizer: Optimizer) -> None:
    assert "Use it" in (type(optimizer).__doc__ or "")
    assert OPTIMIZERS.parse(optimizer.model_dump(mode="json")) == optimizer
    assert OPTIMIZERS.parse(optimizer.kind) == optimizer


@every
def test_a_step_goes_against_the_gradient_by_the_learning_rate_of_its_group(optimizer: Optimizer) -> None:
    weight = table()
    made = steps(optimizer, weight, 1)
    once = 1 - weight.detach()
    assert bool((once[:2] > 0).all())
    for group in made.param_groups:
        group["lr"] = 0.0
    made.step()
    torch.testing.assert_close(1 - weight.detach(), once)


@every
def test_the_fused_kernel_gives_what_the_other_gives(optimizer: Optimizer) -> None:
    weights = table(), table()
    for weight, fused in zip(weights, (True, False), strict=True):
        steps(optimizer, weight, 3, 0.01, fused)
    torch.testing.assert_close(*weights)


@every
def test_weight_decay_shrinks_weights_without_a_gradient(optimizer: Optimizer) -> None:
    weight = table()
    steps(optimizer, weight, 1, decay=0.5)
    assert bool((weight[2:] < 1).all())


@every
def test_with_a_sparse_rule_a_row_without_a_gradient_stays_and_the_state_has_a_number_for_each_weight(
    optimizer: Optimizer,
) -> None:
    weight = table()
    state = steps(optimizer, weight, 3).state[weight]
    kept = {name for name, value in state.items() if isinstance(value, Tensor) and value.shape == weight.shape}
    if optimizer.sparse_rule:
        assert bool((weight[2:] == 1).all())
        assert kept == {optimizer.sparse_state} - {""}
    else:
        assert not optimizer.sparse_state
