"""Rows of buckets, checked against the contract as they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import polars as pl

from twotower.data.buckets import Bucket, Buckets, column_problem, missing_column
from twotower.data.interaction_columns import (
    BY_NAME,
    CONTEXT_PREFIX,
    ITEM,
    PART,
    ROW,
    TIME,
    USER,
    VALUE_PREFIX,
    Columns,
)
from twotower.data.split import PART_NAMES
from twotower.data.tables import averaged_columns
from twotower.errors import ConfigError, RunError
from twotower.features.schema import Schema
from twotower.files.readers import read_checked


@dataclass(frozen=True)
class BucketReader:
    """Reads the interactions of a folder of buckets."""

    buckets: Buckets
    schema: Schema
    given_parts: bool = False
    """True if the split reads the column `part`."""

    @property
    def timed(self) -> bool:
        """True if the interactions have times that the schema names."""
        return bool(self.schema.time)

    @property
    def values(self) -> list[str]:
        """Columns that features average."""
        return [VALUE_PREFIX + a for a in averaged_columns(self.schema)]

    def check(self) -> None:
        """Raise RunError if the columns of a bucket do not follow the contract or the schema, ConfigError if they are not
        supported."""
        if other := self.buckets.facts.difference(self.schema):
            raise ConfigError(
                f"{self.buckets.folder}: the buckets were written for another schema ({other}); write them again"
            )
        for bucket in self.buckets.facts.buckets:
            path = self.buckets.file(bucket)
            found = read_checked(path, lambda p: pl.scan_parquet(p, glob=False).collect_schema())
            if problem := column_problem(found) or missing_column(found, self.schema, self.given_parts):
                raise RunError(f"{path}: {problem}; write buckets that follow docs/prepared-format.md and the schema")
            for name in found:
                if name.startswith(CONTEXT_PREFIX) or (name in BY_NAME and not BY_NAME[name].supported):
                    raise ConfigError(f"{path}: column '{name}' is not supported yet; leave it out")

    def read(self, bucket: Bucket, *columns: str) -> Columns:
        """Return the users and other columns of a bucket. Raises RunError if it has other rows than buckets.json says, is not
        sorted, or names users or items out of range."""
        path, names = self.buckets.file(bucket), list(dict.fromkeys([USER, *columns]))
        frame = read_checked(path, lambda p: pl.scan_parquet(p, glob=False).select(names).collect())
        found = {name: frame[name].to_numpy() for name in names}
        sound = len(frame) == bucket.rows and not any(frame[c].null_count() for c in names if c not in self.values)
        if sound and len(frame):
            facts, user = self.buckets.facts, found[USER]
            sound = bucket.users[0] <= user[0] and user[-1] < bucket.users[1] and _rises(user, found.get(TIME))
            for name, n in ((ITEM, facts.items), (ROW, facts.read), (PART, len(PART_NAMES))):
                sound = sound and (name not in found or bool(found[name].min() >= 0 and found[name].max() < n))
        if not sound:
            raise RunError(
                f"{path}: damaged, or does not follow docs/prepared-format.md; "
                f"`check_buckets(folder={str(self.buckets.folder)!r})` tells where"
            )
        return found


def _rises(user: npt.NDArray[Any], time: npt.NDArray[Any] | None) -> bool:
    """Return True if rows (n,) are sorted by user, and by time within a user."""
    same, later = user[1:] == user[:-1], user[1:] > user[:-1]
    if time is not None:
        same &= time[1:] >= time[:-1]
    return bool((same | later).all())
