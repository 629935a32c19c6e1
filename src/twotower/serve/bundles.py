"""The bundle that answers, and the one that takes its place.

CURRENT is looked at every so often. What it names is verified, loaded and asked in threads beside the one that serves;
then one reference is changed. Requests under way end with the old bundle, which is gone when the last of them is.
A bundle that cannot be loaded changes nothing but a counter, and is tried again later.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from twotower import onnx_tower
from twotower.bundle import Bundle, BundleError
from twotower.data.memmap import FOLDER
from twotower.errors import RunError, TwoTowerError, Unavailable
from twotower.request import Method, Request
from twotower.retrieve import Retriever
from twotower.serve.file_reader import FileReader
from twotower.serve.metrics import ServeMetrics
from twotower.serve.problems import Problem
from twotower.store import Store

log = logging.getLogger("twotower.bundles")

MEMORY_PER_BYTE = 1.5
"""Bytes of memory that a byte of a bundle takes, at most, while it is loaded."""
TOWER_CALL_BYTES = 1 << 28, 1 << 31
"""Bytes that calls of towers may take at most: between these, as much as is free at the start."""
LOADER_NICENESS = 15
"""How far the loading thread stands back behind the serving one."""
RECENT_BUNDLES = 8
"""Bundles under whose ids a user's live events are looked for."""
RETRY_PAUSES = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Seconds before a bundle that was refused is tried again."""
MAX_UNAVAILABLE_PAUSE = 5.0
"""… at most, if only what holds its vectors does not answer."""
CHECK_TIMEOUT, LIST_TIMEOUT, LOAD_TIMEOUT = 5.0, 30.0, 300.0
"""Seconds for a look at which bundle is current, for a list of all of them, and for loading or verifying one; a store
that takes longer does not answer."""
T = TypeVar("T")


class BundleManager:
    """The current bundle of a store, loaded; and one other, for comparing."""

    def __init__(
        self, store: Path, metrics: ServeMetrics, threads: int = 1, memory_limit: int = 0, workers: int = 1
    ) -> None:
        """`workers` share the machine's memory. Raises BundleError if the folder is no store."""
        self.store = Store(store)
        self.retriever: Retriever | None = None
        self._recent: list[str] = []
        self.last_error = "no bundle has been loaded yet"
        """Why there is no newer one."""
        self._metrics, self._threads = metrics, threads
        self._limit, self._workers = memory_limit, workers
        onnx_tower.limit_memory(max(TOWER_CALL_BYTES[0], min(TOWER_CALL_BYTES[1], _free_memory(memory_limit, workers))))
        self._check_thread, self._load_thread, self._store_thread = (
            FileReader("check"),
            FileReader("load", lower_priority),
            FileReader("store"),
        )
        self._last_stamp: tuple[Any, ...] | None = None
        self._failures, self._retry_at = 0, 0.0
        self._comparison: Retriever | None = None
        self._checked_indexes: set[str] = set()
        """Digests of index files that were looked at before: going back to a bundle costs no second look."""
        self._lock = asyncio.Lock()

    @property
    def current(self) -> Retriever:
        """What answers now. Raises Problem "no-bundle"."""
        if self.retriever is None:
            raise Problem("no-bundle", self.last_error, headers={"Retry-After": "5"})
        return self.retriever

    def event_bundles(self, retriever: Retriever) -> tuple[str, ...]:
        """Where a user's live events can be: under the bundles that were current lately and, last, the one that is
        asked."""
        asked = retriever.bundle.id
        return (*(name for name in self._recent if name != asked), asked)

    @property
    def busy(self) -> bool:
        """True while a thread is at the store, or hangs there: Python would wait for it before it ends."""
        return self._lock.locked() or any(r.busy for r in (self._check_thread, self._load_thread, self._store_thread))

    async def watch(self, seconds: float) -> None:
        """Look every `seconds`, for ever."""
        while True:
            try:
                await self.refresh()
            except Exception:  # whoever does not look any more serves the same bundle for ever
                log.exception("looking for a bundle failed")
            await asyncio.sleep(seconds)

    async def refresh(self, retry: bool = False) -> bool:
        """Load what CURRENT names if it is another bundle than the one that answers. Whether it was changed.

        A bundle that was refused is tried again after a while, or at once if `again`."""
        async with self._lock:
            silent = None
            try:
                stamp: tuple[Any, ...] = await self._stamp()
            except RunError as e:
                stamp = ("unreadable", str(e))
                silent = e if getattr(e, "reason", "") == "store" else None
            waits = not self._failures or time.monotonic() < self._retry_at
            if stamp == self._last_stamp and waits and not retry:
                return False
            if stamp != self._last_stamp:
                self._failures = 0
            self._last_stamp = stamp
            started = time.perf_counter()
            try:
                if silent:
                    raise silent
                loaded, recent = await self._load_thread.run(self._load, LOAD_TIMEOUT)
            except Exception as e:  # whatever a bundle does to the loader, the old one goes on
                self._refused(e)
                return False
            self._failures, self.last_error = 0, ""
            self._recent = recent
            if loaded is None:
                return False
            self._metrics.load_seconds.set(time.perf_counter() - started)
            self._swap(loaded)
            return True

    async def open_other(self, bundle: str) -> Retriever:
        """Another bundle of the store, or the current one by its id; the last one asked for is kept.

        Raises Problem "unknown-bundle"."""
        for known in (self.retriever, self._comparison):
            if known is not None and known.bundle.id == bundle:
                return known
        async with self._lock:
            if self._comparison is not None and self._comparison.bundle.id == bundle:
                return self._comparison
            self._comparison = None
            try:
                await self._stamp()
                self._comparison = await self._load_thread.run(lambda: self._open(bundle), LOAD_TIMEOUT)
            except TwoTowerError as e:
                raise Problem("unknown-bundle", self.public_message(e)) from None
            return self._comparison

    async def with_store(self, work: Callable[[Store], T], seconds: float = LIST_TIMEOUT) -> T:
        """Run `work` on the store and return its result. Raises BundleError "store" if that takes too long, at once if the
        store does not even say what is current."""
        await self._stamp()
        return await self._store_thread.run(lambda: work(self.store), seconds)

    async def _stamp(self) -> tuple[str, int]:
        return await self._check_thread.run(self.store.stamp, CHECK_TIMEOUT)

    def public_message(self, error: Exception) -> str:
        """What a client is told: where the store and its vectors lie is not its business."""
        text = re.sub(r"https?://[^/\s:]+(:\d+)?", "index", str(error))
        text = text.replace(str(self.store.path.absolute()), "store")
        return text if str(self.store.path) == "." else text.replace(str(self.store.path), "store")

    def close(self) -> None:
        for reader in (self._check_thread, self._load_thread, self._store_thread):
            reader.close()

    def _open(self, name: str) -> Retriever:
        return self._retriever(self.store.open(name))

    def _retriever(self, bundle: Bundle) -> Retriever:
        _check_memory(_loaded_bytes(bundle), self._limit, self._workers)
        loaded = Retriever(bundle, self._threads, self._checked_indexes, _free_memory(self._limit, self._workers))
        self._checked_indexes.add(loaded.index_digest)
        return loaded

    def _load(self) -> tuple[Retriever | None, list[str]]:
        """The bundle that is to become current, None if it is so already; and those that were current lately."""
        bundle = self.store.current()
        recent = self._recent
        try:
            recent = self.store.recent(RECENT_BUNDLES)
        except BundleError as e:  # which keeps a few live events from being found, and no bundle from answering
            log.warning("the history cannot be read", extra={"fields": {"detail": str(e)}})
        if self.retriever is not None and bundle.id == self.retriever.bundle.id:
            return None, recent
        other, self._comparison = self._comparison, None  # three at a time would be one too many
        if other is not None and other.bundle.id == bundle.id:
            return other, recent
        del other
        fresh = self._retriever(bundle)
        check_answers(fresh)
        return fresh, recent

    def _swap(self, fresh: Retriever) -> None:
        old = self.retriever
        self.retriever = fresh
        name, recall = fresh.bundle.id, float(fresh.bundle.manifest["recall_check"]["recall"])
        self._metrics.set_bundle(name, recall, old.bundle.id if old else None)
        self._metrics.loads.inc()
        log.info("bundle is current", extra={"fields": {"bundle": name, "before": old.bundle.id if old else None}})
        if old is None:
            gc.collect()
            gc.freeze()  # what is here stays, and need not be looked through again
        del old
        self._load_thread.submit(_release_memory)

    def _refused(self, error: Exception) -> None:
        reason = getattr(error, "reason", "broken")
        pause = RETRY_PAUSES[min(self._failures, len(RETRY_PAUSES) - 1)]
        self._retry_at = time.monotonic() + (
            min(pause, MAX_UNAVAILABLE_PAUSE) if isinstance(error, Unavailable) else pause
        )
        self._failures += 1
        self.last_error = self.public_message(error)
        self._metrics.load_failures.labels(reason).inc()
        log.error("bundle refused", exc_info=error if not isinstance(error, TwoTowerError) else None,
                  extra={"fields": {"reason": reason, "detail": str(error)}})  # fmt: skip


