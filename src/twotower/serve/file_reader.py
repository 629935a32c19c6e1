"""Reads of a file system that may hang: in a thread, one call at a time, with a timeout.

A read of a hanging file system cannot be cancelled. It keeps its thread, and further calls are refused at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from twotower.errors import BundleError

T = TypeVar("T")


class FileReader:
    """One thread, and a queue of callers."""

    def __init__(self, name: str, on_start: Callable[[], None] = lambda: None) -> None:
        """Name the thread. `on_start` runs in it first."""
        self._pool = ThreadPoolExecutor(1, name, initializer=on_start)
        self._one_at_a_time = asyncio.Lock()
        self._job: Future[Any] | None = None

    @property
    def busy(self) -> bool:
        """True while the thread runs a call, or hangs in one."""
        return self._job is not None and not self._job.done()

    async def run(self, work: Callable[[], T], seconds: float) -> T:
        """Run `work` in the thread and return its result. Raises the errors of `work`.

        Raises BundleError "store" after `seconds`, or if an earlier call still hangs."""
        async with self._one_at_a_time:
            if self.busy:
                raise BundleError("the store does not answer", "store")
            self._job = job = self._pool.submit(work)
            waiting = asyncio.wrap_future(job)
            waiting.add_done_callback(lambda late: late.cancelled() or late.exception())  # the caller may have given up
            await asyncio.wait({waiting}, timeout=seconds)
            if not waiting.done():
                raise BundleError("the store does not answer", "store")
            self._job = None
            try:
                return waiting.result()
            finally:
                del job, waiting  # the traceback of an error would keep the bundle in memory

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` in the thread after the calls before it, without waiting."""
        self._pool.submit(work)

    def close(self) -> None:
        """Drop waiting calls; do not wait for the running one."""
        self._pool.shutdown(wait=False, cancel_futures=True)
