"""Trainers of tests: their weights, and callbacks that end a training."""

from __future__ import annotations

import torch

from twotower.train.objective import ContrastiveObjective
from twotower.train.progress import Callback
from twotower.train.trainer import Trainer


def contrastive(trainer: Trainer) -> ContrastiveObjective:
    """The objective of a trainer whose loss is contrastive."""
    assert isinstance(trainer.objective, ContrastiveObjective)
    return trainer.objective


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class StopAt(Callback):
    """Raises after a given number of steps, as a crash would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step_end(self, done: int, total: int, loss: float) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
