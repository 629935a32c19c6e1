"""Hooks that end a process at a named point, and the command line of twotower with them.

python tests/kill_points.py step:3 train CONFIG -r RUN          killed after step 3, whatever its rank
python tests/kill_points.py step:3:1:hang train CONFIG -r RUN   rank 1 stands still (SIGSTOP) after step 3
python tests/kill_points.py shard:2 embed RUN TABLE --out OUT   killed in the middle of shard 2
python tests/kill_points.py 7 publish RUN --store STORE         killed at the seventh point
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twotower import files


class KillPoint(files.Hooks):
    """Kills its process, or makes it stand still once, at a point by name or by number from 1."""

    def __init__(self, where: str) -> None:
        self.where = where.removesuffix(":hang")
        self.signal = signal.SIGSTOP if where.endswith(":hang") else signal.SIGKILL
        self.passed, self._found = 0, itertools.count()

    def point(self, name: str) -> None:
        self.passed += 1
        found = self.where in (name, str(self.passed)) or name.startswith(f"{self.where}:")
        if found and not next(self._found):  # of several threads, the first
            os.kill(os.getpid(), self.signal)


class At:
    """Hooks that act at a named point."""

    def __init__(self, name: str, act: Callable[[], object]) -> None:
        self.name, self.act = name, act

    def point(self, name: str) -> None:
        if name == self.name:
            self.act()


def install(where: str) -> None:
    """End this process at a point."""
    files.hooks = KillPoint(where)


def random_points(act: Callable[[], object], n: int = 10) -> list[int]:
    """Run `act` and return the numbers of n random points that it passes, ascending."""
    before, counted = files.hooks, KillPoint("never")
    files.hooks = counted
    try:
        act()
    finally:
        files.hooks = before
    return sorted(random.Random(0).sample(range(1, counted.passed + 1), n))


def in_a_fork(act: Callable[[], Any], point: int | str | None = None, after: float | None = None) -> tuple[bool, Any]:
    """Run `act` in a fork that is killed at a point or after a time: whether it came to its end, and what it returned,
    as JSON.

    The process must have no threads but its own, as those that `preloaded.start_in` starts: a fork has the objects of a
    library's threads without the threads, and ends where it destroys one."""
    ends = os.pipe()
    pid = os.fork()
    if pid == 0:
        if point is not None:
            install(str(point))
        try:
            os.write(ends[1], json.dumps(act(), default=str).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(ends[1])
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(ends[0], "rb") as f:
        told = f.read()
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return (False, None) if status else (True, json.loads(told))


def program(where: str) -> list[str]:
    """Arguments of Python that run twotower's command line until a point."""
    return [str(Path(__file__).resolve()), where]


if __name__ == "__main__":
    install(sys.argv.pop(1))
    from twotower.__main__ import main

    main()
