"""Turns: requests are answered one after the other, and those that would wait too long are refused at once.

One process answers on one core, so answering two requests at the same time makes both late. While the queue is empty
now and then, a request may wait `burst` seconds; once it has not been empty for so long, only `target` ("controlled
delay", Maurer 2015, "Fail at Scale", ACM Queue 13(8), after Nichols and Jacobson's CoDel). So a burst is answered, and an
overload does not make everyone wait. Within a second of a refusal it is `target` too: an overload that leaves the queue
empty for a moment is no burst.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from twotower.serve.problem import Problem

CALM = 1.0
"""Seconds without a refusal after which a burst may come again."""


class Gate:
    """`async with gate:` is a turn. `width` turns may be taken at once: 1 where a turn does not wait for others."""

    def __init__(
        self, burst: float = 0.05, target: float = 0.005, width: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`burst` and `target` in seconds."""
        self.burst, self.target, self.width = burst, target, width
        self._clock = clock
        self._queue: deque[asyncio.Future[None]] = deque()
        self._taken = 0
        self._pace = 0.001
        """Seconds between the ends of two turns, lately, while somebody waits: what else the process does counts too."""
        self._ended = self._empty = clock()
        self._refused = self._ended - CALM

    @property
    def wait(self) -> float:
        """Seconds that somebody who comes now must expect to wait."""
        return max(0, len(self._queue) + self._taken - self.width + 1) * self._pace

    def full(self) -> bool:
        """Whether somebody who comes now would wait too long. To be asked of everybody who comes: it also sees when
        the queue was empty."""
        now = self._clock()
        if self._taken < self.width:
            self._empty = now
            return False
        calm = now - self._empty <= self.burst and now - self._refused >= CALM
        if self.wait <= (self.burst if calm else self.target):
            return False
        self._refused = now
        return True

    async def __aenter__(self) -> None:
        if self._taken < self.width and not self._queue:
            self._taken += 1
            self._ended = self._clock()  # nobody has waited for this turn
            try:
                await asyncio.sleep(0)  # let those who came at the same time be queued, or refused
            except BaseException:
                self._leave()
                raise
        else:
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                await turn
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._leave()  # it was given the turn and does not take it
                raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = self._clock()
        self._pace += 0.02 * (now - self._ended - self._pace)
        self._ended = now
        self._leave()

    def _leave(self) -> None:
        self._taken -= 1
        while self._queue and self._taken < self.width:
            turn = self._queue.popleft()
            if not turn.done():
                self._taken += 1
                turn.set_result(None)


def overload(detail: str = "") -> Problem:
    """What somebody who would wait too long is told."""
    return Problem("overload", detail, headers={"Retry-After": "1"})
