"""Threads of the verbs that compute."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from twotower.cli import training

CODE = """
import sys
from twotower.cli.app import run_command
code = run_command(sys.argv[1:])
import polars, torch
print(code, polars.thread_pool_size(), torch.get_num_threads())
"""


@pytest.mark.parametrize("verb", [("train", "no.toml", "--run", "run"), ("embed", "run", "no.csv", "--out", "out")])
def test_the_threads_of_a_verb_are_those_of_polars_and_torch(verb: tuple[str, ...]) -> None:
    """In a new interpreter, because polars reads its number once."""
    env = {name: value for name, value in os.environ.items() if name != "POLARS_MAX_THREADS"}
    command = [sys.executable, "-c", CODE, *verb, "--threads", "3"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["2", "3", "3"], done.stderr


def test_ranks_share_the_cores_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "available_cores", lambda: 8)
    monkeypatch.setenv("POLARS_MAX_THREADS", "")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    try:
        assert training.set_threads(0, ranks=1) == 0
        assert torch.get_num_threads() == before
        assert training.set_threads(0, ranks=4) == torch.get_num_threads() == 2
        assert training.set_threads(0, ranks=16) == 1
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert training.set_threads(0, ranks=16) == 4
        assert training.set_threads(3, ranks=16) == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


WAITS = """
import os, sys
from twotower.__main__ import main
try:
    main()
except SystemExit as end:
    print(end.code, os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("given", "waits"),
    [
        ({}, ["None", "10000"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"]),
        ({"GOMP_SPINCOUNT": "1000"}, ["None", "1000"]),
    ],
)
def test_threads_that_wait_sleep_soon_unless_the_environment_says_how(given: dict[str, str], waits: list[str]) -> None:
    """In a new interpreter, because torch reads it once: it is set before torch is there."""
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", WAITS, "--version"]
    done = subprocess.run(command, env=env | given, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[2:] == ["0", *waits, "False"]
