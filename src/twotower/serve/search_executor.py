"""Searches of a remote index: in threads, with a timeout and a circuit breaker.

The event loop never waits for the network: a search runs in a thread, and its request continues with the result or at
the timeout. After three failures in a row searches are refused for a while; then a single request tries.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from twotower.errors import RunError, Unavailable
from twotower.index.protocol import deadline
from twotower.serve.circuit_breaker import CircuitBreaker

SEARCH_THREADS = 16
"""Searches that run at once."""
MAX_SEARCHES = 2 * SEARCH_THREADS
"""Running and waiting searches, at most."""
T = TypeVar("T")

log = logging.getLogger("twotower.search_executor")


class RemoteSearchExecutor:
    """The remote searches of one process."""

    def __init__(self, timeout: float, on_failure: Callable[[], None] = lambda: None) -> None:
        """Create the threads. `timeout` in seconds covers one search; `on_failure` is called after each failure."""
        self.timeout = timeout
        self.breaker = CircuitBreaker()
        self._on_failure = on_failure
        self._pool = ThreadPoolExecutor(SEARCH_THREADS, "search")
        self._is_done: list[Callable[[], bool]] = []

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread and return its result.

        Raises Unavailable after the timeout, for too many searches, while the circuit breaker is open, and in place of
        Unavailable and RunError of `work`; other errors of `work` as they are."""
        if (began := self.breaker.begin()) is None:
            raise Unavailable("the index does not answer; searches are refused for a while")
        self._is_done = [is_done for is_done in self._is_done if not is_done()]
        if len(self._is_done) >= MAX_SEARCHES:
            raise Unavailable(f"{MAX_SEARCHES} searches are running or waiting, the limit")
        until = time.monotonic() + self.timeout

        def within() -> T:
            with deadline(until):
                return work()

        job = self._pool.submit(within)
        self._is_done.append(job.done)
        try:
            # A late thread ends by itself: each exchange with the index has a timeout of its own.
            async with asyncio.timeout(1.1 * self.timeout):
                found = await asyncio.wrap_future(job)
        except (Unavailable, RunError, TimeoutError) as e:  # a missing collection is a RunError
            self._on_failure()
            if self.breaker.failed(began):
                log.warning("the index fails and is not searched for a while: %s", e or type(e).__name__)
            raise Unavailable(str(e) or f"the index did not answer in {self.timeout * 1e3:g} ms") from e
        if self.breaker.succeeded():
            log.warning("the index is back")
        return found

    def close(self) -> None:
        """Drop waiting searches; do not wait for running ones."""
        self._pool.shutdown(wait=False, cancel_futures=True)
