"""Event stores: what users did since the bundle was published, in this process or in Redis.

Keys carry the bundle's id: `BUNDLE:events:USER`, `BUNDLE:vector:USER`. Events are written under the current bundle and read
under it and those that were current lately, in the order of their times, so swaps and rollbacks lose no events. A user
vector is kept with a digest of the events it was computed from: for another bundle or other events it is a miss.

If Redis is unavailable, no request fails: reads return the events that this process has, and writes are kept here until
Redis answers again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from twotower.errors import ConfigError
from twotower.serve.histories import Histories, TimedEvent

Event = tuple[str, bool]
"""An item id, and True if the user liked the item."""
UserVector = npt.NDArray[np.float32]
T = TypeVar("T")

log = logging.getLogger("twotower.user_events")


@dataclass(frozen=True)
class UserState:
    """A user's recent events, and the user vector computed with them."""

    events: list[Event]
    """Oldest first."""
    vector: UserVector | None = None
    """(1, D); None if it was not saved, or for other events."""


EMPTY_STATE = UserState([])


class EventStore(Protocol):
    """A store of recent events and user vectors."""

    shared: bool
    """True if other processes read the same events."""

    async def add(
        self, bundles: Sequence[str], user: str, events: Sequence[Event], unknown: Container[str] = ()
    ) -> tuple[int, bool]:
        """Append events under the last of the bundles, to which the `unknown` items are unknown.

        Returns the number of events under all of the bundles, and True if the new ones are where `shared` says."""

    async def fetch(self, bundles: Sequence[str], user: str) -> UserState:
        """Return the user's events under the bundles, oldest first, and the vector under the last bundle."""

    async def save_vector(self, bundle: str, user: str, events: Sequence[Event], vector: UserVector) -> None:
        """Save the vector (1, D) that was computed with these events."""

    async def forget(self, bundles: Sequence[str], user: str) -> bool:
        """Delete the user's events. Return True if they are certainly deleted."""

    async def close(self) -> None:
        """Close connections."""


