"""A function of untrusted files in a child process with limits of time and memory. A hostile file ends the child."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from pydantic import JsonValue

from twotower.errors import TwoTowerError
from twotower.machine import memory_in_use

_BOOTSTRAP = "from twotower.limited_process import main; main()"


@dataclass(frozen=True)
class WorkResult:
    """Result of the function on one file: its `value`, or the `error` that refuses the file."""

    value: str = ""
    error: str = ""


def run_limited(
    function: str,
    paths: Sequence[Path],
    *,
    timeout: float,
    memory: int,
    cpu_seconds: float | None = None,
    options: Mapping[str, JsonValue] | None = None,
) -> dict[Path, WorkResult]:
    """Run `function` ("module:name", Path -> str) on each file in a child process, with `options` as keyword arguments.

    When a child dies, its file gets an error and another child takes the rest. A child has `timeout` seconds of wall
    time, `cpu_seconds` of CPU time (None: `timeout`), and `memory` bytes of address space beyond its imports."""
    cpu_seconds = math.ceil(timeout if cpu_seconds is None else cpu_seconds)
    results: dict[Path, WorkResult] = {}
    while rest := [path for path in paths if path not in results]:
        limits = map(str, (math.ceil(timeout) + 1, cpu_seconds, memory))
        command = [
            sys.executable, "-P", "-c", _BOOTSTRAP, function, *limits, json.dumps(options or {}), *map(str, rest),
        ]  # fmt: skip
        source = str(Path(__file__).parents[1])
        python_path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": python_path,
        }  # fmt: skip
        reason = "its inspection returned nothing"
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout, env=environment, check=False)
            out = done.stdout
            if done.returncode:
                reason = f"loading it ended a process with code {done.returncode}"
                if b"bad_alloc" in done.stderr:
                    reason = _memory_message(memory)
                elif done.returncode == -getattr(signal, "SIGXCPU", 0):
                    reason = f"loading it takes more than {cpu_seconds} seconds"
        except subprocess.TimeoutExpired as e:
            out, reason = e.stdout or b"", f"loading it takes more than {timeout:g} seconds"
        answers = [WorkResult(*json.loads(line)) for line in out.splitlines() if line.startswith(b'["')]
        results |= dict(zip(rest, answers, strict=False))
        if len(answers) < len(rest):
            results[rest[len(answers)]] = WorkResult(error=reason)
    return results


def main() -> None:
    """Run the child process: print one line of JSON per file."""
    name, timeout, cpu_seconds, memory, options, *paths = sys.argv[1:]
    if hasattr(os, "nice"):
        os.nice(max(0, 9 - os.nice(0)))  # a low priority, but not the lowest: the parent may hold a lock while it waits
    module, attribute = name.split(":")
    function = partial(getattr(import_module(module), attribute), **json.loads(options))
    _limit_process(int(timeout), int(cpu_seconds), int(memory))
    for path in paths:
        result = WorkResult()
        try:
            result = WorkResult(value=function(Path(path)))
        except MemoryError:
            result = WorkResult(error=_memory_message(int(memory)))
        except TwoTowerError as e:
            result = WorkResult(error=str(e))
        except Exception as e:
            result = WorkResult(error=f"{type(e).__name__}: {e}")
        print(json.dumps([result.value, result.error]), flush=True)


def _limit_process(timeout: int, cpu_seconds: int, memory: int) -> None:
    """Set kernel limits, which also hold when the parent has died: `timeout` and `cpu_seconds` in seconds, `memory` in
    bytes beyond the present ones."""
    if hasattr(signal, "alarm"):
        signal.alarm(timeout)
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (end := math.ceil(time.process_time()) + cpu_seconds, end + 5))
        resource.setrlimit(resource.RLIMIT_AS, (memory_in_use()[0] + memory,) * 2)


def _memory_message(memory: int) -> str:
    return f"loading it takes more than {memory / 1e6:,.0f} MB"
