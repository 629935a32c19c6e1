"""Rows of buckets, checked against the contract as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from twotower import files
from twotower.data import times
from twotower.data.buckets import Bucket, Buckets, column_problem, missing_column
from twotower.data.buckets.records import record_problems
from twotower.data.interaction_columns import ROW, TIME, USER, WEIGHT
from twotower.data.tables import side_columns
from twotower.data.unknown_ids import rows_of_ids
from twotower.data.versions import no_versions
from twotower.errors import ConfigError, RunError
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.files.readers import read_checked, read_parquet


@dataclass(frozen=True)
class BucketReader:
    """Reads the interactions of a folder of buckets."""

    buckets: Buckets
    schema: Schema
    given_parts: bool
    """True if the split reads the column `part`."""
    strict: bool
    """True for buckets of another program, in which pairs may be repeated."""
    found: Mapping[str, files.JsonData]
    """Size and time of change of each file as it was found first, by path."""

    @classmethod
    def open(cls, buckets: Buckets, schema: Schema, given_parts: bool = False, strict: bool = False) -> BucketReader:
        """Return the reader of a folder. Raises RunError if the columns of a bucket do not follow the contract or the
        schema, ConfigError if they are not supported."""
        versions = [path for path in map(buckets.versions, SIDES) if schema.valid_from and path.exists()]
        paths = [*map(buckets.table, SIDES), *versions, *map(buckets.file, buckets.facts.buckets)]
        reader = cls(buckets, schema, given_parts, strict, {str(path): read_checked(path, _state) for path in paths})
        reader._check()
        return reader

    @property
    def largest(self) -> int:
        """Number of interactions of the largest bucket."""
        return max(bucket.rows for bucket in self.buckets.facts.buckets)

    def _check(self) -> None:
        if other := self.buckets.facts.difference(self.schema):
            raise ConfigError(
                f"{self.buckets.folder}: the buckets were written for another schema ({other}); write them again"
            )
        for bucket in self.buckets.facts.buckets:
            path = self.buckets.file(bucket)
            found = read_checked(path, lambda p: pl.scan_parquet(p, glob=False).collect_schema())
            if problem := column_problem(found) or missing_column(found, self.schema, self.given_parts):
                raise RunError(f"{path}: {problem}; write buckets that follow docs/prepared-format.md and the schema")
            if WEIGHT in found and not self.schema.weighted:
                raise ConfigError(
                    f"{path}: column '{WEIGHT}', and schema.weight is empty; name its column, or leave it out"
                )

    def read(self, bucket: Bucket, *columns: str) -> pl.DataFrame:
        """Return the users and other columns of a bucket. Raises RunError if what is read breaks a rule of the
        contract."""
        path, names = self.buckets.file(bucket), list(dict.fromkeys([USER, *columns]))
        frame = read_checked(path, lambda p: pl.scan_parquet(p, glob=False).select(names).collect())
        if WEIGHT in names:
            frame = frame.with_columns(pl.col(WEIGHT).cast(pl.Float32))
        # Rows order what has one time.
        order = [c for c in (USER, TIME, ROW) if c in names and (c != ROW or TIME in names or not self.schema.time)]
        for rule, what in record_problems(frame, bucket, self.buckets.facts, order, self.strict):
            raise RunError(
                f"{path}: damaged, or does not follow docs/prepared-format.md (rule {rule.value}: {what}); "
                f"`check_buckets(folder={str(self.buckets.folder)!r})` names every problem"
            )
        self.check_unchanged(path)
        return frame

    def versions(self, newest: Mapping[SideName, pl.DataFrame]) -> dict[SideName, pl.DataFrame]:
        """Return the tables of versions of the sides that have some, whose newest rows are given. Raises RunError for
        damaged ones, DataError if there is none and the schema names their column."""
        found = dict[SideName, pl.DataFrame]()
        for side in SIDES if self.schema.valid_from else ():
            if (path := self.buckets.versions(side)).exists():
                found[side] = read_checked(path, partial(_versions, schema=self.schema, side=side, ids=newest[side]))
                self.check_unchanged(path)
        if self.schema.valid_from and not found:
            raise no_versions(self.schema)
        return found

    def check_unchanged(self, path: Path) -> None:
        """Raise RunError if a file is another one than at first."""
        if read_checked(path, _state) != self.found[str(path)]:
            raise RunError(f"{path}: was changed while it was read; call again when it is complete")


def _state(path: Path) -> list[files.JsonData]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _versions(path: Path, schema: Schema, side: SideName, ids: pl.DataFrame) -> pl.DataFrame:
    """Read the versions of a side of buckets. Raises ValueError for another table. A reader for `read_checked`."""
    table, key, time = read_parquet(path), schema.id_column(side), times.TIME
    for name in (*side_columns(side, schema), time):
        if name not in table.columns:
            raise ValueError(f"column '{name}' is missing")
    if table[time].dtype != pl.Int64 or table[time].null_count():
        raise ValueError(f"column '{time}' does not hold a time for each version")
    if rows_of_ids(table[key], ids[key]).null_count() or table.select(key, time).is_duplicated().any():
        raise ValueError("it names an id that the other table lacks, or one id and time twice")
    return table
