"""Progress of a training, on a terminal, in a notebook or in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from twotower.evaluation.config import MetricSet
from twotower.progress import JobProgress, StatusLine, duration
from twotower.reports.metric_tables import epoch_metrics
from twotower.reports.terminal import log, print_line
from twotower.train.progress import Callback, EpochRecord

if TYPE_CHECKING:
    from twotower.train.recipe import Recipe

SECONDS_BETWEEN_LINES = 60.0
"""Least seconds between two lines about steps or compared values, where lines cannot be overwritten."""


class Progress(Callback):
    """Progress of a training: a line for each phase and epoch; between them a status line, or a line a minute."""

    def __init__(self, ends_process: bool = True, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.ends_process, self._clock = ends_process, clock
        self._recipe: Recipe | None = None
        self._at = ""
        """Number and name of the phase."""
        self._steps: JobProgress | None = None
        self._values = self._counted("values compared on validation")
        self._began, self._first, self._epoch = clock(), 0, 0
        """Time at which the epochs began; numbers of epochs done then, and now."""

    def on_phase(self, name: str, recipe: Recipe, epochs: int = 0) -> None:
        at = f"phase {recipe.phases.index(name) + 1} of {len(recipe.phases)}: {name}"
        if at == self._at:  # a command reads the tables, and the training checks them
            return
        self._at, self._recipe, self._values = at, recipe, self._counted("values compared on validation")
        self._began, self._first, self._epoch = self._clock(), epochs, epochs
        print_line(at)
        self._show_in_context("")

    def on_value(self) -> None:
        if StatusLine.present:
            self._values.skip(1)
            self._show_in_context(f", {self._values.done:,} value{'s' * (self._values.done > 1)} compared")
        else:
            self._values.advance(1)

    def on_step_end(self, done: int, total: int, loss: float) -> None:
        if self._steps is None:
            self._steps = self._counted(f"steps of epoch {self._epoch + 1}{self._of_epochs}", total)
            self._steps.skip(done)
        else:
            self._steps.advance(1, f", loss {loss:.4f}")
        if done == total:
            self._steps = None

    def on_epoch_end(self, history: list[EpochRecord]) -> None:
        entry, recipe, left = history[-1], self._recipe, ""
        self._epoch = int(entry["epoch"])
        measured = epoch_metrics(entry, recipe.evaluation.metric_set if recipe else MetricSet())
        shown = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
        if recipe and recipe.fitted_last and shown:
            shown += f" (without {recipe.fitted_last})"
        if recipe and (n := recipe.train.epochs - self._epoch):
            seconds = (self._clock() - self._began) / (self._epoch - self._first) * n
            left = f", {'at most ' if recipe.train.patience else ''}{duration(seconds)} of epochs left"
        print_line(
            f"epoch {self._epoch:>3}{self._of_epochs}  loss {entry['train.loss']:.4f}  {shown}  "
            f"{entry['train.seconds']:.1f} s{left}"
        )

    @property
    def _of_epochs(self) -> str:
        return f" of {self._recipe.train.epochs}" if self._recipe else ""

    def _counted(self, what: str, total: int | None = None) -> JobProgress:
        return JobProgress(log, what, total, seconds=SECONDS_BETWEEN_LINES, clock=self._clock)

    def _show_in_context(self, more: str) -> None:
        if StatusLine.present:
            StatusLine.present.context = self._at.partition(": ")[2] + more
            StatusLine.present.show()
