"""What users have done since the bundle was published, and their vectors with it.

Keys carry the bundle's id: `BUNDLE:events:USER`, `BUNDLE:vector:USER`. Events are written under the present bundle and read
under it and those that were current lately, in the order of their times, so swaps and rollbacks forget nobody; a vector
of another bundle is a miss. A vector is kept with a digest of the events it was made of, so it is never older than the
history.

A store that fails makes an answer colder, never an error: reads give what this process knows, writes are kept here until
the store is back.
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
"""An item's id, and whether the user liked it."""
UserVector = npt.NDArray[np.float32]
T = TypeVar("T")

log = logging.getLogger("twotower.user_events")


@dataclass(frozen=True)
class UserState:
    """A user's events, oldest first, and the vector that was made with them, if it was kept."""

    events: list[Event]
    vector: UserVector | None = None


EMPTY_STATE = UserState([])


class EventStore(Protocol):
    """Where live histories and vectors are kept."""

    shared: bool
    """Whether other processes see them."""

    async def add(
        self, bundles: Sequence[str], user: str, events: Sequence[Event], unknown: Container[str] = ()
    ) -> tuple[int, bool]:
        """Append under the last of the bundles, which does not know the `unknown` items; how many are kept under all of
        them, and whether others see the new ones."""

    async def fetch(self, bundles: Sequence[str], user: str) -> UserState:
        """The events under these bundles, in the order in which they came, and the vector under the last bundle."""

    async def save_vector(self, bundle: str, user: str, events: Sequence[Event], vector: UserVector) -> None:
        """Keep the vector (1, D) that was made with these events."""

    async def forget(self, bundles: Sequence[str], user: str) -> bool:
        """Drop the user's events; whether that is certain."""

    async def close(self) -> None:
        """Let go of connections."""


class InProcessEvents:
    """In this process: of each user the latest `events`, `seconds` after the last of them, `limit` bytes of all."""

    shared = False

    def __init__(
        self,
        events: int = 200,
        seconds: float = 86_400,
        limit: int = 256 << 20,
        on_drop: Callable[[str, int], None] = lambda what, n: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_drop` receives "user" or "event", and how many, each time there is no room for some."""
        self.events = events
        self._histories = Histories(events, seconds, limit, on_drop, clock)

    @property
    def size(self) -> int:
        """Bytes that are taken of `limit`."""
        return self._histories.size

    async def add(
        self, bundles: Sequence[str], user: str, events: Sequence[Event], unknown: Container[str] = ()
    ) -> tuple[int, bool]:
        self.put(bundles[-1], user, with_times(events, unknown))
        return len(self.get(bundles, user)), True

    def put(self, bundle: str, user: str, events: Sequence[TimedEvent]) -> None:
        self._histories.put(user, bundle, events)

    def get(self, bundles: Sequence[str], user: str) -> list[TimedEvent]:
        """The latest events under these bundles."""
        return latest(self._histories.get(user, bundles), self.events)

    def take(self, bundles: Sequence[str], user: str) -> list[TimedEvent]:
        """The events under these bundles, which are here no longer."""
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
    """After `failures` in a row nobody asks for a while, which doubles from `pause` to `max_pause` seconds; then one may try."""

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
        """Whether it lets everybody ask."""
        return self._failed < self.failures

    def begin(self) -> float | None:
        """When this try begins, to be told if it goes wrong; None if nobody should ask now."""
        now = self._clock()
        if self.closed:
            return now
        if now < self._until:
            return None
        self._until = now + self.pause  # others wait for this one
        return now

    def succeeded(self) -> None:
        self._failed = 0

    def failed(self, began: float) -> None:
        """Tries that were under way when it opened are one failure with those that opened it."""
        if not self.closed and began <= self._opened:
            return
        self._failed += 1
        if not self.closed:
            self._opened = self._clock()
            pause = min(self.max_pause, self.pause * 2.0 ** (self._failed - self.failures))
            self._until = self._opened + pause * random.uniform(0.75, 1.25)


class RedisEvents:
    """In Redis or Valkey, which workers and hosts share."""

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
        """`timeout` in seconds for one exchange; `on_failure` receives "read" or "write" each time one fails; `fallback` keeps
        what cannot be written.

        Raises ConfigError if the client is not installed or the URL is none.
        """
        try:
            import redis.asyncio as client
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ImportError:
            raise ConfigError("--event-store redis://… needs the client: pip install -e '.[serve]'") from None
        try:
            self._client: Any = client.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0),
                max_connections=256,
            )  # fmt: skip
        except ValueError as e:
            raise ConfigError(f"--event-store {url}: {e}") from None
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

        # Not tried twice: nobody knows whether the first one arrived.
        n = await self._call("write", push, attempts=1)
        if n is not None:
            return min(n, self.events), True
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
        there = [event for history in histories for raw in history if (event := _parse_event(raw))]
        events = [(e.item, e.liked) for e in latest([*there, *self._fallback.get(bundles, user)], self.events)]
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
        """What the store says, or None if it fails or is being left alone."""
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
                    log.warning("live store fails, going on without it: %s", type(e).__name__)
                if attempt + 1 < attempts:
                    await asyncio.sleep(random.uniform(0, self.timeout / 4))
            else:
                if not self.breaker.closed:
                    log.warning("live store is back")
                self.breaker.succeeded()
                return answer
        return None


_DIGEST_BYTES = 8
_MAX_EVENT_BYTES = 4096
"""Bytes of an event: of 512 characters, the longest id, none takes more than six."""


def history_digest(events: Sequence[Event]) -> bytes:
    """Of a history."""
    return hashlib.blake2b(orjson.dumps(events), digest_size=_DIGEST_BYTES).digest()


def _events_key(bundle: str, user: str) -> str:
    return f"{bundle}:events:{user}"


def _vector_key(bundle: str, user: str) -> str:
    return f"{bundle}:vector:{user}"


def _parse_event(raw: bytes) -> TimedEvent | None:
    """Nothing for what is no event of ours."""
    if len(raw) > _MAX_EVENT_BYTES:
        return None
    try:
        item, liked, when = orjson.loads(raw)
    except (ValueError, TypeError):
        return None
    ours = isinstance(item, str) and isinstance(liked, bool) and isinstance(when, float)
    return TimedEvent(item, liked, when) if ours else None


def with_times(events: Sequence[Event], unknown: Container[str] = ()) -> list[TimedEvent]:
    """Events of now, in their order."""
    now = time.time()
    return [
        TimedEvent(item, liked, now + place * 1e-6, item not in unknown) for place, (item, liked) in enumerate(events)
    ]


def latest(events: list[TimedEvent], n: int) -> list[TimedEvent]:
    """The last `n` in the order of their times."""
    return sorted(events, key=lambda e: e.time)[-n:]
