"""Engines that sort the pieces of a log into buckets."""

from __future__ import annotations

import glob
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl

from twotower.engines.ray import RayEngine
from twotower.errors import ConfigError, first_line, install_command
from twotower.files.readers import write_parquet

ROW_BYTES = 150
"""Memory that an interaction takes while it is sorted or written, in bytes."""
MAX_BYTES = 2**50
"""Largest limit of memory that DuckDB is given."""

ROWS_OF_USERS = """
SELECT * FROM read_parquet($pieces, hive_partitioning = false) WHERE "user" >= $first AND "user" < $end
{latest} ORDER BY "user", {order}
"""
LATEST_OF_EACH_PAIR = """QUALIFY row_number() OVER (PARTITION BY "user", item ORDER BY {falling}) = 1"""


class Engine(AbstractContextManager["Engine"], ABC):
    """Sorts the interactions of consecutive users, and keeps the latest of each pair of user and item, or all.

    A piece has the columns of a bucket, and is sorted by user. All engines write the same rows in the same order."""

    name: str

    def __init__(
        self, pieces: Sequence[Path], timed: bool, keeps_repeats: bool, memory: int, threads: int, work: Path
    ) -> None:
        """`pieces` are the files of the log, `timed` is true if they have times, `keeps_repeats` if repeated pairs are
        kept; `memory` is in bytes, and `work` an empty folder for temporary files."""
        self.pieces, self.keeps_repeats, self.memory = pieces, keeps_repeats, memory
        self.order = ("time", "row") if timed else ("row",)

    @abstractmethod
    def write(self, users: tuple[int, int], to: Path) -> None:
        """Write the bucket of the users from row users[0] to users[1] - 1 to a Parquet file.

        Raises ConfigError if memory is too small, OSError if the file cannot be written."""

    def __exit__(self, *error: object) -> None:
        """Release what the engine holds."""


class Local(Engine):
    """Polars, which sorts the whole log in memory, once."""

    name = "local"

    @cached_property
    def _sorted(self) -> pl.DataFrame:
        log = pl.concat([pl.read_parquet(path, glob=False) for path in self.pieces]).sort("user", *self.order)
        return log if self.keeps_repeats else log.unique(["user", "item"], keep="last", maintain_order=True)

    def write(self, users: tuple[int, int], to: Path) -> None:
        """Write a slice of the sorted log."""
        start, end = np.searchsorted(self._sorted["user"].to_numpy(), users)
        write_parquet(self._sorted[int(start) : int(end)], to, compression="lz4")


class DuckDb(Engine):
    """DuckDB, which sorts one bucket at a time; what exceeds the memory is spilled to the work folder. The extra
    `prepare` installs it."""

    name = "duckdb"

    def __init__(
        self, pieces: Sequence[Path], timed: bool, keeps_repeats: bool, memory: int, threads: int, work: Path
    ) -> None:
        super().__init__(pieces, timed, keeps_repeats, memory, threads, work)
        try:
            import duckdb
        except ImportError:
            raise ConfigError(
                f"engine 'duckdb' is not installed; choose `engine='local'`, or {install_command('prepare')}"
            ) from None
        self._errors = duckdb
        self._database = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": f"{min(memory, MAX_BYTES)}B", "threads": threads, "temp_directory": str(work),
                "autoinstall_known_extensions": False, "autoload_known_extensions": False,
            },
        )  # fmt: skip

    def write(self, users: tuple[int, int], to: Path) -> None:
        """Write the result of a query over the pieces, of which DuckDB reads the row groups of these users."""
        falling = ", ".join(f'"{c}" DESC' for c in self.order)
        latest = "" if self.keeps_repeats else LATEST_OF_EACH_PAIR.format(falling=falling)
        query = ROWS_OF_USERS.format(latest=latest, order=", ".join(f'"{c}"' for c in self.order))
        pieces = [glob.escape(str(path)) for path in self.pieces]
        try:
            found = self._database.sql(query, params={"pieces": pieces, "first": users[0], "end": users[1]})
            found.write_parquet(str(to), compression="lz4")
        except self._errors.OutOfMemoryException as e:
            raise ConfigError(
                f"`memory` of {self.memory:,} bytes is too small to sort a bucket ({first_line(e)}); give more"
            ) from None
        except self._errors.IOException as e:
            raise OSError(first_line(e)) from e

    def __exit__(self, *error: object) -> None:
        self._database.close()


ENGINES: Mapping[str, type[Engine]] = {engine.name: engine for engine in (Local, DuckDb)}
"""Engines by name."""


def is_ray(name: str) -> bool:
    """Return True for the name or an address of the engine of jobs that sorts buckets in other processes."""
    return name.partition("://")[0] == RayEngine.name


def choose_engine(name: str, rows: int, memory: int) -> type[Engine]:
    """Return the engine of a name; "auto" is `local` for a log of `rows` interactions that fits in `memory` bytes, else
    `duckdb`, which the processes of "ray" and of its addresses use too. Raises ConfigError for an unknown name, or if
    the log fits in no engine that is installed."""
    needed = rows * ROW_BYTES
    if name == "auto":
        name = "local" if needed <= memory else "duckdb"
        if name == "duckdb" and find_spec("duckdb") is None:
            raise ConfigError(
                f"{rows:,} interactions take about {needed / 1e6:,.0f} MB in memory, `memory` is {memory / 1e6:,.0f} "
                f"MB; raise `memory`, or let duckdb sort them on disk: {install_command('prepare')}"
            )
    name = "duckdb" if is_ray(name) else name
    if name not in ENGINES:
        raise ConfigError(f"engine '{name}': allowed are auto, {', '.join(ENGINES)}, ray, ray://HOST:PORT")
    if name == "local" and needed > memory:
        raise ConfigError(
            f"engine 'local' sorts in memory: {rows:,} interactions take about {needed / 1e6:,.0f} MB, `memory` is "
            f"{memory / 1e6:,.0f} MB; choose `engine='duckdb'`, or raise `memory`"
        )
    return ENGINES[name]
