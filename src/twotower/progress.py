"""Progress of a job: lines with its rate and the time left, and a summary of what it read, dropped and wrote."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TextIO

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 5.0
"""Least seconds between two lines of progress."""
SECONDS_BETWEEN_UPDATES = 0.2
"""Least seconds between two updates of a status line."""


def is_notebook() -> bool:
    """Return True in the kernel of a notebook, whose output overwrites lines as a terminal does."""
    shell = sys.modules.get("IPython")
    return shell is not None and hasattr(shell.get_ipython(), "kernel")


class StatusLine:
    """Line of progress that the next one overwrites."""

    present: ClassVar[StatusLine | None] = None
    """The line of this process; None without a terminal or notebook."""

    def __init__(self, stream: TextIO) -> None:
        self.context = ""
        """Beginning of each line."""
        self._stream, self._width = stream, 0

    @classmethod
    @contextmanager
    def on(cls, stream: TextIO | None) -> Iterator[None]:
        """Show the present line, or a new one if `stream` is a terminal or a notebook, while the block runs."""
        before, context = cls.present, cls.present.context if cls.present else ""
        cls.present = before or (cls(stream) if stream and (stream.isatty() or is_notebook()) else None)
        try:
            yield
        finally:
            cls.clear()
            cls.present = before
            if before:
                before.context = context

    def show(self, text: str = "") -> None:
        """Overwrite the line by the context and a text."""
        line = ": ".join(filter(None, (self.context, text)))[: shutil.get_terminal_size().columns - 1]
        self._stream.write(f"\r{line:<{self._width}}\r{line}")
        self._stream.flush()
        self._width = len(line)

    @classmethod
    def clear(cls) -> None:
        """Remove the line before other output."""
        if (line := cls.present) is not None and line._width:
            line._stream.write(f"\r{'':<{line._width}}\r")
            line._stream.flush()
            line._width = 0


@contextmanager
def doing(what: str, seconds: float = 2.0) -> Iterator[None]:
    """Show `what` if the block takes longer than `seconds`: in the status line, or else in the log."""
    line = StatusLine.present
    timer = threading.Timer(seconds, line.show if line else log.info, [f"{what} …"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        StatusLine.clear()


class JobProgress:
    """Counts work and shows units done, units a second and the time left: in the status line, or else in the log."""

    def __init__(
        self,
        log: logging.Logger,
        what: str,
        total: int | None = None,
        *,
        seconds: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`what` follows the number, as in "users embedded". Without a `total` the time left is not shown."""
        self.done = 0
        self._log, self._what, self._total, self._seconds, self._clock = log, what, total, seconds, clock
        self._started = self._logged = clock()
        self._skipped = 0

    def skip(self, n: int) -> None:
        """Count units of an earlier call, which are not part of the rate."""
        self.done += n
        self._skipped += n

    def advance(self, n: int, more: str = "") -> None:
        """Count finished units, and show a line, which ends with `more`, if the last one is old."""
        self.done += n
        now, status = self._clock(), StatusLine.present
        if now - self._logged >= (min(self._seconds, SECONDS_BETWEEN_UPDATES) if status else self._seconds):
            self._logged = now
            (status.show if status else self._log.info)(self.line(now) + more)
        if status and self.done == self._total:
            status.show()

    def line(self, now: float | None = None) -> str:
        """Return the line of progress: "2,000 of 8,000 users embedded, 400 a second, 0:15 left"."""
        spent = max((self._clock() if now is None else now) - self._started, 1e-9)
        rate = (self.done - self._skipped) / spent
        of = f" of {self._total:,}" if self._total is not None else ""
        left = ""
        if self._total is not None and rate > 0 and self.done < self._total:
            left = f", {duration((self._total - self.done) / rate)} left"
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"{self.done:,}{of} {self._what}, {shown} a second{left}"


def duration(seconds: float) -> str:
    """Return a duration as minutes and seconds, "0:07", or with hours, "2:03:07"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass
class Summary:
    """Numbers of units that a job read, dropped for a reason, and wrote."""

    noun: str
    """Plural of the unit: "interactions"."""
    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped units by reason; a reason follows a number: "repeated a pair of user and item"."""

    def drop(self, reason: str, n: int) -> None:
        """Count dropped units; 0 is not mentioned."""
        if n:
            self.dropped[reason] = self.dropped.get(reason, 0) + n

    @property
    def kept(self) -> int:
        return self.read - sum(self.dropped.values())

    def __str__(self) -> str:
        """Return one line: "interactions: 1,000 read, 998 kept; dropped: 2 repeated a pair of user and item"."""
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items())
        return f"{self.noun}: {self.read:,} read, {self.kept:,} kept" + (f"; dropped: {reasons}" if reasons else "")
