"""Job over a table larger than memory, whose result is a folder of shards: by an engine, and continued by a later
call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import polars as pl

from twotower.data.reading.table_paths import absolute, result_place, table_source
from twotower.data.reading.table_shards import ShardedTable, TableShard, check_apart
from twotower.engines import open_engine
from twotower.errors import ConfigError
from twotower.files.places import JsonObject
from twotower.files.sharded_result import MadeShard, ShardedResult, shard_name
from twotower.progress import SECONDS_BETWEEN_LINES, JobProgress
from twotower.version import __version__

T = TypeVar("T")
Rows: TypeAlias = tuple[pl.DataFrame, JsonObject]
"""Rows of a shard of the result, and its facts."""

log = logging.getLogger(__name__)


class ShardedJob:
    """The table, the place, the engine and the size of the shards of a call."""

    def __init__(
        self, source: Path | str, out: Path | str, rows: str, engine: str, threads: int, shard_rows: int
    ) -> None:
        """`rows` is what the rows of the table are called: "users". Raises ConfigError, and RunError if the place is in
        the table or holds a file of it."""
        for name, given, least in (("shard_rows", shard_rows, 1), ("threads", threads, 0)):
            if given < least:
                raise ConfigError(f"`{name}` is {given}, expected at least {least}")
        self.engine, self.rows, self.shard_rows = open_engine(engine, threads), rows, shard_rows
        self.source, self.place = table_source(source), result_place(out)
        check_apart(self.source, self.place / shard_name(0), rows)
        if self.engine.is_remote:
            self.source, self.place = absolute(self.source), absolute(self.place)

    def run(
        self, result: ShardedResult, table: ShardedTable, load: Callable[[], T],
        make: Callable[[T, TableShard], Rows], about: Callable[[list[MadeShard]], JsonObject], done: str,
        overwrite: bool, modules: Sequence[str], seconds: float = SECONDS_BETWEEN_LINES,
    ) -> list[MadeShard]:  # fmt: skip
        """Make the missing shards by `make(load(), shard)`, and the list of all, with the content `about` them.

        `done` follows the number of rows in a line of progress, "answered"; lines are `seconds` apart. Raises DataError
        if the table changes meanwhile, RunError."""
        made, shards = list[MadeShard](), table.shards(self.shard_rows)
        progress = JobProgress(log, f"{self.rows} {done}", table.rows, seconds=seconds)

        def add(shard: MadeShard) -> None:
            made.append(shard)
            if shard.is_new:
                progress.advance(shards[shard.number].rows, f", shard {shard.number + 1} of {len(shards)}")
            else:
                progress.skip(shards[shard.number].rows)

        with result.writing(overwrite):
            self.engine.run(partial(_job, load, make, result), shards, add, modules)
            made.sort()
            facts = {"twotower": __version__} | about(made)
            table.check_unchanged()
            result.finish(made, facts)
        return made


def _job(
    load: Callable[[], T], make: Callable[[T, TableShard], Rows], result: ShardedResult
) -> Callable[[TableShard], MadeShard]:
    """Return the function that makes a shard in this process. Raises RunError if it sees another folder or run than the
    call."""
    result.look()
    loaded = load()
    return lambda shard: result.make(shard.number, lambda: make(loaded, shard))
