"""Signals that stop a training."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import ClassVar

log = logging.getLogger(__name__)
SECONDS_OF_OPERATION = 4.0
"""Seconds that an operation, such as one of a large matrix, may take after a signal that stops a training at once."""
SECONDS_OF_REPEATS = 0.5
"""Seconds in which a repeated signal counts once: launchers such as `timeout` signal a process and its group."""


class StopNow(KeyboardInterrupt):
    """A signal has interrupted a block of `at_once`."""


class StopSignals:
    """Handlers of SIGTERM and SIGINT, which stop a training after the current step, or at once in a block of
    `at_once`."""

    _present: ClassVar[StopSignals | None] = None
    """The instance whose block `handled` runs."""

    def __init__(self, ends_process: bool = False, ranks: int = 1) -> None:
        """Choose the effect of a second signal.

        With `ends_process` it ends the process, and so does the first signal if an operation in a block of `at_once`
        takes longer than SECONDS_OF_OPERATION. Otherwise it calls the previous handler. With several `ranks` it has no
        effect, as launchers repeat signals.
        """
        self.received = 0
        """Number of the signal that has arrived; 0: none."""
        self._ends_process, self._ranks = ends_process and ranks == 1, ranks
        self._at_once = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Record the signals in the block, and log the first one. Without effect outside the main thread."""
        since = 0.0

        def request_stop(number: int, frame: FrameType | None) -> None:
            nonlocal since
            if not self.received:
                self.received, since = number, time.monotonic()  # ranks must agree on the step to stop after
            elif self._ranks == 1 and not self._ends_process and _is_second(number, self.received, since):
                signal.signal(number, old[number])
                signal.raise_signal(number)
            if self._at_once:
                self._at_once = False
                raise StopNow

        try:
            old = {int(s): signal.signal(s, request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            yield
            return
        arrivals, arrived = socket.socketpair()
        arrived.setblocking(False)
        before, StopSignals._present = StopSignals._present, self
        descriptor = signal.set_wakeup_fd(arrived.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(arrivals,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for s, handler in old.items():
                signal.signal(s, handler)
            StopSignals._present = before
            with arrived:
                arrived.shutdown(socket.SHUT_WR)  # also for a forked process that has it
            watcher.join()

    def _watch(self, arrivals: socket.socket) -> None:
        """React to signals while the main thread is in an operation; Python handles signals only at its end."""
        first, since = 0, 0.0
        with arrivals, suppress(IndexError):  # the block ends, and has closed the other end
            while True:
                try:
                    number = arrivals.recv(1)[0]
                except TimeoutError:
                    arrivals.settimeout(None)
                    if self._at_once and not self.received:
                        log.info("stopped; `resume=True` goes on")
                        self._end(first)
                    continue
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if not first:
                    first, since = number, time.monotonic()
                    log.info("stopping after this step …" + ("; a second signal ends now" if self._ranks == 1 else ""))
                    arrivals.settimeout(SECONDS_OF_OPERATION)
                elif _is_second(number, first, since):
                    self._end(number)

    def _end(self, number: int) -> None:
        if self._ends_process:
            os._exit(128 + number)


def _is_second(number: int, first: int, since: float) -> bool:
    """Return False for a signal that repeats the first one, which arrived at `since`."""
    return number != first or time.monotonic() - since > SECONDS_OF_REPEATS


@contextmanager
def at_once() -> Iterator[None]:
    """Raise StopNow in the block at a signal that `StopSignals` handle, also at one that has already arrived."""
    signals = StopSignals._present
    if signals is None:
        yield
        return
    before, signals._at_once = signals._at_once, True
    try:
        if signals.received:
            raise StopNow
        yield
    finally:
        signals._at_once = before
