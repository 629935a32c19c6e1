"""Refusal of calls to a server that has failed several times in a row."""

from __future__ import annotations

import random
import time
from collections.abc import Callable


class CircuitBreaker:
    """A circuit breaker (Nygard 2007, "Release It!"): it opens after `failures` failures in a row.

    While it is open all calls are refused for `pause` seconds; then one call may try. Each failed try doubles the
    pause, up to `max_pause` seconds; a success closes the breaker."""

    def __init__(
        self,
        failures: int = 3,
        pause: float = 0.5,
        max_pause: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures, self.pause, self.max_pause = failures, pause, max_pause
        self._clock = clock
        self._failed, self._opened, self._until = 0, 0.0, 0.0

    @property
    def closed(self) -> bool:
        """True while every call is allowed."""
        return self._failed < self.failures

    def begin(self) -> float | None:
        """Return the start time of a call, for `failed`; None if the call is refused."""
        now = self._clock()
        if self.closed:
            return now
        if now < self._until:
            return None
        self._until = now + self.pause  # other calls wait for this one
        return now

    def succeeded(self) -> bool:
        """Record a success, which closes the breaker. Return True if it was open."""
        was_open, self._failed = not self.closed, 0
        return was_open

    def failed(self, began: float) -> bool:
        """Record the failure of a call that began at `began`. Return True if it opens the breaker.

        Calls that were under way when the breaker opened do not count."""
        was_closed = self.closed
        if not was_closed and began <= self._opened:
            return False
        self._failed += 1
        if not self.closed:
            self._opened = self._clock()
            pause = min(self.max_pause, self.pause * 2.0 ** (self._failed - self.failures))
            self._until = self._opened + pause * random.uniform(0.75, 1.25)
        return was_closed and not self.closed
