"""Connections of one worker: their number, their number per address, and the time each client has for its next step.

A connection is in one of four timeout queues while the worker waits for its client (`idle`: for the next request,
`head` and `body`: for the rest of one, `reply`: for the client to read), and in none while its request is answered. All
connections of a queue have the same timeout, so the first one has waited longest: it is the next to time out, and the
next to be closed for a new connection.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import itertools
import logging
from collections import Counter
from typing import Protocol

from twotower.serve.connection_limits import MAX_REFUSED_OPEN
from twotower.serve.metrics import ServeMetrics
from twotower.serve.problems import Problem
from twotower.serve.settings import ServeSettings, client_address

EVICTION_GRACE = 1.0
"""Seconds that a connection in `head`, `body` or `reply` is safe from being closed for a new connection."""
CLOSE_DELAY = 0.5
"""Seconds for a connection opened just before shutdown to send its request, and for a refused one to read the reply."""
BODY_REPLY_SLACK = 1.0
"""Seconds after `body_timeout` in which the middleware answers 408 before the connection is closed."""
LOG_INTERVAL = 1.0
"""Seconds between two log lines about refused connections."""

REFUSAL = Problem("too-many-connections", headers={"Retry-After": "1"}).last_reply()
log = logging.getLogger("twotower.connections")


class Connection(Protocol):
    """A connection to one client."""

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    address: str
    """Address of the client, as `settings.client_address` counts it."""
    counted: bool
    """True while the connection counts as open."""
    queue: TimeoutQueue | None


class TimeoutQueue(dict["Connection", float]):
    """Connections that wait for the same step of their clients, each with the time since when, longest first.

    `reason` labels the metric of ended connections, `timeout` and `grace` are in seconds."""

    def __init__(self, reason: str, timeout: float, grace: float = EVICTION_GRACE) -> None:
        super().__init__()
        self.reason, self.timeout, self.grace = reason, timeout, grace

    def timed_out(self, now: float) -> list[Connection]:
        """Return the connections whose time is over."""
        return [c for c, _ in itertools.takewhile(lambda item: now - item[1] >= self.timeout, self.items())]


class Connections:
    """All connections of one worker, on both ports."""

    def __init__(self, settings: ServeSettings, metrics: ServeMetrics) -> None:
        s = settings
        self.max_connections, self.max_per_address = s.max_connections, s.max_per_address
        self.idle = TimeoutQueue("idle", s.keep_alive, 0.0)
        self.head = TimeoutQueue("head", s.head_timeout)
        self.body = TimeoutQueue("body", s.body_timeout + BODY_REPLY_SLACK)
        self.reply = TimeoutQueue("reply", s.body_timeout)
        self.refused = TimeoutQueue("refused", CLOSE_DELAY)
        self._queues = (self.idle, self.head, self.body, self.reply)
        self._open, self._open_by_address = 0, Counter[str]()
        self._open_gauge, self._ended_counter = metrics.connections, metrics.connections_ended
        self._ended_since_log: Counter[str] = Counter()
        timeouts = [queue.timeout for queue in (*self._queues, self.refused)]
        self.check_interval = max(0.05, min(1.0, *timeouts) / 5)
        """Seconds between two checks for timed out connections."""
        proxies = [ipaddress.ip_network(a.strip(), strict=False) for a in filter(None, s.trusted_proxies.split(","))]
        self.address = functools.lru_cache(4_096)(lambda host: client_address(host, proxies))

    def admit(self, connection: Connection) -> bool:
        """Count a new connection, closing an older one if the limit is reached; return False if none can be closed."""
        address = connection.address
        if (
            address
            and self._open_by_address[address] >= self.max_per_address
            and not self._make_room(connection, address)
        ):
            return False
        if self._open >= self.max_connections and not self._make_room(connection):
            return False
        connection.counted = True
        self._open += 1
        self._open_by_address[address] += 1
        return True

    def move(self, connection: Connection, queue: TimeoutQueue | None, restart: bool = False) -> None:
        """Put a connection into a queue, or into none. Its time starts again in another queue or with `restart`."""
        if queue is connection.queue and not restart:
            return
        if connection.queue is not None:
            del connection.queue[connection]
        connection.queue = queue
        if queue is not None:
            queue[connection] = connection.loop.time()

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed, or is about to be."""
        self.move(connection, None)
        if connection.counted:
            connection.counted = False
            self._open -= 1
            self._open_by_address[connection.address] -= 1
            if not self._open_by_address[connection.address]:
                del self._open_by_address[connection.address]

    def refuse(self, connection: Connection) -> None:
        """Send a 503 reply, and close the connection once the client has had time to read it."""
        self.count_ended("refused")
        connection.transport.write(REFUSAL)
        if len(self.refused) >= MAX_REFUSED_OPEN:
            self.close(next(iter(self.refused)))
        self.move(connection, self.refused)

    def close(self, connection: Connection) -> None:
        """Close a connection at once, dropping what its client has not read."""
        self.remove(connection)
        if connection.transport.get_write_buffer_size():
            connection.transport.abort()
        else:
            connection.transport.close()

    def count_ended(self, reason: str) -> None:
        self._ended_counter.labels(reason).inc()
        self._ended_since_log[reason] += 1

    async def watch(self) -> None:
        """Close connections that time out, and log at intervals how many were refused, until cancelled."""
        loop = asyncio.get_running_loop()
        logged = loop.time() - LOG_INTERVAL
        try:
            while True:
                await asyncio.sleep(self.check_interval)
                now = loop.time()
                for queue in (*self._queues, self.refused):
                    for connection in queue.timed_out(now):
                        if queue is not self.refused:
                            self.count_ended(queue.reason)
                        self.close(connection)
                self._open_gauge.set(self._open)
                if now - logged >= LOG_INTERVAL and self._log_refusals():
                    logged = now
        finally:
            self._log_refusals()

    def _log_refusals(self) -> bool:
        counts = {"refused": self._ended_since_log["refused"], "closed_for_others": self._ended_since_log["room"]}
        self._ended_since_log.clear()
        if any(counts.values()):
            log.warning("too many connections", extra={"fields": counts})
        return any(counts.values())

    def _make_room(self, newcomer: Connection, address: str = "") -> bool:
        """Close the connection that has waited longest, of one address or of all, idle ones first.

        Return False if none may be closed."""
        now = newcomer.loop.time()
        for queue in self._queues:
            for connection, since in queue.items():
                if now - since < queue.grace:
                    break
                if not address or connection.address == address:
                    self.count_ended("room")
                    self.close(connection)
                    return True
        return False
