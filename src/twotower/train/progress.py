"""Progress of a training: its counters, sums and history, and the callbacks that report it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from twotower.errors import RunError

if TYPE_CHECKING:
    from twotower.train.recipe import Recipe

EpochRecord = dict[str, float]
"""Loss, validation metrics, learning rate and seconds of one epoch, by name."""


@dataclass
class TrainingProgress:
    """Counts and sums up to the current step, and one record per finished epoch."""

    epoch: int = 0
    batch: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all epochs
    rows: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    mimic_sum: float = 0.0
    history: list[EpochRecord] = field(default_factory=list)

    @classmethod
    def restore(cls, state: dict[str, JsonValue], path: Path) -> TrainingProgress:
        """Return the progress in a checkpoint. Raises RunError if a field is unknown, missing or has another type."""
        types = {name: (int, float) if isinstance(v, float) else (type(v),) for name, v in vars(cls()).items()}
        if state.keys() != types.keys() or not all(type(v) in types[name] for name, v in state.items()):
            raise RunError(
                f"{path / 'state.json'} is damaged: its progress has unknown or missing fields; remove {path}"
            )
        return cls(**state)  # type: ignore[arg-type]

    def metrics(self, best_epoch: int) -> dict[str, float]:
        """Return the metrics `train.…` so far; `best_epoch`, from 1, is the epoch whose weights are kept."""
        return {
            "train.seconds": self.seconds,
            "train.rows_per_second": self.rows / max(self.seconds, 1e-9),
            "train.steps": float(self.step),
            "train.epochs": float(self.epoch),
            "train.best_epoch": float(best_epoch),
        }


class Callback:
    """Methods that a training calls. They do nothing; override those that you need."""

    ends_process = False
    """True if a second signal to stop may end the process, as in a command."""

    def on_phase(self, name: str, recipe: Recipe, epochs: int = 0) -> None:
        """Run at the beginning of a phase of `recipe.phases`, after `epochs` finished epochs."""

    def on_value(self) -> None:
        """Run after a value of a closed form or of a fit is measured on validation."""

    def on_step_end(self, done: int, total: int, loss: float) -> None:
        """Run after step `done`, from 1, of the `total` steps of an epoch; `loss` is the loss of its batch."""

    def on_epoch_end(self, history: list[EpochRecord]) -> None:
        """Run after an epoch; the last entry of `history` holds its loss, validation metrics and seconds."""
