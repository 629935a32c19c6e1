"""Cores are those of the process, and OMP_NUM_THREADS sets the threads."""

from __future__ import annotations

import pytest

from twotower.machine import available_cores, default_threads


def test_threads_are_those_of_the_environment_else_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores() >= 1
    for given, threads in (("3", 3), ("0", available_cores()), ("many", available_cores())):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert default_threads() == threads
