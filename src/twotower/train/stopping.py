"""Ends of a training: no better validation metric for a while, or a signal."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from twotower.arrays.types import Shaped
from twotower.errors import ConfigError
from twotower.train.weights import Weights


class BestWeights:
    """Weights of the epoch with the best monitored metric, or of the last one without validation, and the number of
    validations since."""

    def __init__(self, monitor: str, patience: int, higher_is_better: bool = True) -> None:
        """Watch the metric `monitor`, such as "validation.auc"; `patience` 0 never runs out."""
        self._monitor, self._patience = monitor, patience
        self._sign = 1 if higher_is_better else -1
        self.weights: dict[str, Shaped[Tensor, "*_"]] = {}
        self.score, self.epoch, self._validations_since = -math.inf, 0, 0

    @property
    def out_of_patience(self) -> bool:
        """True if as many validations as `patience` brought no better metric."""
        return bool(self._patience) and self._validations_since >= self._patience

    def score_of(self, metrics: Mapping[str, float]) -> float:
        """Return the monitored metric, negated where lower is better. Raises ConfigError if it is not among the metrics."""
        if self._monitor not in metrics:
            raise ConfigError(
                f"train.monitor '{self._monitor}' cannot be measured on this validation part (one class only?); "
                f"allowed: {', '.join(metrics)}"
            )
        return self._sign * metrics[self._monitor]

    def observe(self, metrics: dict[str, float], epoch: int, weights: Weights) -> None:
        """Copy the weights if the metrics of epoch `epoch`, from 1, 0 for a start, are the best yet. Raises ConfigError if the monitor is
        not among the metrics."""
        score = self.score_of(metrics)
        if score > self.score:
            self.score, self.epoch, self._validations_since = score, epoch, 0
            self.weights = weights.copy()
        else:
            self._validations_since += 1

    def keep(self, epoch: int, weights: Weights) -> None:
        """Copy the weights of epoch `epoch`, from 1, 0 for a start, without a metric: the last epoch is the best."""
        self.epoch, self.weights = epoch, weights.copy()

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        """Return the best weights, their score and epoch, and the number of validations since; {} before the first."""
        if not self.weights:
            return {}
        return {
            "score": torch.tensor(self.score, dtype=torch.float64),
            "epoch": torch.tensor(self.epoch),
            "validations_since": torch.tensor(self._validations_since),
            **{f"weights/{name}": tensor for name, tensor in self.weights.items()},
        }

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        """Continue from a state."""
        if state:
            self.score, self.epoch = float(state["score"]), int(state["epoch"])
            self._validations_since = int(state["validations_since"])
            prefix = "weights/"
            self.weights = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


class StopSignals:
    """Requests of SIGTERM and SIGINT to stop a training after the present step."""

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Note these signals for the length of the block instead of ending; without effect outside the main thread."""

        def request_stop(signal_number: int, frame: FrameType | None) -> None:
            self.received = True  # several ranks agree first: all must stop after the same step

        try:
            old = {s: signal.signal(s, request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            old = {}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)
