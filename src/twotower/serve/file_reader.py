"""Work on a store that may hang: in a thread beside the event loop, one piece at a time, and nobody waits for ever.

A read of a file system that hangs cannot be ended. It keeps its one thread; whoever comes meanwhile is refused at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from twotower.bundle import BundleError

T = TypeVar("T")


class FileReader:
    """One thread, and those who wait for it."""

    def __init__(self, name: str, on_start: Callable[[], None] = lambda: None) -> None:
        """`on_start` runs in the thread when it starts."""
        self._pool = ThreadPoolExecutor(1, name, initializer=on_start)
        self._one_at_a_time = asyncio.Lock()
        self._job: Future[Any] | None = None

    @property
    def busy(self) -> bool:
        """True while the thread works, or hangs."""
        return self._job is not None and not self._job.done()

    async def run(self, work: Callable[[], T], seconds: float) -> T:
        """Return the result of `work`. Raises whatever it does; BundleError "store" if it takes longer, or if what was begun
        before has not ended yet."""
        async with self._one_at_a_time:
            if self.busy:
                raise BundleError("the store does not answer", "store")
            self._job = job = self._pool.submit(work)
            waiting = asyncio.wrap_future(job)
            waiting.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody may ask any more
            await asyncio.wait({waiting}, timeout=seconds)
            if not waiting.done():
                raise BundleError("the store does not answer", "store")
            self._job = None
            try:
                return waiting.result()
            finally:
                del job, waiting  # an error would hold its frames, and these the bundle

    def submit(self, work: Callable[[], None]) -> None:
        """Do it when the thread has time; nobody waits."""
        self._pool.submit(work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
