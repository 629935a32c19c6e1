"""Adam."""

from __future__ import annotations

import torch
from pydantic import Field
from torch.optim.optimizer import ParamsT

from twotower.train.optimizers.optimizer import Optimizer


class Adam(Optimizer):
    """Steps divided by the root of the gradients' second moment. Weight decay is added to the gradients.

    Use it first (Kingma and Ba 2015, algorithm 1).
    """

    kind = "Adam"
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")

    def build(self, groups: ParamsT, lr: float, fused: bool) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr, betas=(0.9, self.beta2), fused=fused)
