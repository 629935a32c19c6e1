"""Protocol of the optimizers."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch.optim.optimizer import ParamsT

from twotower.kinds import Kind


class Optimizer(Kind):
    """Update of the weights by their gradients. Learning rate and weight decay are those of `train`."""

    sparse_rule: ClassVar[str] = ""
    """Name in fbgemm's `EmbOptimType` of the same update of single rows. Empty: a step changes every row of a sharded table."""
    sparse_state: ClassVar[str] = ""
    """Name of the state that the rule keeps for each weight, as torch's optimizer calls it. Empty: it keeps none."""

    @abstractmethod
    def build(self, groups: ParamsT, lr: float, fused: bool) -> torch.optim.Optimizer:
        """Return torch's optimizer of groups of parameters, each with its weight decay. `fused` asks for a fused kernel, if
        the optimizer has one."""
