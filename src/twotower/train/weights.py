"""Weights of a model by name, and their moving average."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.arrays.types import Shaped
from twotower.distributed import DistributedContext


class Weights:
    """Parameters of a model by name; a sharded table is this rank's piece."""

    def __init__(self, model: nn.Module, context: DistributedContext | None = None, sharded: bool = False) -> None:
        """Name the parameters of `model`. `sharded`: each rank of `context` holds different numbers."""
        self._model, self._context, self._sharded = model, context or DistributedContext(), sharded

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the parameters, not copies."""
        return dict(self._model.named_parameters())

    @torch.no_grad()
    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(state[name])

    def copy(self) -> dict[str, Shaped[Tensor, "*_"]]:
        return {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}

    def are_finite(self) -> bool:
        """Return True if every number is finite, on all ranks."""
        broken = any(not bool(torch.isfinite(p).all()) for p in self._model.parameters())
        return not (self._context.all_reduce_sum(float(broken))[0] if self._sharded else broken)


class MovingAverage:
    """Exponential moving average of the weights, which evaluation uses.

        a_t = d a_{t-1} + (1 - d) w_t,    d = min(decay, t / (t + 10)) after t steps

    The lower decay of the first steps discounts the random initial weights.
    """

    def __init__(self, weights: Weights, decay: float) -> None:
        """Begin with the current weights; decay 0 keeps no average."""
        self._model_weights, self._decay = weights, decay
        self.weights: dict[str, Shaped[Tensor, "*_"]] = {}
        """Averaged weights by name; empty without an average."""
        self.restart()

    def restart(self) -> None:
        self.weights = self._model_weights.copy() if self._decay else {}

    def update(self, steps: int) -> None:
        """Add the weights after `steps` steps."""
        decay = min(self._decay, steps / (steps + 10))
        if self.weights:
            for name, parameter in self._model_weights.state().items():
                self.weights[name].lerp_(parameter.detach(), 1 - decay)

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        return self.weights

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        """Overwrite the average, if the state holds one."""
        if state:
            for name, average in self.weights.items():
                average.copy_(state[name])
