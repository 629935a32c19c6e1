"""Memory that a call takes, in a process of its own."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path


def held() -> float:
    """Return the MB of this process that the system cannot take back."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def most_held(work: Callable[[], object]) -> float:
    """Return the most MB that a call takes beyond those of before, looked at every 2 milliseconds."""
    before, most, done = held(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], held() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return most[0]
