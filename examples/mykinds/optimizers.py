"""An optimizer of one's own: torch's RMSprop, as `optimizer = RmsProp(alpha=0.9)` in Python, or in TOML

[train.optimizer]
kind = "mykinds.optimizers:RmsProp"
alpha = 0.9
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch.optim.optimizer import ParamsT

from twotower.train.optimizers.optimizer import Optimizer


class RmsProp(Optimizer):
    """Steps divided by the root of a moving average of the squared gradients, without Adam's momentum.

    Use it where the gradients' scale changes during training (Tieleman and Hinton 2012).
    """

    alpha: float = Field(0.99, ge=0, lt=1, description="Decay of the average of squared gradients.")

    def build(self, groups: ParamsT, lr: float, fused: bool) -> torch.optim.Optimizer:
        """Return torch's RMSprop, which has no fused kernel."""
        return torch.optim.RMSprop(groups, lr, alpha=self.alpha)
