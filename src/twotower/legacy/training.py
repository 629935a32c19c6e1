"""Training, folder and score of a model, as the class and the script of the teaching project need them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from twotower import runs
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, DataError, did_you_mean
from twotower.evaluation.metrics.auc import auc
from twotower.evaluation.metrics.measured import ScoredPairs
from twotower.legacy.interaction_rows import LabelledRows, assemble_rows
from twotower.reports.terminal import printed_messages
from twotower.runs import Run
from twotower.runs.folder import locked, replace_run, writing_folder
from twotower.train.progress import Callback, EpochRecord
from twotower.train.trainer import Trainer


class _EpochPrinter(Callback):
    """Prints one line an epoch."""

    def on_epoch_end(self, history: list[EpochRecord]) -> None:
        entry = history[-1]
        found = f", val AUC {entry['validation.auc']:.4f}" if "validation.auc" in entry else ""
        print(f"epoch {entry['epoch']}: train loss {entry['train.loss']:.4f}{found}", flush=True)


def fit(dataset: Dataset, config: Config) -> tuple[Run, float]:
    """Train with one line an epoch; return the run and its best validation AUC."""
    train = config.train.model_copy(update={"monitor": config.train.monitor or "validation.auc"})
    with printed_messages():
        trainer = Trainer(dataset, config.model_copy(update={"train": train}), None, _EpochPrinter())
        trained = trainer.run()
    best = max(h["validation.auc"] for h in trained.history if "validation.auc" in h)
    metrics = trained.metrics | {"validation.auc": best}
    assert isinstance(trainer.recipe, Config)  # the config, settled
    return Run(None, trainer.recipe, dataset, trained.model.eval(), metrics, trained.history), best


def save(trained: Run, folder: Path) -> None:
    """Write a run folder, which `DSSMTrainable(model_path=…)` and `main.py` read."""
    with locked(folder):
        save_locked(trained, folder)


def save_locked(trained: Run, folder: Path) -> None:
    """Write a run folder whose lock is held."""
    place = writing_folder(folder)
    runs.start_run(place, trained.dataset, trained.config)
    runs.save_run(place, replace(trained, folder=folder))
    replace_run(folder)


def score(trained: Run, rows: LabelledRows, device: str) -> float:
    """Return the AUC of a model over rows with the features of both sides, weighted if they have weights."""
    schema = trained.dataset.schema
    for feature in schema.features:
        if feature.source not in rows.x.columns:
            raise DataError(
                f"x: no column '{feature.source}'{did_you_mean(feature.source, rows.x.columns)}; the model was "
                "trained on it"
            )
    dataset = assemble_rows(schema, rows, np.zeros(len(rows.y), np.int8), trained.dataset.encoders)
    factors = replace(trained, dataset=dataset, model=trained.model.to(device)).factors()
    scored = ScoredPairs.of(factors.scores(dataset.pairs), dataset.pairs, weighted=True)
    if scored.positive.all() or not scored.positive.any():
        raise DataError("y: labels of the rows of a weight above 0 are of one class only; AUC needs both 0 and 1")
    return auc(scored.scores, scored.positive, weights=scored.weights)


def accelerator_or_cpu(name: str) -> str:
    """Return the torch device for a name of the teaching project: 'gpu' is an accelerator, or the CPU without one."""
    if name == "cpu":
        return "cpu"
    if name not in ("auto", "gpu", "cuda", "mps"):
        raise ConfigError(f"device {name!r} is not known (allowed: cpu, gpu)")
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    print(f"device '{name}': no GPU here, going on on the CPU", flush=True)
    return "cpu"
