"""Searches that leave the process: in a few threads, within a time, and not at all while nobody answers.

The event loop never waits for a network: a search of an index that is elsewhere runs in a thread, and who asked goes on
when it is done or its time is over. After three failures in a row nobody asks for a while; then one request tries.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from twotower.errors import RunError, Unavailable
from twotower.index.deadline import deadline
from twotower.serve.user_events import CircuitBreaker

SEARCH_THREADS = 16
"""Searches under way at once."""
MAX_SEARCHES = 2 * SEARCH_THREADS
"""Searches under way and waiting for a thread, at most."""
T = TypeVar("T")

log = logging.getLogger("twotower.search_executor")


class RemoteSearchExecutor:
    """The searches of one process."""

    def __init__(self, timeout: float, on_failure: Callable[[], None] = lambda: None) -> None:
        """`timeout` in seconds for all exchanges of a search; `on_failure` is called each time one fails."""
        self.timeout = timeout
        self.breaker = CircuitBreaker()
        self._on_failure = on_failure
        self._pool = ThreadPoolExecutor(SEARCH_THREADS, "search")
        self._under_way = 0

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, done in a thread. Raises Unavailable, and whatever `work` does."""
        if (began := self.breaker.begin()) is None:
            raise Unavailable("the index does not answer; it is asked again in a moment")
        if self._under_way >= MAX_SEARCHES:
            raise Unavailable(f"{MAX_SEARCHES} searches are under way")
        until = time.monotonic() + self.timeout

        def within() -> T:
            with deadline(until):
                return work()

        job = self._pool.submit(within)
        loop, self._under_way = asyncio.get_running_loop(), self._under_way + 1
        job.add_done_callback(lambda _: self._notify(loop))
        try:
            # A thread that is late ends by itself: every exchange has a time of its own.
            async with asyncio.timeout(1.1 * self.timeout):
                found = await asyncio.wrap_future(job)
        except (Unavailable, RunError, TimeoutError) as e:  # a collection that is gone is a RunError
            self._on_failure()
            was_closed = self.breaker.closed
            self.breaker.failed(began)
            if was_closed and not self.breaker.closed:
                log.warning("the index fails, going on without it: %s", e or type(e).__name__)
            raise Unavailable(str(e) or f"the index did not answer in {self.timeout * 1e3:g} ms") from e
        if not self.breaker.closed:
            log.warning("the index is back")
        self.breaker.succeeded()
        return found

    def _notify(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop may have ended before the thread
            loop.call_soon_threadsafe(self._done)

    def _done(self) -> None:
        self._under_way -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
