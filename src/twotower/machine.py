"""Cores and memory of this machine and process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def memory_in_use() -> tuple[int, int]:
    """Return the bytes of this process's address space and of its resident memory. Raises OSError without /proc."""
    space, resident = Path("/proc/self/statm").read_text().split()[:2]
    return int(space) * resource.getpagesize(), int(resident) * resource.getpagesize()


def physical_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def boot_id() -> str:
    """Return an id of this start of this host: another one after a restart, or where the system tells none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = ""
    with suppress(OSError):  # macOS
        found = subprocess.run(["sysctl", "-n", "kern.boottime"], capture_output=True, text=True, check=False).stdout
    return found.strip() or str(uuid.uuid4())


def available_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Return the value of OMP_NUM_THREADS if it is set, else the number of cores this process may use."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdigit() and int(threads) else available_cores()
