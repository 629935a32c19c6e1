"""Memory that a process may still take: the machine's, its control groups', its own limit."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from twotower.errors import BundleError
from twotower.machine import free_physical_memory, memory_in_use

MEMORY_PER_BYTE = 1.5
"""Bytes of memory for each byte of a bundle's files while it is loaded, at most."""


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
