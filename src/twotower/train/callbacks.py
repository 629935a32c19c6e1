"""Calls of a training to its caller. Its messages go to the logger "twotower" and the loggers below it."""

from __future__ import annotations

EpochRecord = dict[str, float]
"""Loss, validation metrics, learning rate and seconds of one epoch, by name."""


class Callback:
    """Methods that a training calls; these do nothing. Override those that matter."""

    def on_step_end(self, done: int, total: int, loss: float) -> None:
        """Run after step `done`, from 1, of the `total` steps of an epoch; `loss` is that of the step's batch."""

    def on_epoch_end(self, history: list[EpochRecord]) -> None:
        """Run after an epoch; the last entry of `history` holds its loss, validation metrics and seconds."""
