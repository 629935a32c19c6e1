"""Versions of the users and items of buckets: their tables, and the interactions that see each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from twotower.arrays.types import Ints, WholeNumbers
from twotower.data import interaction_columns, times
from twotower.data.interaction_columns import Columns
from twotower.data.prepare.bucket_reader import BucketReader
from twotower.data.prepare.bucket_splits import BucketSplits
from twotower.data.splits import DROPPED, TRAIN
from twotower.data.tables import side_columns
from twotower.data.unknown_ids import rows_of_ids
from twotower.data.versions import Versions, check_first_versions, no_versions, version_tables
from twotower.features.encoders import Encoders
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.files.readers import read_checked, read_parquet


@dataclass(frozen=True)
class PreparedVersions:
    """Versions of the sides that have some, without columns; without `schema.valid_from` there are none."""

    reader: BucketReader
    splits: BucketSplits
    newest: Mapping[SideName, pl.DataFrame]
    """Newest rows of both sides, with their statistics."""
    of: Mapping[SideName, Versions]

    @classmethod
    def open(
        cls, reader: BucketReader, splits: BucketSplits, newest: Mapping[SideName, pl.DataFrame]
    ) -> PreparedVersions:
        """Read the tables of versions of a folder of buckets. Raises RunError for damaged ones, DataError if there is
        none and the schema names their column."""
        schema, given = reader.schema, dict[SideName, pl.DataFrame]()
        for side in SIDES if schema.valid_from else ():
            if (path := reader.buckets.versions(side)).exists():
                given[side] = read_checked(path, partial(_read, schema=schema, side=side, newest=newest[side]))
                reader.check_unchanged(path)
        if schema.valid_from and not given:
            raise no_versions(schema)
        return cls(reader, splits, newest, version_tables(given, newest, schema))

    def frame(self, side: SideName) -> pl.DataFrame:
        """Return the table whose rows `rows` gives: of versions, or of the newest rows."""
        return self.of[side].frame if side in self.of else self.newest[side]

    def rows(self, side: SideName, found: Columns) -> WholeNumbers:
        """Return the row (n,) of `frame` that each interaction of a bucket sees."""
        rows: WholeNumbers = found[side]
        return self.of[side].at(rows, found[interaction_columns.TIME]) if side in self.of else rows

    def fit(self, counts: Mapping[SideName, Ints], context: Mapping[str, tuple[pl.Series, Ints]]) -> Encoders:
        """Return encoders fitted on the versions that training interactions see, and where a side has none on its rows,
        by their `counts`. Raises DataError if a feature refuses missing values, and an interaction is older than its
        row's versions."""
        schema = self.reader.schema
        every, train = self._counts()
        check_first_versions(self.of, every, schema)
        return Encoders.fit(schema, {side: self.frame(side) for side in SIDES}, {**counts, **train}, context)

    def _counts(self) -> tuple[dict[SideName, Ints], dict[SideName, Ints]]:
        """Return the numbers (V,) of all interactions of a part, and of training ones, that see each version."""
        every, train = ({side: np.zeros(len(v), np.int64) for side, v in self.of.items()} for _ in range(2))
        for bucket in self.reader.buckets.facts.buckets if self.of else ():
            found = self.reader.read(bucket, interaction_columns.ITEM, interaction_columns.TIME)
            parts = self.splits.parts(bucket)
            for side, versions in self.of.items():
                seen = self.rows(side, found)
                every[side] += np.bincount(seen[parts != DROPPED], minlength=len(versions))
                train[side] += np.bincount(seen[parts == TRAIN], minlength=len(versions))
        return every, train


def _read(path: Path, schema: Schema, side: SideName, newest: pl.DataFrame) -> pl.DataFrame:
    """Read the versions of a side of buckets. Raises ValueError for another table. A reader for `read_checked`."""
    table, key, time = read_parquet(path), schema.id_column(side), times.TIME
    for name in (*side_columns(side, schema), time):
        if name not in table.columns:
            raise ValueError(f"column '{name}' is missing")
    if table[time].dtype != pl.Int64 or table[time].null_count():
        raise ValueError(f"column '{time}' does not hold a time for each version")
    if rows_of_ids(table[key], newest[key]).null_count() or table.select(key, time).is_duplicated().any():
        raise ValueError("it names an id that the other table lacks, or one id and time twice")
    return table
