"""Learning rates, groups of parameters, clipping, and an optimizer that continues from its state."""

from __future__ import annotations

import copy

import pytest
import torch
from trainers import same
from worlds import settings

from twotower.data.dataset import Dataset
from twotower.model.two_tower import TwoTower
from twotower.train.optim import ModelOptimizer, learning_rate, parameter_groups
from twotower.train.optimizers import OPTIMIZERS
from twotower.train.recipe import TrainConfig
from twotower.train.weights import Weights

CPU = torch.device("cpu")


def test_schedules_move_the_learning_rate_as_they_say() -> None:
    def rates(n: int = 5, **train: object) -> list[float]:
        config = TrainConfig.model_validate({"epochs": 4, "lr": 1.0, **train})
        return [learning_rate(config, step, n) for step in range(4 * n)]

    assert rates() == [1.0] * 20
    assert rates(schedule="step", lr_decay_rate=0.5, lr_decay_epochs=2) == [1.0] * 10 + [0.5] * 10
    cosine = rates(schedule="cosine")
    assert cosine[0] == 1.0
    assert cosine[10] == pytest.approx(0.5)
    assert sorted(cosine, reverse=True) == cosine
    assert rates(warmup_steps=2)[:3] == [0.5, 1.0, 1.0]


def small_model(board: Dataset, **train: object) -> tuple[TwoTower, TrainConfig]:
    config = settings(model={"width": 4}, train={"lr": 0.1, **train})
    torch.manual_seed(0)
    return TwoTower(config.model, board.encoders.fields("user"), board.encoders.fields("item")), config.train


def test_every_trained_parameter_is_in_one_group(board: Dataset) -> None:
    decays = {"weight_decay": 0.1, "embedding_weight_decay": 0.2, "bias_weight_decay": 0.3}
    model, config = small_model(board, **decays)
    groups = parameter_groups(model, config)
    assert groups.keys() == {0.1, 0.2, 0.3}
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(trained)
    assert id(model.global_bias) in {id(p) for p in groups[0.3]}


def test_gradients_are_scaled_to_the_norm(board: Dataset) -> None:
    model, config = small_model(board, optimizer="SGD", clip_norm=0.5)
    before = Weights(model).copy()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    ModelOptimizer(model, config, 5, CPU).step(0)
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in model.named_parameters()])
    assert float(moved.norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS.names)
def test_an_optimizer_continues_from_its_state(board: Dataset, name: str) -> None:
    model, config = small_model(board, optimizer=name)

    def run(model: TwoTower, optimizer: ModelOptimizer, steps: range) -> None:
        for step in steps:
            for number, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, number + step + 1.0) if p.requires_grad else None
            optimizer.step(step)

    optimizer = ModelOptimizer(model, config, 5, CPU)
    run(model, optimizer, range(3))
    other = copy.deepcopy(model)
    again = ModelOptimizer(other, config, 5, CPU)
    again.load_state({key: value.clone() for key, value in optimizer.state().items()})
    run(model, optimizer, range(3, 5))
    run(other, again, range(3, 5))
    assert same(Weights(model).state(), Weights(other).state())
    assert same(optimizer.state(), again.state())
