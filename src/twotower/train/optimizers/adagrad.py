"""Adagrad."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from twotower.train.optimizers.optimizer import Optimizer


class Adagrad(Optimizer):
    """Steps divided by the root of the sum of all squared gradients, so rare ids learn fast.

    Use it with large tables: a step changes only the rows that a batch reads (Duchi et al. 2011).
    """

    kind = "Adagrad"
    sparse_rule = "EXACT_ADAGRAD"
    sparse_state = "sum"

    def build(self, groups: ParamsT, lr: float, fused: bool) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(groups, lr, fused=fused)
