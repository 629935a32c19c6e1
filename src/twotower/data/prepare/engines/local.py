"""Engine `local`: polars, for logs that fit in memory."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from twotower.data.prepare.engines.engine import Engine
from twotower.files.readers import write_parquet


class Local(Engine):
    """Sorts the whole log in memory, once."""

    name = "local"

    @cached_property
    def _sorted(self) -> pl.DataFrame:
        log = pl.concat([pl.read_parquet(path, glob=False) for path in self.pieces]).sort("user", *self.order)
        return log if self.keeps_repeats else log.unique(["user", "item"], keep="last", maintain_order=True)

    def write(self, users: tuple[int, int], to: Path) -> None:
        """Write a slice of the sorted log."""
        start, end = np.searchsorted(self._sorted["user"].to_numpy(), users)
        write_parquet(self._sorted[int(start) : int(end)], to, compression="lz4")
