"""Files of others, looked at in a process of its own: what a hostile file ends is that process, within a time and a memory."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from twotower.errors import TwoTowerError

_BOOTSTRAP = "from twotower.limited_process import main; main()"


@dataclass(frozen=True)
class WorkResult:
    """The result of a look at a file: what was `found`, or what is `wrong`."""

    value: str = ""
    error: str = ""


def run_limited(
    work: str, paths: Sequence[Path], *, timeout: float, memory: int, computing: float | None = None
) -> dict[Path, WorkResult]:
    """Run the function `work` ("module:name") on each file, in a process of its own.

    A process that dies is followed by another for the rest. One has `timeout` seconds for all it does, of which it may
    compute `computing`, and `memory` bytes of address space beyond what its imports take.
    """
    computing = math.ceil(timeout if computing is None else computing)
    seen: dict[Path, WorkResult] = {}
    while rest := [path for path in paths if path not in seen]:
        limits = map(str, (math.ceil(timeout) + 1, computing, memory))
        command = [sys.executable, "-P", "-c", _BOOTSTRAP, work, *limits, *map(str, rest)]
        source = str(Path(__file__).parents[1])
        there = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": there,
        }  # fmt: skip
        reason = "gives no answer"
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
            )
            out = done.stdout
            if done.returncode:
                reason = f"loading it ended a process with code {done.returncode}"
                if "bad_alloc" in done.stderr:
                    reason = _memory_message(memory)
                elif done.returncode == -getattr(signal, "SIGXCPU", 0):
                    reason = f"loading it takes more than {computing} seconds"
        except subprocess.TimeoutExpired as e:
            out, reason = (e.stdout or b"").decode(), f"loading it takes more than {timeout:g} seconds"
        answers = [WorkResult(*json.loads(line)) for line in out.splitlines() if line.startswith('["')]
        seen |= dict(zip(rest, answers, strict=False))
        if len(answers) < len(rest):
            seen[rest[len(answers)]] = WorkResult(error=reason)
    return seen


def main() -> None:
    """The process: a line of JSON for each file."""
    name, timeout, computing, memory, *paths = sys.argv[1:]
    os.nice(max(0, 9 - os.nice(0)))  # it only looks; but whoever waits for it may hold a lock that others wait for
    module, function = name.split(":")
    work = getattr(import_module(module), function)
    _limit_process(int(timeout), int(computing), int(memory))
    for path in paths:
        result = WorkResult()
        try:
            result = WorkResult(value=work(Path(path)))
        except MemoryError:
            result = WorkResult(error=_memory_message(int(memory)))
        except TwoTowerError as e:
            result = WorkResult(error=str(e))
        except Exception as e:
            result = WorkResult(error=f"{type(e).__name__}: {e}")
        print(json.dumps([result.value, result.error]), flush=True)


def _limit_process(timeout: int, computing: int, memory: int) -> None:
    """Let the kernel end this process, also when nobody waits for it any more, and refuse it more than `memory` bytes."""
    if hasattr(signal, "alarm"):
        signal.alarm(timeout)
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (end := math.ceil(time.process_time()) + computing, end + 5))
        now = 1 << 30
        with suppress(OSError):
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory,) * 2)


def _memory_message(memory: int) -> str:
    return f"loading it takes more than {memory / 1e6:,.0f} MB"
