"""Engine: sorts the pieces of a log into buckets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

ROW_BYTES = 150
"""Memory that an interaction takes while it is sorted or written, in bytes."""


class Engine(AbstractContextManager["Engine"], ABC):
    """Sorts the interactions of consecutive users, and keeps the latest of each pair of user and item, or all.

    A piece has the columns of a bucket, and is sorted by user. All engines write the same rows in the same order."""

    name: str

    def __init__(
        self, pieces: Sequence[Path], timed: bool, keeps_repeats: bool, memory: int, threads: int, work: Path
    ) -> None:
        """`pieces` are the files of the log, `timed` is true if they have times, `keeps_repeats` if repeated pairs are
        kept; `memory` is in bytes, and `work` an empty folder for temporary files."""
        self.pieces, self.keeps_repeats, self.memory, self.threads, self.work = (
            pieces,
            keeps_repeats,
            memory,
            threads,
            work,
        )
        self.order = ("time", "row") if timed else ("row",)

    @abstractmethod
    def write(self, users: tuple[int, int], to: Path) -> None:
        """Write the bucket of the users from row users[0] to users[1] - 1 to a Parquet file.

        Raises ConfigError if memory is too small, OSError if the file cannot be written."""

    def __exit__(self, *error: object) -> None:
        """Release what the engine holds."""
