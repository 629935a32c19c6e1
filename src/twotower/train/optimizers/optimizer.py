"""Protocol of the optimizers."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch.optim.optimizer import ParamsT

from twotower.kinds import Kind


class Optimizer(Kind):
    """Update of the weights by their gradients. `train` has the learning rate and the weight decay."""

    sparse_rule: ClassVar[str] = ""
    """Name in fbgemm's `EmbOptimType` of the same update of single rows. Empty: a step changes every row of a table."""
    sparse_state: ClassVar[str] = ""
    """Torch's name of the state that the rule keeps for each weight. Empty: no state."""

    @abstractmethod
    def build(self, groups: ParamsT, lr: float, fused: bool) -> torch.optim.Optimizer:
        """Return torch's optimizer of parameter groups, each with its weight decay; `fused` requests a fused kernel."""
