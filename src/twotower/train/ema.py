"""Exponential moving average of the weights of a model."""

from __future__ import annotations

from torch import Tensor

from twotower.train.weights import Weights


class MovingAverage:
    """Exponential moving average of the weights, which evaluation uses.

        a_t = d a_{t-1} + (1 - d) w_t,    d = min(decay, t / (t + 10)) after t steps

    The lower decay of the first steps forgets the random weights of the start.
    """

    def __init__(self, weights: Weights, decay: float) -> None:
        """Begin with the present weights; decay 0 keeps no average."""
        self._model_weights, self._decay = weights, decay
        self.weights = weights.copy() if decay else {}
        """Averaged weights by name; empty without an average."""

    def update(self, steps: int) -> None:
        """Add the weights after `steps` steps."""
        decay = min(self._decay, steps / (steps + 10))
        if self.weights:
            for name, parameter in self._model_weights.state().items():
                self.weights[name].lerp_(parameter.detach(), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Return the averaged weights."""
        return self.weights

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Overwrite the average, if one is kept and the state holds one."""
        if state:
            for name, average in self.weights.items():
                average.copy_(state[name])
