"""Cores and memory of this machine and process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import psutil


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process in MB (10^6 bytes), or the present one if the peak is unknown."""
    try:
        import resource
    except ImportError:  # Windows
        info = psutil.Process().memory_info()
        return float(getattr(info, "peak_wset", info.rss)) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def memory_in_use() -> tuple[int, int]:
    """Return the bytes of this process's address space and of its resident memory."""
    info = psutil.Process().memory_info()
    return info.vms, info.rss


def physical_memory() -> int:
    """Return the bytes of this machine's memory."""
    return psutil.virtual_memory().total


def free_physical_memory() -> int:
    """Return the bytes of this machine's memory that are available without swapping."""
    return psutil.virtual_memory().available


def boot_id() -> str:
    """Return an id of this start of the host, another one after a restart; a random one if the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = ""
    with suppress(OSError):  # macOS
        found = subprocess.run(["sysctl", "-n", "kern.boottime"], capture_output=True, text=True, check=False).stdout
    return found.strip() or str(uuid.uuid4())


SPINS = 10_000
"""Rounds that a thread of OpenMP spins before it sleeps (docs/log.md)."""

KEPT_BLOCK_BYTES, KEPT_BYTES = 1 << 28, 1 << 30
"""Largest freed block that a training keeps for reuse, and the freed memory that it keeps in all."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""


def limit_spinning() -> None:
    """Let threads of OpenMP (GNU) sleep after `SPINS` rounds, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT is set.

    By default they spin for longer: with other work on the same cores a step takes tens of times as long. Call before
    torch is loaded, which reads the variable once."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def keep_freed_memory() -> None:
    """Let the GNU C library keep freed blocks of up to `KEPT_BLOCK_BYTES`, `KEPT_BYTES` in all.

    It does nothing on other systems, or if GLIBC_TUNABLES or a variable MALLOC_… is set. By default large blocks go
    back to the kernel, which fills the pages of a new block with zeros: up to a quarter of the time of a training
    (docs/log.md). Only for commands that end with their work: a service would keep memory that it needs once."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def available_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Return the value of OMP_NUM_THREADS if it is set, else the number of cores this process may use."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdigit() and int(threads) else available_cores()