def check_answers(retriever: Retriever) -> None:
    """Ask a bundle by both methods, so that it has answered before it serves. Raises RunError if it cannot."""
    if len(retriever.user_ids):
        methods: tuple[Method, Method] = (1, 2)
        for method in methods:
            answer = retriever.recommend(Request(retriever.user_ids[0]), 10, method)
            if not answer.items and not answer.truncated:
                raise RunError(f"{retriever.bundle.folder}: gives no answer by method {method}")


def available_memory() -> int:
    """Bytes that may still be taken: of the machine, and of the control groups of this process; the least of them."""
    found = [
        _meminfo("MemAvailable"),
        *(free for folder in control_groups() if (free := free_in_group(folder)) is not None),
    ]
    return min(found)


def control_groups(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """The control groups that this process is in, of either version, up to the root: each can have a limit."""
    found = []
    with suppress(OSError):
        for line in proc.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top = root / controllers
                inner = top / path.strip("/")
                found += [inner, *(p for p in inner.parents if p.is_relative_to(top))]
    return found


def free_in_group(group: Path) -> int | None:
    """Bytes that a control group may still take, None if it has no limit."""
    for most, now, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):
            bound = (group / most).read_text().strip()
            if bound != "max":
                # Pages of files that nobody has touched lately are given up when memory is asked for.
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                return int(bound) - int((group / now).read_text()) + int(stat.get(idle, 0))
    return None


