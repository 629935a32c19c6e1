"""Cores are those of the process, and OMP_NUM_THREADS sets the threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from twotower.machine import available_cores, default_threads, memory_in_use, peak_memory_mb, physical_memory


def test_threads_are_those_of_the_environment_else_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores() >= 1
    for given, threads in (("3", 3), ("0", available_cores()), ("many", available_cores())):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert default_threads() == threads


def test_a_process_uses_less_memory_than_it_may_address_and_the_machine_has() -> None:
    space, resident = memory_in_use()
    assert 1e6 < resident <= min(space, physical_memory(), peak_memory_mb() * 1e6 + 2**24)


_ALLOCATES = """
import resource, sys
import numpy as np
from twotower.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    np.ones(6_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def test_kept_memory_needs_no_new_pages_unless_the_environment_says_otherwise() -> None:
    def faults(what: str, **more: str) -> int:
        unset = {
            name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
        }
        command = [sys.executable, "-c", _ALLOCATES, what]
        return int(subprocess.run(command, env=unset | more, check=True, capture_output=True, timeout=120).stdout)

    pages = 20 * 6_000_000 * 8 // 2**21  # huge ones, the fewest
    kept = faults("keep")
    for default in (faults("default"), faults("keep", MALLOC_ARENA_MAX="2")):
        assert default - kept > 0.8 * pages
