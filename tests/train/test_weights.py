"""Weights: no average without a decay, the best epoch, patience, learning rates, groups, clipping, continued states."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from trainers import same
from worlds import settings

from twotower.data.dataset import Dataset
from twotower.errors import ConfigError
from twotower.model.two_tower import TwoTower
from twotower.train.optimizers import OPTIMIZERS
from twotower.train.recipe import TrainConfig
from twotower.train.weights import BestWeights, ModelOptimizer, MovingAverage, Weights, learning_rate, parameter_groups


def test_without_a_decay_there_is_no_average() -> None:
    model = nn.Linear(1, 1, bias=False)
    off = MovingAverage(Weights(model), 0.0)
    off.update(1)
    off.load_state({"weight": torch.ones(1, 1)})
    assert not off.state()


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
