"""The bundle that answers requests, and its replacement while the service runs.

The manager polls the store's file CURRENT. It verifies, loads and tries the new bundle in a thread, while the old
bundle answers; then it replaces one reference. Requests under way end with the old bundle, whose memory is freed after
the last one. A bundle that cannot be loaded only increments a counter, and is tried again after a pause.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from twotower import files
from twotower.errors import BundleError, RunError, TwoTowerError, Unavailable
from twotower.files import layout
from twotower.files.urls import Url
from twotower.machine import free_physical_memory, memory_in_use
from twotower.onnx.tower import INSPECT_SECONDS, limit_memory
from twotower.retrieval.request import Method, Request
from twotower.retrieval.retriever import Retriever
from twotower.serve.file_reader import FileReader
from twotower.serve.metrics import ServeMetrics
from twotower.serve.problems import Problem
from twotower.serve.settings import ServeSettings
from twotower.store.bundle import Bundle
from twotower.store.store import Store

log = logging.getLogger("twotower.bundles")

MEMORY_PER_BYTE = 1.5
"""Bytes of memory for each byte of a bundle's files while it is loaded, at most."""
TOWER_CALL_BYTES = 1 << 28, 1 << 31
"""Least and greatest limit of the memory of all tower calls. Bytes; between them, the memory free at the start."""
LOADER_NICENESS = 15
"""Nice value of the thread that loads bundles."""
RECENT_BUNDLES = 8
"""Bundles under whose ids a user's recent events are looked up."""
T = TypeVar("T")


@dataclass(frozen=True)
class BundleLimits:
    """Times and memory of work on a store."""

    check_timeout: float = 5.0
    """Seconds for reading which bundle is current."""
    list_timeout: float = 30.0
    """Seconds for listing the bundles or changing which is current."""
    load_timeout: float = 300.0
    """Seconds for loading or verifying a bundle."""
    retry_pauses: tuple[float, ...] = (1.0, 2.0, 5.0, 15.0, 60.0)
    """Seconds before a refused bundle is tried again, after its first, second … failure; the last one repeats."""
    max_unavailable_pause: float = 5.0
    """Greatest pause while only the vector database does not answer. Seconds."""
    inspect_seconds: float = INSPECT_SECONDS
    """Processor seconds for inspecting a tower that is new to the process, added to the seconds for its bytes."""


