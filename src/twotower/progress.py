"""Progress of a job: lines with its rate and the time left, and a summary of what it read, dropped and wrote."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

SECONDS_BETWEEN_LINES = 5.0
"""Least seconds between two lines of progress."""


class JobProgress:
    """Counts units of work and logs a line every few seconds: units done, units a second, time left."""

    def __init__(
        self,
        log: logging.Logger,
        what: str,
        total: int | None = None,
        *,
        seconds: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`what` follows the number, as in "users embedded". Without a `total` no time left is shown."""
        self.done = 0
        self._log, self._what, self._total, self._seconds, self._clock = log, what, total, seconds, clock
        self._started = self._logged = clock()
        self._skipped = 0

    def skip(self, n: int) -> None:
        """Count units that an earlier call has done; they do not enter the rate."""
        self.done += n
        self._skipped += n

    def advance(self, n: int) -> None:
        """Count finished units, and log a line if the last one is old."""
        self.done += n
        now = self._clock()
        if now - self._logged >= self._seconds:
            self._logged = now
            self._log.info(self.line(now))

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
