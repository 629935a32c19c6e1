"""Limits of a client: requests a second by token buckets, and slots for work without a permit of admission.

Each client's bucket gains `rate` tokens a second up to `burst`, and a request takes one.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from twotower.serve.problems import Problem, overload_problem


class RateLimiter:
    """Token buckets of the `clients` most recent clients; a client seen for the first time has a full one.

    `rate` is in requests a second, more than 0. `burst` is the size of a bucket; 0: twice the rate, at least 1."""

    def __init__(
        self, rate: float, burst: int = 0, clients: int = 100_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate = rate
        self.burst = burst or max(1, math.ceil(2 * rate))
        self.clients = clients
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Take a token of the client. Raises Problem "rate-limit", with seconds in Retry-After, if none is left."""
        now = self._clock()
        tokens, updated = self._buckets.pop(client, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + (now - updated) * self.rate)
        if allowed := tokens >= 1.0:
            tokens -= 1.0
        self._buckets[client] = (tokens, now)
        while len(self._buckets) > self.clients:
            self._buckets.popitem(last=False)
        if not allowed:
            wait = max(1, math.ceil((1.0 - tokens) / self.rate))
            raise Problem(
                "rate-limit",
                f"more than {self.rate:g} requests a second (at most {self.burst} at once); wait {wait} s",
                headers={"Retry-After": str(wait)},
            )


class ClientSlots:
    """Bounds on work without a permit: `total` at once, `per_client` of one client. `what` names it in messages."""

    def __init__(self, total: int, per_client: int, what: str) -> None:
        self.total, self.per_client, self.what = total, per_client, what
        self._taken: dict[str, int] = {}

    @contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """Hold a slot during the block. Raises Problem "overload" if none is free."""
        held = self._taken.get(client, 0)
        if held >= self.per_client or sum(self._taken.values()) >= self.total:
            raise overload_problem(
                f"{self.per_client if held >= self.per_client else self.total} {self.what} are in progress"
            )
        self._taken[client] = held + 1
        try:
            yield
        finally:
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]
