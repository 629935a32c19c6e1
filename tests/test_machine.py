"""Cores are those of the process, and OMP_NUM_THREADS sets the threads."""

from __future__ import annotations

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
