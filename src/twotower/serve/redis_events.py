"""Event store in Redis or Valkey, which workers and hosts share.

If Redis is unavailable, no request fails: reads return the events that this process has, and writes are kept here until
Redis answers again. Malformed replies count as no answer; a user's key of another type is no key.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from types import UnionType
from typing import TypeVar

import numpy as np
import orjson

from twotower.arrays.types import Floats
from twotower.errors import ConfigError
from twotower.retrieval.event import Event, EventLike
from twotower.serve.circuit_breaker import CircuitBreaker
from twotower.serve.user_events import (
    DIGEST_BYTES,
    EMPTY_STATE,
    InProcessEvents,
    UserState,
    history_digest,
    latest,
    with_times,
)

MAX_EVENT_BYTES = 8_192
"""Bytes of an event in JSON, at most: an id and a type have up to 512 characters each, of up to six bytes."""
MAX_EVENT_TIME = 1e11
"""Seconds since 1970 below which the time of an event is, in the sixth millennium: a later one is no time."""
T = TypeVar("T")

log = logging.getLogger("twotower.user_events")


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

        `timeout`: seconds for one exchange. `on_failure` receives "read" or "write" after each failure. `fallback`
        keeps events that cannot be written.

        Raises ConfigError if the URL is invalid.
        """
        import redis.asyncio as client
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        try:
            self._client = client.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0),
                max_connections=256,
            )  # fmt: skip
        except ValueError as e:
            raise ConfigError(f"the address of the event store cannot be used: {e}") from None
        self.events, self.seconds, self.timeout = events, seconds, timeout
        self.breaker = CircuitBreaker()
        self._on_failure = on_failure
        self._fallback = fallback or InProcessEvents(events, seconds)

    async def add(self, bundles: Sequence[str], user: str, events: Sequence[EventLike]) -> tuple[int, bool]:
        key, new = _events_key(bundles[-1], user), with_times(events[-self.events :])
        waiting = self._fallback.take(bundles, user)

        async def push() -> int | None:
            pipe = self._client.pipeline(transaction=True)
            pipe.rpush(key, *map(_event_json, (*waiting, *new)))
            pipe.ltrim(key, -self.events, -1)
            pipe.expire(key, self.seconds)
            for bundle in bundles:
                pipe.llen(_events_key(bundle, user))
            pushed, _, _, *counts = (_value(r, int, 0) for r in await pipe.execute(raise_on_error=False))
            return sum(counts) if pushed else None

        # One attempt: a write without a reply may have been done.
        count = await self._call("write", push, attempts=1)
        if count is not None:
            return min(count, self.events), True
        self._fallback.put(bundles[-1], user, [*waiting, *new])
        return len(self._fallback.get(bundles, user)), False

    async def fetch(self, bundles: Sequence[str], user: str) -> UserState:
        async def read() -> tuple[list[list[bytes]], bytes | None]:
            pipe = self._client.pipeline(transaction=False)
            for bundle in bundles:
                pipe.lrange(_events_key(bundle, user), -self.events, -1)
            pipe.get(_vector_key(bundles[-1], user))
            *histories, vector = await pipe.execute(raise_on_error=False)
            return [_value(history, list, []) for history in histories], _value(vector, bytes | None, None)

        found = await self._call("read", read, attempts=2)
        if found is None:
            return await self._fallback.fetch(bundles, user)
        histories, kept = found
        stored = [event for history in histories for raw in history if (event := _parse_event(raw))]
        events = latest([*stored, *self._fallback.get(bundles, user)], self.events)
        if not events:
            return EMPTY_STATE
        if kept is None or kept[:DIGEST_BYTES] != history_digest(events) or (len(kept) - DIGEST_BYTES) % 4:
            return UserState(events)
        vector = np.frombuffer(kept, "<f4", offset=DIGEST_BYTES)[None]
        return UserState(events, vector if np.isfinite(vector).all() else None)

    async def save_vector(self, bundles: Sequence[str], user: str, events: Sequence[EventLike], vector: Floats) -> None:
        key, value = _vector_key(bundles[-1], user), history_digest(events) + vector.astype("<f4").tobytes()
        await self._call("write", lambda: self._client.set(key, value, ex=self.seconds), attempts=1)

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
            except Exception as e:  # the client fails in many ways on what is not Redis
                self._on_failure(what)
                if self.breaker.failed(began):
                    log.warning("the event store fails and is not used for a while: %s", type(e).__name__)
                if attempt + 1 < attempts:
                    await asyncio.sleep(random.uniform(0, self.timeout / 4))
            else:
                if self.breaker.succeeded():
                    log.warning("the event store answers again")
                return answer
        return None


def _value(reply: T | Exception, kind: type[T] | UnionType, missing: T) -> T:
    """Return the reply to one command, or `missing` if its key has another type. Raises TypeError for a reply of
    another kind, and the server's own errors."""
    if isinstance(reply, Exception):
        if str(reply).startswith("WRONGTYPE"):
            return missing
        raise reply
    if not isinstance(reply, kind):
        raise TypeError(f"the event store sends {type(reply).__name__}")
    return reply


def _events_key(bundle: str, user: str) -> str:
    return f"{bundle}:events:{user}"


def _vector_key(bundle: str, user: str) -> str:
    return f"{bundle}:vector:{user}"


def _event_json(event: Event) -> bytes:
    """Return an event in JSON: item, liked, time, and the type if it has one."""
    types = [] if event.type is None else [event.type]
    return orjson.dumps([event.item, event.liked, float(event.time or 0.0), *types])


def _parse_event(raw: bytes) -> Event | None:
    """Return the event in `raw`; None if it is not an event in JSON (another program may write to the key)."""
    if not isinstance(raw, bytes) or len(raw) > MAX_EVENT_BYTES:
        return None
    try:
        item, liked, seconds, *types = orjson.loads(raw)
    except (ValueError, TypeError):
        return None
    valid = isinstance(item, str) and isinstance(liked, bool) and isinstance(seconds, float) and len(types) < 2
    if not valid or not 0 <= seconds < MAX_EVENT_TIME or not all(isinstance(kind, str) for kind in types):
        return None
    return Event(item, liked, types[0] if types else None, seconds)
