"""Engine of a job: calls a function for each shard, in this process or in others; engine `local` is this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias, TypeVar

Shard = TypeVar("Shard")
Made = TypeVar("Made")
Job: TypeAlias = Callable[[], Callable[[Shard], Made]]
"""Function that loads what the shards need, once in each process, and returns the function that makes a shard.

For a remote engine it can be pickled."""


class JobEngine(ABC):
    """Runs jobs. A shard may be made twice, if a process is lost, so a job puts files in place by renaming."""

    name: ClassVar[str]
    is_remote: ClassVar[bool]
    """True if other processes make the shards. A job then uses absolute paths."""
    processes: int = 1
    """Number of processes that share the memory of a machine, if known."""

    @abstractmethod
    def run(
        self, job: Job[Shard, Made], shards: Sequence[Shard], done: Callable[[Made], None], modules: Sequence[str] = ()
    ) -> None:
        """Make all shards, and call `done` in this process with each result, in the order of completion.

        Other processes import `modules` first. Raises the errors of the job, and Unavailable if the engine is lost."""


class LocalEngine(JobEngine):
    """Makes the shards in this process, whose threads the caller has set."""

    name = "local"
    is_remote = False

    def run(
        self, job: Job[Shard, Made], shards: Sequence[Shard], done: Callable[[Made], None], modules: Sequence[str] = ()
    ) -> None:
        """Make the shards in their order."""
        make = job()
        for shard in shards:
            done(make(shard))
