"""Ends of a training: no better validation metric for a while, or a signal."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import ClassVar

import torch
from torch import Tensor

from twotower.arrays.types import Shaped
from twotower.errors import ConfigError
from twotower.train.weights import Weights

log = logging.getLogger(__name__)
SECONDS_OF_OPERATION = 4.0
"""Seconds that an operation may take, such as one of a large matrix, after a signal that stops a training at once."""
SECONDS_OF_REPEATS = 0.5
"""Seconds in which the same signal is no second one: launchers such as `timeout` send it to a process and its group."""


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


class StopNow(KeyboardInterrupt):
    """A signal has ended a block of `at_once`."""


class StopSignals:
    """Requests of SIGTERM and SIGINT to stop a training: after the present step, or within a block of `at_once`."""

    _present: ClassVar[StopSignals | None] = None
    """The one whose block `handled` runs."""

    def __init__(self, ends_process: bool = False, ranks: int = 1) -> None:
        """With `ends_process` a second signal ends the process. So does the first one if an operation in a block of
        `at_once` takes longer than SECONDS_OF_OPERATION. Otherwise a second signal calls the handler of before. With
        several `ranks` it does nothing: a launcher repeats signals."""
        self.received = 0
        """Number of the signal that has arrived; 0: none."""
        self._ends_process, self._ranks = ends_process and ranks == 1, ranks
        self._at_once = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Note these signals in the block instead of ending, and log a line when the first one arrives. Without effect
        outside the main thread."""
        since = 0.0

        def request_stop(number: int, frame: FrameType | None) -> None:
            nonlocal since
            if not self.received:
                self.received, since = number, time.monotonic()  # ranks agree first: all must stop after the same step
            elif self._ranks == 1 and not self._ends_process and _is_second(number, self.received, since):
                signal.signal(number, old[number])
                signal.raise_signal(number)
            if self._at_once:
                self._at_once = False
                raise StopNow

        try:
            old = {int(s): signal.signal(s, request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            yield
            return
        arrivals, arrived = socket.socketpair()
        arrived.setblocking(False)
        before, StopSignals._present = StopSignals._present, self
        descriptor = signal.set_wakeup_fd(arrived.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(arrivals,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for s, handler in old.items():
                signal.signal(s, handler)
            StopSignals._present = before
            with arrived:
                arrived.shutdown(socket.SHUT_WR)  # also for a forked process that has it
            watcher.join()

    def _watch(self, arrivals: socket.socket) -> None:
        """Answer signals while the main thread is in an operation, at whose end alone Python handles them."""
        first, since = 0, 0.0
        with arrivals, suppress(IndexError):  # the block ends, and has closed the other end
            while True:
                try:
                    number = arrivals.recv(1)[0]
                except TimeoutError:
                    arrivals.settimeout(None)
                    if self._at_once and not self.received:
                        log.info("stopped; `resume=True` goes on")
                        self._end(first)
                    continue
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if not first:
                    first, since = number, time.monotonic()
                    log.info("stopping after this step …" + ("; a second signal ends now" if self._ranks == 1 else ""))
                    arrivals.settimeout(SECONDS_OF_OPERATION)
                elif _is_second(number, first, since):
                    self._end(number)

    def _end(self, number: int) -> None:
        """End the process, if it is to."""
        if self._ends_process:
            os._exit(128 + number)


def _is_second(number: int, first: int, since: float) -> bool:
    """Return False for a signal that repeats the first one, of the time `since`."""
    return number != first or time.monotonic() - since > SECONDS_OF_REPEATS


@contextmanager
def at_once() -> Iterator[None]:
    """Let a signal that `StopSignals` handle end the block by StopNow, also one that has arrived before."""
    signals = StopSignals._present
    if signals is None:
        yield
        return
    before, signals._at_once = signals._at_once, True
    try:
        if signals.received:
            raise StopNow
        yield
    finally:
        signals._at_once = before
