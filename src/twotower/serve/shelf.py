"""The bundle that answers, and the one that takes its place.

CURRENT is looked at every so often. What it names is verified, loaded and asked in a thread beside the one that serves;
then one reference is changed. Requests under way end with the old bundle, which is gone when the last of them is.
A bundle that cannot be loaded changes nothing but a counter, and is tried again later.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from twotower.bundle import Bundle, BundleError
from twotower.errors import RunError, TwoTowerError
from twotower.retrieve import Method, Request, Retriever
from twotower.serve.metrics import Metrics
from twotower.serve.problem import Problem
from twotower.store import Store

log = logging.getLogger("twotower.shelf")

LOADED = 1.5
"""Bytes of memory that a byte of a bundle takes, at most, while it is loaded."""
NICE = 15
"""How far the loading thread stands back behind the serving one."""
PAUSES = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Seconds before a bundle that was refused is tried again."""


class Shelf:
    """The current bundle of a store, loaded; and one other, for comparing."""

    def __init__(self, store: Path, metrics: Metrics, threads: int = 1, memory_limit: int = 0) -> None:
        """Raises BundleError if the folder is no store."""
        self.store = Store(store)
        self.retriever: Retriever | None = None
        self.replaced: str | None = None
        """The bundle that the current one took the place of."""
        self.why = "no bundle has been loaded yet"
        """Why there is no newer one."""
        self._metrics, self._threads, self._limit = metrics, threads, memory_limit
        self._pool = ThreadPoolExecutor(1, "shelf", initializer=_stand_back)
        self._tried: tuple[Any, ...] | None = None
        self._failures, self._again = 0, 0.0
        self._other: Retriever | None = None
        self._sound: set[str] = set()
        """Digests of index files that were looked at before: going back to a bundle costs no second look."""
        self._lock = asyncio.Lock()

    @property
    def current(self) -> Retriever:
        """What answers now. Raises Problem "no-bundle"."""
        if self.retriever is None:
            raise Problem("no-bundle", self.why, headers={"Retry-After": "5"})
        return self.retriever

    def bundles(self, retriever: Retriever) -> tuple[str, ...]:
        """Where a user's live events can be: under the bundle before the current one, the current one, and, last, the
        one that is asked."""
        known = (self.replaced, self.current.bundle.id)
        asked = retriever.bundle.id
        return (*(name for name in dict.fromkeys(known) if name and name != asked), asked)

    async def watch(self, seconds: float) -> None:
        """Look every `seconds`, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(seconds)

    async def look(self) -> bool:
        """Load what CURRENT names if it is another bundle than the one that answers. Whether it was changed."""
        async with self._lock:
            try:
                stamp: tuple[Any, ...] = self.store.stamp()
            except RunError as e:
                stamp = ("unreadable", str(e))
            if stamp == self._tried and (not self._failures or time.monotonic() < self._again):
                return False
            if stamp != self._tried:
                self._failures = 0
            self._tried = stamp
            started = time.perf_counter()
            try:
                loaded = await asyncio.get_running_loop().run_in_executor(self._pool, self._load)
            except Exception as e:  # whatever a bundle does to the loader, the old one goes on
                self._refused(e)
                return False
            self._failures, self.why = 0, ""
            if loaded is None:
                return False
            self._metrics.load_seconds.set(time.perf_counter() - started)
            self._swap(loaded)
            return True

    async def other(self, bundle: str) -> Retriever:
        """Another bundle of the store, or the current one by its id; the last one asked for is kept.

        Raises Problem "unknown-bundle"."""
        for known in (self.retriever, self._other):
            if known is not None and known.bundle.id == bundle:
                return known
        async with self._lock:
            if self._other is not None and self._other.bundle.id == bundle:
                return self._other
            self._other = None
            try:
                run = asyncio.get_running_loop().run_in_executor
                self._other = await run(self._pool, self._open, bundle)
            except TwoTowerError as e:
                raise Problem("unknown-bundle", self._told(e)) from None
            return self._other

    def _told(self, error: Exception) -> str:
        """What a client is told: where the store lies is not its business."""
        return str(error).replace(str(self.store.path.absolute()), "store").replace(str(self.store.path), "store")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _open(self, name: str) -> Retriever:
        bundle = self.store.open(name)
        _check_memory(bundle.size, self._limit)
        return self._retriever(bundle)

    def _retriever(self, bundle: Bundle) -> Retriever:
        loaded = Retriever(bundle, self._threads, self._sound)
        self._sound.add(loaded.index_digest)
        return loaded

    def _load(self) -> Retriever | None:
        bundle = self.store.current()
        if self.retriever is not None and bundle.id == self.retriever.bundle.id:
            return None
        _check_memory(bundle.size, self._limit)
        fresh = self._retriever(bundle)
        probe(fresh)
        return fresh

    def _swap(self, fresh: Retriever) -> None:
        old = self.retriever
        self.replaced = old.bundle.id if old else self.store.replaced()
        self.retriever = fresh
        name, recall = fresh.bundle.id, float(fresh.bundle.manifest["gate"]["recall"])
        self._metrics.serves(name, recall, old.bundle.id if old else None)
        self._metrics.loads.inc()
        log.info("bundle is current", extra={"told": {"bundle": name, "before": old.bundle.id if old else None}})
        if old is None:
            gc.collect()
            gc.freeze()  # what is here stays, and need not be looked through again
        del old
        self._pool.submit(_trim)

    def _refused(self, error: Exception) -> None:
        reason = getattr(error, "reason", "broken")
        self._again = time.monotonic() + PAUSES[min(self._failures, len(PAUSES) - 1)]
        self._failures += 1
        self.why = self._told(error)
        self._metrics.load_failures.labels(reason).inc()
        log.error("bundle refused", exc_info=error if not isinstance(error, TwoTowerError) else None,
                  extra={"told": {"reason": reason, "detail": str(error)}})  # fmt: skip


def probe(retriever: Retriever) -> None:
    """Ask a bundle by both methods, so that it has answered before it serves. Raises RunError if it cannot."""
    if len(retriever.user_ids):
        methods: tuple[Method, Method] = (1, 2)
        for method in methods:
            answer = retriever.recommend(Request(retriever.user_ids[0]), 10, method)
            if not answer.items and not answer.truncated:
                raise RunError(f"{retriever.bundle.folder}: gives no answer by method {method}")


def available(limit: int = 0) -> int:
    """Bytes that this process may still take: of `limit`, of the control group, of the machine; the least of them."""
    found = [_meminfo("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    for most, now, idle in (
        (group / "memory.max", group / "memory.current", "inactive_file"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            bound, used = most.read_text().strip(), int(now.read_text())
            if bound != "max":
                # Pages of files that nobody has touched lately are given up when memory is asked for.
                lines = dict(line.split() for line in (most.parent / "memory.stat").read_text().splitlines())
                found.append(int(bound) - used + int(lines.get(idle, 0)))
        except (OSError, ValueError):
            continue
    if limit:
        found.append(limit - _resident())
    return min(found)


def _check_memory(size: int, limit: int) -> None:
    """Raises BundleError if a bundle of `size` bytes does not fit."""
    need, have = int(size * LOADED), available(limit)
    if need > have:
        raise BundleError(
            f"the bundle may need {need / 1e6:,.0f} MB and {have / 1e6:,.0f} MB are free; it is not loaded", "memory"
        )


def _meminfo(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _stand_back() -> None:
    """Make this thread the one that waits (a nice value is a thread's own on Linux)."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    except OSError:
        log.debug("the loading thread keeps its priority")


def _trim() -> None:
    """Give the memory of the old bundle back to the machine, where the C library can. The bundle itself was freed when
    the last request let go of it: there is no cycle in it for `gc.collect`, which would hold everybody up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
