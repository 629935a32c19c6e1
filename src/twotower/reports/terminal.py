"""Output on a terminal: messages, progress of a training, tables of metrics, answers."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from twotower.escaping import escape_controls
from twotower.evaluation.metrics import Metrics, Prominence, find_metric, metric_names
from twotower.reports.columns import cell, columns, metric_rows
from twotower.train.callbacks import Callback, EpochRecord

if TYPE_CHECKING:
    from rich import progress as bars

    from twotower.retrieval.request import Answer


def print_line(line: str) -> None:
    """Print a line, with control characters in data escaped."""
    print(escape_controls(line), flush=True)


class FailsafeStream:
    """A stream that drops its text after an error of writing (a full disk, a closed pipe); `error` is the first error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as e:
            self._give_up(e)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as e:
            self._give_up(e)

    def _give_up(self, error: OSError) -> None:
        self.error = self.error or error
        # The interpreter flushes the stream at its end; the null device accepts the buffered text.
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def install_failsafe_streams() -> FailsafeStream:
    """Wrap standard output and error, open those that a shell has closed, and return standard output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # otherwise the next file that is opened gets this number, and the printed text
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    streams = []
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream = stream or os.fdopen(number, "w", encoding="utf-8", closefd=False)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack characters of ids and titles
        streams.append(FailsafeStream(stream))
    sys.stdout, sys.stderr = cast(list[TextIO], streams)
    return streams[0]


class MessageHandler(logging.Handler):
    """Prints each message of the library as a line, after a call of `before`; a warning begins with "warning: "."""

    def __init__(self, translate: Callable[[str], str] = str, on_stderr: bool = False) -> None:
        super().__init__()
        self.translate, self.on_stderr = translate, on_stderr
        self.before: Callable[[], None] = lambda: None

    def emit(self, record: logging.LogRecord) -> None:
        self.before()
        line = f"{'warning: ' if record.levelno >= logging.WARNING else ''}{self.translate(record.getMessage())}"
        print(escape_controls(line), flush=True, file=sys.stderr if self.on_stderr else sys.stdout)


log = logging.getLogger("twotower")


@contextmanager
def printed_messages(translate: Callable[[str], str] = str, on_stderr: bool = False) -> Iterator[None]:
    """Print messages of the library, translated, on standard output or standard error while the block runs.

    They do not reach handlers of the root logger, such as the one that importing fbgemm_gpu installs."""
    handler, level, propagate = MessageHandler(translate, on_stderr), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


@contextmanager
def silenced_messages() -> Iterator[Callback]:
    """Print nothing while the block runs; yield a callback that prints nothing either."""
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield Callback()
    finally:
        log.setLevel(level)


class Progress(Callback):
    """Progress of a training: a bar on a terminal, and one line an epoch."""

    def __init__(self) -> None:
        self._bar: tuple[bars.Progress, bars.TaskID] | None = None
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
            return
        now = time.monotonic()
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

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def on_epoch_end(self, history: list[EpochRecord]) -> None:
        self.close()
        entry = history[-1]
        shown = "  ".join(
            f"{name.removeprefix('validation.')} {value:.4f}"
            for name, value in entry.items()
            if name.startswith("validation.")
            and name != "validation.seconds"
            and find_metric(name).prominence <= Prominence.EPOCH
        )
        print(
            f"epoch {entry['epoch']:>3}  loss {entry['train.loss']:.4f}  {shown}  {entry['train.seconds']:.1f} s",
            flush=True,
        )


def print_metrics(metrics: Metrics, k: int) -> None:
    """Print a table of test metrics: a row for the model and each baseline."""
    names = columns(k)
    _print_table(names, metric_rows(metrics, names), 18)
    if "train.seconds" in metrics:
        print(
            f"trained in {metrics['train.seconds']:.1f} s at {metrics['train.rows_per_second']:,.0f} rows/s, "
            f"best epoch {metrics['train.best_epoch']:.0f}, peak memory {metrics['train.peak_memory_mb']:,.0f} MB"
        )


def print_served(found: Mapping[str, Metrics], cut_offs: Sequence[int]) -> None:
    """Print a table of a bundle's test metrics: a row for each way of search."""
    names = metric_names(cut_offs, Prominence.SERVED)
    ways = {"method 1, exact search": "exact", "method 1, index": "index", "method 2, index": "live"}
    _print_table(names, {label: [found[way].get(name) for name in names] for label, way in ways.items()}, 24)


def _print_table(names: Sequence[str], rows: Mapping[str, Sequence[float | None]], width: int) -> None:
    print(f"{'test':<{width}}" + "".join(f"{name:>13}" for name in names))
    for label, values in rows.items():
        print(f"{label:<{width}}" + "".join(f"{cell(value):>13}" for value in values))


def print_answer(answer: Answer, as_json: bool) -> None:
    """Print an answer of a retriever: its items with their scores, or the whole answer as JSON."""
    if as_json:
        print_line(answer.to_json())
        return
    notes = {
        "model": "",
        "cold_start": ", an unknown user by the tower alone",
        "popular": ", no known word in the text: popular items"
        if answer.unknown
        else ", an unknown user: popular items",
        "fallback": ", the index does not answer: popular items",
    }
    print_line(f"bundle {answer.bundle_id}, method {answer.method}{notes[answer.source]}, {answer.milliseconds:.1f} ms")
    for place, item in enumerate(answer.items, 1):
        print_line(f"{place:>3}. {item.title}  (id {item.id}, {item.score:+.3f})")
    if answer.unknown:
        print_line(f"unknown to the model, left out: {', '.join(answer.unknown)}")
    if answer.truncated:
        print("no more items")
