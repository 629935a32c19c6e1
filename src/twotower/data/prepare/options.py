"""Options of a preparation: engine, memory and threads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from twotower import files
from twotower.engines import open_engine
from twotower.engines.engine import JobEngine, LocalEngine
from twotower.errors import ConfigError
from twotower.files.readers import read_json
from twotower.files.resumable import make_once
from twotower.machine import available_cores

SIDE_BLOCK_ROWS = 2**18
"""Users or items that are encoded at once."""
ROW_BYTES = 220
"""Memory that an interaction takes while it is sorted or written, in bytes."""
PIECE_ROW_BYTES = 400
"""Memory that an interaction takes while its ids are looked up, in bytes."""


@dataclass(frozen=True)
class PrepareOptions:
    """Options of a preparation. No byte of a prepared dataset depends on them."""

    engine: str = LocalEngine.name
    """Name or address of the engine of the processes that sort: `local` or `ray`."""
    memory: int = 10**9
    """Bytes for interactions, in addition to the tables of users and items."""
    threads: int = 0
    """Threads. 0: the cores of this machine."""
    piece_rows: int = 0
    """Most interactions of a piece. 0: by memory."""
    bucket_rows: int = 0
    """Approximate number of interactions of a bucket. 0: by memory."""
    side_block_rows: int = SIDE_BLOCK_ROWS
    """Users or items that are encoded at once."""

    def resolved(self) -> PrepareOptions:
        """Return the options with numbers for zeros. Raises ConfigError."""
        if self.memory < 10**6:
            raise ConfigError(f"`memory` is {self.memory:,} bytes, expected at least 1 MB")
        for name in ("threads", "piece_rows", "bucket_rows"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"`{name}` is {value}, expected a number, or 0 to choose it")
        threads = self.threads or available_cores()
        return replace(
            self,
            threads=threads,
            piece_rows=self.piece_rows or min(2**21, max(1, self.memory // threads // PIECE_ROW_BYTES)),
            bucket_rows=self.bucket_rows or max(1, self.memory // threads // ROW_BYTES),
        )

    def job_engine(self) -> JobEngine:
        """Return what runs the sorting: this process, or Ray. Raises ConfigError if it cannot."""
        return open_engine(self.engine, self.threads)

    def kept(self, path: Path) -> PrepareOptions:
        """Return the options with the numbers of rows of an earlier call, which its files have; write them if it is the
        first call."""
        sizes = {"piece_rows": self.piece_rows, "bucket_rows": self.bucket_rows}
        make_once(path, lambda to: files.write_json(to, sizes))
        found = read_json(path)
        assert isinstance(found, dict)
        return replace(self, **found)

    def check_memory(self, rows: int, what: str) -> None:
        """Raise ConfigError if `rows` interactions, which are needed at once, take more memory; `what` has them."""
        if rows * ROW_BYTES > self.memory:
            raise ConfigError(
                f"{what} has {rows:,} interactions, which take about {rows * ROW_BYTES / 1e6:,.0f} MB; `memory` is "
                f"{self.memory / 1e6:,.0f} MB, give more"
            )
