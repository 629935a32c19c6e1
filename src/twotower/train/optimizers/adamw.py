"""AdamW."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from twotower.train.optimizers.adam import Adam


class AdamW(Adam):
    """Adam with decoupled weight decay, which is not divided by the second moment.

    Use it with weight decay (Loshchilov and Hutter 2019, algorithm 2).
    """

    kind = "AdamW"

    def build(self, groups: ParamsT, lr: float, fused: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr, betas=(0.9, self.beta2), fused=fused)
