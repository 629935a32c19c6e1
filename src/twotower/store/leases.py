"""Leases of an object store: objects that name the bundle that a process reads or publishes.

leases/<bundle or none>/<action>.<seconds>.<name>    its content names the host and the process

All times are by the clock of the object store. A lease lives for its seconds and a margin after the last write of its
object.
"""

from __future__ import annotations

import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from twotower.errors import BundleError, warn_once
from twotower.files.object_stores import ObjectClient, ObjectError, ObjectInfo
from twotower.store.bundle import is_bundle_id

LEASES, NO_BUNDLE = "leases", "none"
_KEY = re.compile(r"([^/]+)/([a-z]+)\.([0-9]{1,9})\.[0-9a-f]{32}")
_MAX_BYTES = 10_000


@dataclass(frozen=True)
class LeaseTimes:
    """Times of leases, in seconds."""

    seconds: int = 900
    """Life of a lease. It is renewed three times in its life."""
    margin: float = 60.0
    """Time after the end of a lease during which it still counts."""


@dataclass(frozen=True)
class FoundLease:
    """A lease of another process."""

    key: str
    action: str
    bundle: str
    """Id of the bundle; empty: none."""
    is_live: bool


def _now() -> float:
    """Return seconds of a clock that counts the sleep of the machine, where the system has one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Lease:
    """A lease of this process."""

    def __init__(self, client: ObjectClient, key: str, times: LeaseTimes) -> None:
        self.key = key
        self._client, self._times = client, times
        self._renewed = self._tried = float("-inf")

    @property
    def is_live(self) -> bool:
        """False if the lease may have ended because no renewal succeeded."""
        return _now() < self._renewed + self._times.seconds

    def renew(self) -> None:
        """Write the lease. Raises ObjectError."""
        self._tried = began = _now()
        holder = {"host": platform.node(), "pid": os.getpid()}
        self._client.write(self.key, json.dumps(holder).encode())
        self._renewed = began

    def renew_if_due(self) -> None:
        """Write the lease if the last try is older than a third of its life. Raises ObjectError."""
        if _now() > self._tried + self._times.seconds / 3:
            self.renew()

    def end(self) -> None:
        """Delete the lease. If that fails, it ends by its time."""
        with suppress(ObjectError):
            self._client.delete([self.key])


class Leases:
    """The leases of one store."""

    def __init__(self, client: ObjectClient, key: Callable[[str], str], times: LeaseTimes) -> None:
        self._client, self._key, self.times = client, key, times

    def new(self, action: str, bundle: str = "") -> Lease:
        """Return a lease, not yet written."""
        name = f"{action}.{self.times.seconds}.{uuid.uuid4().hex}"
        return Lease(self._client, self._key(f"{LEASES}/{bundle or NO_BUNDLE}/{name}"), self.times)

    @contextmanager
    def held(self, lease: Lease) -> Iterator[Lease]:
        """Write a lease, renew it in a thread while the block runs, and end it. Raises ObjectError."""
        lease.renew()
        ended = threading.Event()

        def keep() -> None:
            while not ended.wait(self.times.seconds / 3):
                with suppress(ObjectError):
                    lease.renew()

        thread = threading.Thread(target=keep, name="lease", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            ended.set()
            lease.end()

    def found(self, own: Lease) -> tuple[list[FoundLease], float]:
        """Renew `own`; return all other leases, and the time of the object store in seconds since 1970."""
        own.renew()
        listed = self._client.list(self._key(LEASES), warn_once)
        now = next((o.changed for o in listed if o.key == own.key), None)
        if now is None:
            raise BundleError(f"{self._client.url}: a lease is gone as soon as it is written; call again", "store")
        found = {o: self._parsed(o, now) for o in listed if o.key != own.key}
        if foreign := [o.key for o, lease in found.items() if lease is None and o.size]:  # a folder's marker is empty
            shown = ", ".join(map(repr, foreign[:3])) + " …" * (len(foreign) > 3)
            warn_once(f"{self._client.url}: {len(foreign):,} foreign keys among the leases are skipped: {shown}")
        return [lease for lease in found.values() if lease is not None], now

    def holder(self, lease: FoundLease) -> str:
        """Return the process of a lease."""
        try:
            holder = json.loads(self._client.read(lease.key, _MAX_BYTES).data)
            return f"(pid {holder['pid']} on {holder['host']})"
        except (ValueError, KeyError, TypeError, ObjectError):
            return "(pid ? on ?)"

    def clear(self, leases: list[FoundLease]) -> None:
        """Delete leases. Raises ObjectError."""
        self._client.delete([lease.key for lease in leases])

    def _parsed(self, found: ObjectInfo, now: float) -> FoundLease | None:
        parts = _KEY.fullmatch(found.key.removeprefix(f"{self._key(LEASES)}/"))
        if parts is None or not (parts[1] == NO_BUNDLE or is_bundle_id(parts[1])):
            return None
        bundle, action, seconds = parts.groups()
        ends = found.changed + int(seconds) + self.times.margin
        return FoundLease(found.key, action, "" if bundle == NO_BUNDLE else bundle, now <= ends)