def _free_memory(limit: int, workers: int) -> int:
    """Bytes that a bundle may take, loaded by all workers at about the same time."""
    return min(available_memory() // workers, limit - _resident_bytes() if limit else 1 << 62)


def _check_memory(size: int, limit: int, workers: int) -> None:
    """Raises BundleError if a bundle of `size` bytes does not fit, loaded by all workers at about the same time."""
    need, have = int(size * MEMORY_PER_BYTE), _free_memory(limit, workers)
    if need > have:
        raise BundleError(
            f"the bundle may need {need / 1e6:,.0f} MB and {have / 1e6:,.0f} MB are free; it is not loaded", "memory"
        )


def _loaded_bytes(bundle: Bundle) -> int:
    """Bytes of its files, without those that are mapped and read here and there."""
    return sum(e["size"] for e in bundle.manifest["files"] if not e["path"].startswith(f"{FOLDER}/arrays/"))


def _meminfo(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def lower_priority() -> None:
    """Make this thread the one that waits (a nice value is a thread's own on Linux)."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, LOADER_NICENESS)
    except OSError:
        log.debug("the loading thread keeps its priority")


def _release_memory() -> None:
    """Give the memory of the old bundle back to the machine, where the C library can. The bundle itself was freed when
    the last request let go of it: there is no cycle in it for `gc.collect`, which would hold everybody up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