class BundleManager:
    """The loaded current bundle of a store, and a second bundle for comparisons."""

    def __init__(self, settings: ServeSettings, metrics: ServeMetrics, limits: BundleLimits = BundleLimits()) -> None:
        """Open the store of the settings, without loading a bundle. Raises BundleError if the folder is not a store."""
        self.store = Store(settings.store)
        self.limits = limits
        self.retriever: Retriever | None = None
        self._recent: list[str] = []
        self.last_error = "no bundle has been loaded yet"
        """Reason why no newer bundle is loaded; empty after a success."""
        self.store_state = "answers"
        """"answers", or "silent" if the last read of CURRENT failed."""
        self._metrics, self._threads = metrics, settings.threads
        self._metrics.store_answers.set(1)
        self._limit, self._workers = settings.memory_limit, settings.workers
        limit_memory(max(TOWER_CALL_BYTES[0], min(TOWER_CALL_BYTES[1], free_memory(self._limit, self._workers))))
        self._check_thread, self._load_thread, self._store_thread = (
            FileReader("check"),
            FileReader("load", lower_priority),
            FileReader("store"),
        )
        self._last_stamp: tuple[str, int | str] | None = None
        self._failures, self._retry_at = 0, 0.0
        self._comparison: Retriever | None = None
        self._lock = asyncio.Lock()

    @property
    def current(self) -> Retriever:
        """The retriever that answers requests now. Raises Problem "no-bundle"."""
        if self.retriever is None:
            raise Problem("no-bundle", self.last_error)
        return self.retriever

    @property
    def current_id(self) -> str | None:
        """Id of the bundle that answers requests now; None before the first."""
        return self.retriever.bundle.id if self.retriever else None

    def event_bundles(self, retriever: Retriever) -> tuple[str, ...]:
        """Return the ids of bundles of which recent events are kept: recently current ones, then `retriever`'s."""
        own = retriever.bundle.id
        return (*(name for name in self._recent if name != own), own)

    @property
    def busy(self) -> bool:
        """True while a thread reads or writes the store, or hangs there. Python waits for such a thread at its end."""
        return self._lock.locked() or any(r.busy for r in (self._check_thread, self._load_thread, self._store_thread))

    async def watch(self, seconds: float) -> None:
        """Refresh every `seconds` seconds, without end."""
        while True:
            try:
                await self.refresh()
            except Exception:  # if the loop ended, the same bundle would be served until the next restart
                log.exception("refreshing the bundle failed")
            await asyncio.sleep(seconds)

    async def refresh(self, retry: bool = False) -> bool:
        """Load the bundle named in CURRENT, unless it answers already. Return True if the bundle was replaced.

        A refused bundle is tried again after a pause (`BundleLimits.retry_pauses`), or at once if `retry`.
        """
        async with self._lock:
            no_answer = None
            try:
                stamp: tuple[str, int | str] = await self._stamp()
            except RunError as e:
                stamp = ("unreadable", str(e))
                no_answer = e if getattr(e, "reason", "") == "store" else None
            self._hear("silent" if no_answer else "answers")
            paused = not self._failures or time.monotonic() < self._retry_at
            if stamp == self._last_stamp and paused and not retry:
                return False
            if stamp != self._last_stamp:
                self._failures = 0
            self._last_stamp = stamp
            started = time.perf_counter()
            try:
                if no_answer:
                    raise no_answer
                loaded, recent = await self._load_thread.run(self._load, self.limits.load_timeout)
            except Exception as e:  # no error of a new bundle may stop the old one
                self._refuse(e)
                return False
            self._failures, self.last_error = 0, ""
            self._recent = recent
            if loaded is None:
                return False
            self._metrics.load_seconds.set(time.perf_counter() - started)
            self._swap(loaded)
            return True

    async def open_other(self, bundle: str) -> Retriever:
        """Return the retriever of a bundle by its id: the current one, or another, which is kept until the next call.

        Raises Problem "unknown-bundle" if it is not in the store or cannot be loaded."""
        for known in (self.retriever, self._comparison):
            if known is not None and known.bundle.id == bundle:
                return known
        async with self._lock:
            if self._comparison is not None and self._comparison.bundle.id == bundle:
                return self._comparison
            self._comparison = None
            try:
                await self._stamp()
                self._comparison = await self._load_thread.run(lambda: self._open(bundle), self.limits.load_timeout)
            except TwoTowerError as e:
                raise Problem("unknown-bundle", self.public_message(e)) from None
            return self._comparison

    async def with_store(self, work: Callable[[Store], T], seconds: float | None = None) -> T:
        """Run `work` on the store in a thread and return its result.

        Raises BundleError "store" after `seconds` (default: `BundleLimits.list_timeout`), or after
        `BundleLimits.check_timeout` if even CURRENT cannot be read.
        """
        await self._stamp()
        return await self._store_thread.run(
            lambda: work(self.store), self.limits.list_timeout if seconds is None else seconds
        )

    async def _stamp(self) -> tuple[str, int | str]:
        return await self._check_thread.run(
            lambda: self.store.current_stamp(self.current_id or ""), self.limits.check_timeout
        )

    def _hear(self, state: str) -> None:
        """Note if the store answers."""
        if state != self.store_state:
            message = "the store does not answer; the bundle stays" if state == "silent" else "the store answers again"
            log.log(logging.ERROR if state == "silent" else logging.INFO, message)
        self.store_state = state
        self._metrics.store_answers.set(state == "answers")

    def public_message(self, error: Exception) -> str:
        """Return the message of an error without the addresses of the store and of the index."""
        text = re.sub(r"https?://[^/\s:]+(:\d+)?", "index", str(error))
        at = self.store.at
        names = [str(at)] if isinstance(at, Url) else [str(at.absolute()), str(at)]
        for name in [*names, str(files.cache_folder())]:
            text = text if name == "." else text.replace(name, "store")
        return text

    def close(self) -> None:
        for reader in (self._check_thread, self._load_thread, self._store_thread):
            reader.close()

    def _open(self, name: str) -> Retriever:
        return self._retriever(self.store.open(name))

    def _retriever(self, bundle: Bundle) -> Retriever:
        check_memory(_loaded_bytes(bundle), self._limit, self._workers)
        free = free_memory(self._limit, self._workers)
        return Retriever(bundle, self._threads, free, self.limits.inspect_seconds)

    def _load(self) -> tuple[Retriever | None, list[str]]:
        """Load the current bundle; return it (None if it answers already) and the ids that were current lately."""
        bundle = self.store.current()
        recent = self._recent
        try:
            recent = self.store.recent_ids(RECENT_BUNDLES)
        except BundleError as e:  # only events under earlier bundles are missed
            log.warning("the history of the store cannot be read", extra={"fields": {"detail": str(e)}})
        if self.retriever is not None and bundle.id == self.retriever.bundle.id:
            return None, recent
        other, self._comparison = self._comparison, None  # at most two bundles are in memory
        if other is not None and other.bundle.id == bundle.id:
            return other, recent
        del other
        new = self._retriever(bundle)
        check_answers(new)
        return new, recent

    def _swap(self, new: Retriever) -> None:
        old = self.retriever
        self.retriever = new
        name, recall = new.bundle.id, new.bundle.manifest.recall_check.recall
        self._metrics.set_bundle(name, recall, old.bundle.id if old else None)
        self._metrics.loads.inc()
        log.info("bundle is current", extra={"fields": {"bundle": name, "before": old.bundle.id if old else None}})
        if old is None:
            gc.collect()
            gc.freeze()  # later collections skip the objects of the program itself
        del old
        self._load_thread.submit(release_memory)

    def _refuse(self, error: Exception) -> None:
        reason = getattr(error, "reason", "broken")
        pause = self.limits.retry_pauses[min(self._failures, len(self.limits.retry_pauses) - 1)]
        if isinstance(error, Unavailable):
            pause = min(pause, self.limits.max_unavailable_pause)
        self._retry_at = time.monotonic() + pause
        self._failures += 1
        self.last_error = self.public_message(error)
        self._metrics.load_failures.labels(reason).inc()
        log.error("bundle refused", exc_info=error if not isinstance(error, TwoTowerError) else None,
                  extra={"fields": {"reason": reason, "detail": str(error)}})  # fmt: skip


