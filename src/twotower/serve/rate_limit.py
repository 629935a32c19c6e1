"""A bucket of tokens for each client: `rate` come in every second, a request takes one, `burst` are the most."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from twotower.serve.problems import Problem


class RateLimiter:
    """The buckets of the latest `clients` clients; who is forgotten begins with a full one."""

    def __init__(
        self, rate: float, burst: int = 0, clients: int = 100_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate = rate
        self.burst = burst or max(1, math.ceil(2 * rate))
        self.clients = clients
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Raises Problem "rate", with the seconds to wait, if the client's bucket is empty."""
        now = self._clock()
        tokens, then = self._buckets.pop(client, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + (now - then) * self.rate)
        if taken := tokens >= 1.0:
            tokens -= 1.0
        self._buckets[client] = (tokens, now)
        while len(self._buckets) > self.clients:
            self._buckets.popitem(last=False)
        if not taken:
            wait = max(1, math.ceil((1.0 - tokens) / self.rate))
            raise Problem(
                "rate",
                f"more than {self.rate:g} requests a second (at most {self.burst} at once); wait {wait} s",
                headers={"Retry-After": str(wait)},
            )
