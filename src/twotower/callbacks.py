"""What a run tells while it goes."""

from __future__ import annotations

from typing import Any


class Watcher:
    """Hears of lines, steps and epochs; this one is silent."""

    def say(self, line: str) -> None:
        """A line for a person."""

    def step(self, done: int, total: int, loss: float) -> None:
        """After each step of an epoch."""

    def epoch(self, history: list[dict[str, Any]]) -> None:
        """After each epoch; the last entry is new."""
