"""Rows of one side with their encoded columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from twotower.arrays.ragged import Column
from twotower.arrays.types import Codes, Ints, WholeNumbers
from twotower.data.versions import Versions
from twotower.features.encoders import Encoders
from twotower.features.feature import HistorySpec


@dataclass(frozen=True)
class Side:
    """All rows of one side: `frame` holds ids and raw features, `columns` the encoded features that the tower reads.

    Where there are versions, these are the newest features of each row."""

    frame: pl.DataFrame
    columns: dict[str, Column]
    id_column: str
    versions: Versions | None = None
    owners: Ints | None = None
    """Row of the histories in `columns` that each row reads, for a side of `by_version`. None: its own."""

    def __len__(self) -> int:
        return self.frame.height

    @property
    def ids(self) -> pl.Series:
        return self.frame[self.id_column]

    def codes(self, history: HistorySpec, encoders: Encoders) -> Codes:
        """Return the code of each row of `by_version()` in a history of the other side."""
        if history.name not in self._codes:
            self._codes[history.name] = encoders.history_codes(history, self.by_version().frame)
        return self._codes[history.name]

    @cached_property
    def _codes(self) -> dict[str, Codes]:
        return {}

    @property
    def versioned(self) -> bool:
        """True if rows have versions."""
        return self.versions is not None

    def at(self, rows: WholeNumbers, times: Ints) -> Ints:
        """Return the row of `by_version` (n,) that holds for each of some rows (n,) at its time (n,)."""
        return rows.astype(np.int64) if self.versions is None else self.versions.at(rows, times)

    def frame_at(self, times: Ints) -> pl.DataFrame:
        """Return the table with the version that holds for each row at its time (n,); columns that versions lack are
        those of the newest rows."""
        assert self.versions is not None
        held = self.versions.frame[self.versions.at(np.arange(len(self)), times)]
        return held.with_columns(self.frame[name] for name in self.frame.columns if name not in held.columns)

    def by_version(self) -> Side:
        """Return the side with a row for each version; the same side if it has none."""
        if self.versions is None:
            return self
        histories = {name: c for name, c in self.columns.items() if name not in self.versions.columns}
        columns = self.versions.columns | histories
        return Side(self.versions.frame, columns, self.id_column, owners=self.versions.owners)
