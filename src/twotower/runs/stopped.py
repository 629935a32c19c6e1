"""The best epoch so far of a training that has not ended: it was stopped or killed, or still runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor

from twotower.arrays.types import Shaped
from twotower.config.experiment import Config
from twotower.errors import RunError
from twotower.escaping import python_literal
from twotower.evaluation.config import Metrics
from twotower.files import layout, locks
from twotower.files.foreign_code import CODE_OF
from twotower.train.checkpoint import Checkpoint, load_states
from twotower.train.progress import EpochRecord, TrainingProgress
from twotower.train.weights import BestWeights


@dataclass(frozen=True)
class StoppedTraining:
    """State of the newest checkpoint of a run that is not complete."""

    weights: dict[str, Shaped[Tensor, "*_"]]
    """Weights of the best epoch, by name."""
    data: str
    """Digest of the dataset that it was trained on."""
    code: dict[str, JsonValue]
    """Digests of the code of kinds defined outside the package, as it was trained by."""
    path: Path
    """Folder of the checkpoint."""
    history: list[EpochRecord]
    metrics: Metrics
    """Metrics `train.…` of the steps so far."""
    state: str
    """"stopped after epoch 7 of 20; the best is epoch 5", or the same of a training that still runs."""

    @classmethod
    def read(cls, folder: Path, config: Config) -> StoppedTraining:
        """Read the newest intact checkpoint of a run folder, which stays as it is. Raises RunError if none has a validated epoch."""
        found = Checkpoint.newest(folder / layout.CHECKPOINTS)
        best = BestWeights(config.train.monitor, config.train.patience)
        if found:
            load_states({"best": best}, found.tensors)
        if not found or not best.weights:
            raise RunError(
                f"{folder}: an unfinished run (metrics.json is missing) without a validated epoch; "
                f"train it with `fit(config, folder={python_literal(folder)}, resume=True)`"
            )
        progress = TrainingProgress.restore(found.progress, found.path)
        running = False
        with suppress(OSError):  # of a folder that may not be written
            running = locks.is_locked(folder / layout.RUN_LOCK)
        return cls(
            best.weights,
            str(found.fingerprint.get("data")),
            {key.removeprefix(CODE_OF): value for key, value in found.fingerprint.items() if key.startswith(CODE_OF)},
            found.path,
            progress.history,
            progress.metrics(best.epoch),
            f"{'in training' if running else 'stopped'} after epoch {progress.epoch} of {config.train.epochs}; "
            f"the best is epoch {best.epoch}"
            + "".join(f"; train.start weighs pair {start.pair} after the last" for start in config.last_starts)
            + ("; model.stacking weighs its terms after the last" if config.model.stacking else "")
            + "".join(
                f"; model.{option} is fitted after the last"
                for option in ("own_counts", "recent_popularity", "cold_item_bias")
                if getattr(config.model, option)
            ),
        )
