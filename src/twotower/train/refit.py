"""A second training on all interactions, with everything that the first one has chosen on validation."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from twotower.data.dataset import Dataset
from twotower.data.splits import TEST
from twotower.features.values import UNKNOWN
from twotower.train import stacking
from twotower.train.factors import factors_before
from twotower.train.mix import Mix
from twotower.train.progress import Callback
from twotower.train.trainer import Trainer

log = logging.getLogger(__name__)


class _InOnePhase(Callback):
    """Callback that passes the steps and epochs of a training on, and not its phases."""

    def __init__(self, callback: Callback) -> None:
        self.ends_process = callback.ends_process
        self.on_step_end, self.on_epoch_end = callback.on_step_end, callback.on_epoch_end  # type: ignore[method-assign]


class Refit(Trainer):
    """Trains the recipe of an earlier training on a dataset of all its interactions.

    The number of epochs, the values of closed forms, the weights of the mix and of stacking, and the width of narrow
    vectors are those of the earlier training, which has ended. Schedules of the learning rate are as long as there.
    Nothing is measured."""

    def __init__(self, first: Trainer, dataset: Dataset, folder: Path | None, callback: Callback) -> None:
        """Build the model anew. `folder` receives the checkpoints. Raises the errors of Trainer."""
        train = first.recipe.train.model_copy(update={"patience": 0})
        recipe = first.recipe.model_copy(update={"train": train})
        super().__init__(dataset, recipe, folder, _InOnePhase(callback), first.context, first.device)
        self._first = first
        self.last_epoch = first.best.epoch
        self.narrowing.temperature, self.narrowing.is_fitted = first.narrowing.temperature, first.narrowing.is_fitted

    @property
    def chosen(self) -> str:
        """Choices of the earlier training as text, by which a resumed training knows them again."""
        first, layer = self._first, self._first.model.narrow
        narrow = layer and (layer.width, first.narrowing.temperature, first.narrowing.is_fitted)
        return repr((self.last_epoch, first.solved, first.mixed, first.stacked, narrow))

    def _begin(self) -> None:
        started = time.perf_counter()
        for form, _ in self._first.solved:
            if form.pair in self.recipe.first_starts:
                self._closed_forms.solve_again(form, self.dataset, 1.0)
        self.ema.restart()
        self.progress.seconds += time.perf_counter() - started
        if not self.last_epoch:
            self._measure(0)

    def _fit_last(self) -> dict[str, float]:
        started, first = time.perf_counter(), self._first
        last = [(form, weight) for form, weight in first.solved if form.pair in self.recipe.last_starts]
        for form, weight in last:
            self._check_stop()
            self._closed_forms.solve_again(form, self.dataset, weight)
        if first.mixed:
            Mix(self.model, self.dataset, self.recipe, self.context).write_terms(first.mixed)
            if first.mixed.cold is not None:
                with torch.no_grad():
                    self.model.cold_items.values[UNKNOWN] = first.mixed.cold
        if first.stacked:
            stacking.write(self.model, self.dataset, first.stacked)
        self.progress.seconds += time.perf_counter() - started
        return {}

    def _narrow(self, validated: dict[str, float]) -> dict[str, float]:
        layer = self._first.model.narrow
        if layer is not None:
            self._check_stop()
            started = time.perf_counter()
            self.narrowing.add_again(factors_before(self.model, self.dataset, TEST), self.dataset, layer.width)
            self.progress.seconds += time.perf_counter() - started
        return validated

    def _solve_again(self, validated: dict[str, float]) -> dict[str, float]:
        return validated
