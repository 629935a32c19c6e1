"""Progress of a training on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from twotower.evaluation.config import MetricSet
from twotower.progress import JobProgress
from twotower.reports.metric_tables import epoch_metrics
from twotower.reports.terminal import MessageHandler, log
from twotower.train.progress import Callback, EpochRecord

if TYPE_CHECKING:
    from rich import progress as bars


SECONDS_BETWEEN_LINES = 60.0
"""Least seconds between two lines about the steps of an epoch."""


class Progress(Callback):
    """Progress of a training: one line an epoch, and within it a bar on a terminal, elsewhere a line a minute."""

    def __init__(self, measured: MetricSet | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Show the metrics of a training, by default the registered ones."""
        self._clock = clock
        self._measured = measured or MetricSet()
        self._bar: tuple[bars.Progress, bars.TaskID] | None = None
        self._lines: JobProgress | None = None
        self._live = sys.stdout.isatty()
        self._last = 0.0

    def __enter__(self) -> Progress:
        self._before_messages(self.close)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._before_messages(lambda: None)

    def _before_messages(self, call: Callable[[], None]) -> None:
        for handler in log.handlers:
            if isinstance(handler, MessageHandler):
                handler.before = call

    def on_step_end(self, done: int, total: int, loss: float) -> None:
        if not self._live:
            self._count(done, total)
            return
        now = self._clock()
        if done < total and now - self._last < 0.1:
            return
        self._last = now
        if self._bar is None:
            from rich import progress as bars

            bar = bars.Progress(
                bars.TextColumn("training"), bars.BarColumn(), bars.MofNCompleteColumn(),
                bars.TextColumn("{task.fields[loss]}"), bars.TimeRemainingColumn(), transient=True,
            )  # fmt: skip
            bar.start()
            self._bar = bar, bar.add_task("epoch", total=total, loss="")
        bar, task = self._bar
        bar.update(task, completed=done, loss=f"loss {loss:.4f}")
        if done == total:
            self.close()

    def _count(self, done: int, total: int) -> None:
        if self._lines is None:
            self._lines = JobProgress(
                log, "steps of the epoch", total, seconds=SECONDS_BETWEEN_LINES, clock=self._clock
            )
            self._lines.skip(done)
        else:
            self._lines.advance(1)
        if done == total:
            self._lines = None

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def on_epoch_end(self, history: list[EpochRecord]) -> None:
        self.close()
        entry = history[-1]
        shown = "  ".join(f"{name} {value:.4f}" for name, value in epoch_metrics(entry, self._measured).items())
        print(
            f"epoch {entry['epoch']:>3}  loss {entry['train.loss']:.4f}  {shown}  {entry['train.seconds']:.1f} s",
            flush=True,
        )
