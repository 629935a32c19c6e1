"""Stochastic gradient descent."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from twotower.train.optimizers.optimizer import Optimizer


class Sgd(Optimizer):
    """Stochastic gradient descent without momentum.

    Use it if memory is scarce: it has no state, and a step changes only the rows of a sharded table that a batch reads.
    """

    kind = "SGD"
    sparse_rule = "EXACT_SGD"

    def build(self, groups: ParamsT, lr: float, fused: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr, fused=fused)