class InProcessEvents:
    """An event store in this process, bounded in bytes."""

    shared = False

    def __init__(
        self,
        events: int = 200,
        seconds: float = 86_400,
        limit: int = 256 << 20,
        on_drop: Callable[[str, int], None] = lambda what, n: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the latest `events` of a user and bundle, `seconds` after the last of them, `limit` bytes in total.

        `on_drop` receives "user" or "event" and a count whenever some are dropped for lack of memory."""
        self.events = events
        self._histories = Histories(events, seconds, limit, on_drop, clock)

    @property
    def size(self) -> int:
        """Bytes in use, of `limit`."""
        return self._histories.size

    async def add(
        self, bundles: Sequence[str], user: str, events: Sequence[Event], unknown: Container[str] = ()
    ) -> tuple[int, bool]:
        self.put(bundles[-1], user, with_times(events, unknown))
        return len(self.get(bundles, user)), True

    def put(self, bundle: str, user: str, events: Sequence[TimedEvent]) -> None:
        """Append events under a bundle."""
        self._histories.put(user, bundle, events)

    def get(self, bundles: Sequence[str], user: str) -> list[TimedEvent]:
        """Return the user's latest events under the bundles."""
        return latest(self._histories.get(user, bundles), self.events)

    def take(self, bundles: Sequence[str], user: str) -> list[TimedEvent]:
        """Return and delete the user's events under the bundles."""
        events = self.get(bundles, user)
        self._histories.drop(user, bundles)
        return events

    async def fetch(self, bundles: Sequence[str], user: str) -> UserState:
        events = [(e.item, e.liked) for e in self.get(bundles, user)]
        if not events:
            return EMPTY_STATE
        kept = self._histories.vector(user)
        fits = kept is not None and kept[:2] == (bundles[-1], history_digest(events))
        return UserState(events, np.frombuffer(kept[2], "<f4")[None] if kept is not None and fits else None)

    async def save_vector(self, bundle: str, user: str, events: Sequence[Event], vector: UserVector) -> None:
        self._histories.save_vector(user, (bundle, history_digest(events), vector.astype("<f4").tobytes()))

    async def forget(self, bundles: Sequence[str], user: str) -> bool:
        self._histories.drop(user)
        return True

    async def close(self) -> None:
        return


class CircuitBreaker:
    """A circuit breaker (Nygard 2007, "Release It!"): it opens after `failures` failures in a row.

    While it is open all calls are refused for `pause` seconds; then one call may try. Each failed try doubles the pause, up
    to `max_pause` seconds; a success closes the breaker."""

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

    def succeeded(self) -> None:
        """Record a success: close the breaker."""
        self._failed = 0

    def failed(self, began: float) -> None:
        """Record the failure of a call that began at `began`. Calls that were under way when the breaker opened do not
        count."""
        if not self.closed and began <= self._opened:
            return
        self._failed += 1
        if not self.closed:
            self._opened = self._clock()
            pause = min(self.max_pause, self.pause * 2.0 ** (self._failed - self.failures))
            self._until = self._opened + pause * random.uniform(0.75, 1.25)


class RedisEvents:
    """An event store in Redis or Valkey, shared by workers and hosts."""

    shared = True

    def __init__(
        self,
        url: str,
        events: int = 200,
        seconds: int = 86_400,
        timeout: float = 0.02,
        on_failure: Callable[[str], None] = lambda what: None,
        fallback: InProcessEvents | None = None,
    ) -> None:
        """Keep the latest `events` of a user and bundle, `seconds` after the last of them.

        `timeout`: seconds for one exchange. `on_failure` receives "read" or "write" after each failure. `fallback` keeps
        what cannot be written.

        Raises ConfigError if the client is not installed or the URL is invalid.
        """
        try:
            import redis.asyncio as client
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ImportError:
            raise ConfigError("an event store in Redis needs its client: pip install -e '.[serve]'") from None
        try:
            self._client: Any = client.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0),
                max_connections=256,
            )  # fmt: skip
        except ValueError as e:
            raise ConfigError(f"the address of the event store cannot be used: {e}") from None
        self.events, self.seconds, self.timeout = events, seconds, timeout
        self.breaker = CircuitBreaker()
        self._on_failure = on_failure
        self._errors: tuple[type[BaseException], ...] = (RedisError, OSError, TimeoutError)
        self._fallback = fallback or InProcessEvents(events, seconds)

    async def add(
        self, bundles: Sequence[str], user: str, events: Sequence[Event], unknown: Container[str] = ()
    ) -> tuple[int, bool]:
        key, new = _events_key(bundles[-1], user), with_times(events[-self.events :], unknown)
        waiting = self._fallback.take(bundles, user)

        async def push() -> int:
            pipe = self._client.pipeline(transaction=True)
            pipe.rpush(key, *(orjson.dumps(e[:3]) for e in (*waiting, *new)))
            pipe.ltrim(key, -self.events, -1)
            pipe.expire(key, self.seconds)
            for bundle in bundles:
                pipe.llen(_events_key(bundle, user))
            return sum(map(int, (await pipe.execute())[3:]))

        # One attempt: a write without a reply may have been done.
        count = await self._call("write", push, attempts=1)
        if count is not None:
            return min(count, self.events), True
        self._fallback.put(bundles[-1], user, [*waiting, *new])
        return len(self._fallback.get(bundles, user)), False

    async def fetch(self, bundles: Sequence[str], user: str) -> UserState:
        async def read() -> list[Any]:
            pipe = self._client.pipeline(transaction=False)
            for bundle in bundles:
                pipe.lrange(_events_key(bundle, user), -self.events, -1)
            pipe.get(_vector_key(bundles[-1], user))
            return list(await pipe.execute())

        found = await self._call("read", read, attempts=2)
        if found is None:
            return await self._fallback.fetch(bundles, user)
        *histories, kept = found
        stored = [event for history in histories for raw in history if (event := _parse_event(raw))]
        events = [(e.item, e.liked) for e in latest([*stored, *self._fallback.get(bundles, user)], self.events)]
        if not events:
            return EMPTY_STATE
        fits = (
            isinstance(kept, bytes)
            and kept[:_DIGEST_BYTES] == history_digest(events)
            and (len(kept) - _DIGEST_BYTES) % 4 == 0
        )
        return UserState(events, np.frombuffer(kept, "<f4", offset=_DIGEST_BYTES)[None] if fits else None)

    async def save_vector(self, bundle: str, user: str, events: Sequence[Event], vector: UserVector) -> None:
        value = history_digest(events) + vector.astype("<f4").tobytes()
        await self._call(
            "write", lambda: self._client.set(_vector_key(bundle, user), value, ex=self.seconds), attempts=1
        )

    async def forget(self, bundles: Sequence[str], user: str) -> bool:
        await self._fallback.forget(bundles, user)
        keys = [key for bundle in bundles for key in (_events_key(bundle, user), _vector_key(bundle, user))]
        return await self._call("write", lambda: self._client.delete(*keys), attempts=2) is not None

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, what: str, call: Callable[[], Awaitable[T]], attempts: int) -> T | None:
        """Return the result of `call`; None if it fails or the circuit breaker is open."""
        for attempt in range(attempts):
            if (began := self.breaker.begin()) is None:
                return None
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await call()
            except self._errors as e:
                self._on_failure(what)
                was_closed = self.breaker.closed
                self.breaker.failed(began)
                if was_closed and not self.breaker.closed:
                    log.warning("the event store fails and is not used for a while: %s", type(e).__name__)
                if attempt + 1 < attempts:
                    await asyncio.sleep(random.uniform(0, self.timeout / 4))
            else:
                if not self.breaker.closed:
                    log.warning("the event store answers again")
                self.breaker.succeeded()
                return answer
        return None


_DIGEST_BYTES = 8
_MAX_EVENT_BYTES = 4096
"""Bytes of an event in JSON, at most: an id has up to 512 characters of up to six bytes each."""


def history_digest(events: Sequence[Event]) -> bytes:
    """Return the digest of a user's events (8 bytes of BLAKE2b)."""
    return hashlib.blake2b(orjson.dumps(events), digest_size=_DIGEST_BYTES).digest()


def _events_key(bundle: str, user: str) -> str:
    return f"{bundle}:events:{user}"


def _vector_key(bundle: str, user: str) -> str:
    return f"{bundle}:vector:{user}"


def _parse_event(raw: bytes) -> TimedEvent | None:
    """Return the event in `raw`; None if it is not an event in JSON (another program may write to the key)."""
    if len(raw) > _MAX_EVENT_BYTES:
        return None
    try:
        item, liked, seconds = orjson.loads(raw)
    except (ValueError, TypeError):
        return None
    valid = isinstance(item, str) and isinstance(liked, bool) and isinstance(seconds, float)
    return TimedEvent(item, liked, seconds) if valid else None


def with_times(events: Sequence[Event], unknown: Container[str] = ()) -> list[TimedEvent]:
    """Return the events with the present time, a microsecond apart, in their order."""
    now = time.time()
    return [
        TimedEvent(item, liked, now + place * 1e-6, item not in unknown) for place, (item, liked) in enumerate(events)
    ]


def latest(events: list[TimedEvent], n: int) -> list[TimedEvent]:
    """Return the last `n` events in the order of their times."""
    return sorted(events, key=lambda e: e.time)[-n:]