def check_answers(retriever: Retriever) -> None:
    """Recommend for one user by each method of the bundle. Raises RunError if a method returns no item."""
    if len(retriever.user_ids):
        methods: tuple[Method, ...] = (1, 2) if retriever.schema.precomputes else (2,)
        examples = retriever.user_inputs.context.examples()
        columns = retriever.schema.context_columns()
        for method in methods:
            context = {name: examples[name] for name in columns} if method == 2 else {}
            answer = retriever.recommend(Request(retriever.user_ids[0], context=context), 10, method)
            if not answer.items and not answer.truncated:
                raise RunError(f"{retriever.bundle.folder}: method {method} recommends nothing for its first user")


def _loaded_bytes(bundle: Bundle) -> int:
    """Return the bytes of the bundle's files, without the memory-mapped arrays."""
    return sum(e.size for e in bundle.manifest.files if not e.path.startswith(f"{layout.PREPARED}/{layout.ARRAYS}/"))


def lower_priority() -> None:
    """Lower the priority of the calling thread (on Linux each thread has its own nice value)."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, LOADER_NICENESS)
    except OSError:
        log.debug("the priority of the loading thread cannot be lowered")


def available_memory() -> int:
    """Return the bytes that this process may still take: the least of the machine's and of its control groups'."""
    found = [
        free_physical_memory(),
        *(free for folder in control_groups() if (free := free_in_group(folder)) is not None),
    ]
    return min(found)


def control_groups(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Return the folders of the process's control groups, version 1 or 2, up to the root: each can have a limit."""
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
    """Return the bytes that a control group may still take; None without a limit."""
    for limit, usage, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):
            allowed = (group / limit).read_text().strip()
            if allowed != "max":
                # The kernel reclaims inactive pages of files when memory is requested.
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                return int(allowed) - int((group / usage).read_text()) + int(stat.get(inactive, 0))
    return None


def free_memory(limit: int, workers: int, available: Callable[[], int] = available_memory) -> int:
    """Return the bytes that a bundle may take, if all workers load it at about the same time."""
    return min(available() // workers, limit - memory_in_use()[1] if limit else 1 << 62)


def check_memory(size: int, limit: int, workers: int, available: Callable[[], int] = available_memory) -> None:
    """Raise BundleError if a bundle with files of `size` bytes does not fit into the free memory.

    `limit`: bytes of this process; 0: none. `workers`: processes that load it at about the same time.
    """
    need, free = int(size * MEMORY_PER_BYTE), free_memory(limit, workers, available)
    if need > free:
        raise BundleError(
            f"the bundle needs up to {need / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; it is not loaded", "memory"
        )


def release_memory() -> None:
    """Return freed memory to the operating system, where the C library can.

    The old bundle has no reference cycle, so it is freed with its last request, without `gc.collect`, which would block
    the process."""
    if sys.platform != "win32":  # which has no library of all symbols
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
