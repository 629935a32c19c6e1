"""Engine `local`: this process, one shard after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twotower.engines.engine import Job, JobEngine, Made, Shard


class LocalEngine(JobEngine):
    """Makes the shards in this process, whose threads the caller has set."""

    name = "local"
    is_remote = False

    def __init__(self, address: str = "", threads: int = 0) -> None:
        """Create the engine. It uses no address, and the threads of the process."""

    def run(
        self, job: Job[Shard, Made], shards: Sequence[Shard], done: Callable[[Made], None], modules: Sequence[str] = ()
    ) -> None:
        """Make the shards in their order."""
        make = job()
        for shard in shards:
            done(make(shard))
