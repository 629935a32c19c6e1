"""A clock for tests of code that takes one."""

from __future__ import annotations


class Clock:
    """A clock in seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
