"""Engine `duckdb`: DuckDB, which sorts on disk within a limit of memory. The extra `prepare` installs it."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from twotower.data.prepare.engines.engine import Engine
from twotower.errors import ConfigError, first_line, install_command

MAX_BYTES = 2**50
"""Largest limit of memory that DuckDB is given."""

ROWS_OF_USERS = """
SELECT * FROM read_parquet($pieces, hive_partitioning = false) WHERE "user" >= $first AND "user" < $end
{latest} ORDER BY "user", {order}
"""
LATEST_OF_EACH_PAIR = """QUALIFY row_number() OVER (PARTITION BY "user", item ORDER BY {falling}) = 1"""


class DuckDb(Engine):
    """Sorts one bucket at a time; what exceeds the memory is spilled to the work folder."""

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
