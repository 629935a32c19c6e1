"""Interactions of buckets: checked against the contract as they are read, and split, by bucket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower import files
from twotower.arrays.pieces import Scalar, temporary_array
from twotower.arrays.types import Ints
from twotower.data import splits
from twotower.data.bucket_columns import arrays_of, context_of
from twotower.data.buckets import Bucket, Buckets, column_problem, in_bucket_order, missing_column
from twotower.data.buckets.check import Rule, record_problems, repeated_pairs
from twotower.data.context import context_frame
from twotower.data.interaction_columns import CONTEXT_PREFIX, ITEM, PART, POSITIVE, ROW, TIME, USER, WEIGHT, Columns
from twotower.data.pairs import target_mask
from twotower.data.reading import times
from twotower.data.split import SplitConfig
from twotower.data.splits import DROPPED, TRAIN, Parts, PartsOf
from twotower.data.tables import side_columns
from twotower.data.unknown_ids import rows_of_ids
from twotower.data.versions import no_versions
from twotower.errors import ConfigError, RunError
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.files.readers import read_checked, read_parquet
from twotower.files.resumable import make_once


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
        paths = [*map(buckets.table, SIDES), *versions, *map(buckets.file, buckets.facts.files)]
        reader = cls(buckets, schema, given_parts, strict, {str(path): read_checked(path, _state) for path in paths})
        reader._check()
        return reader

    @property
    def largest(self) -> int:
        """Number of records of the largest bucket."""
        return max(bucket.rows for bucket in self.buckets.facts.buckets)

    def _check(self) -> None:
        if other := self.buckets.facts.difference(self.schema):
            raise ConfigError(
                f"{self.buckets.folder}: the buckets were written for another schema ({other}); write them again"
            )
        common: pl.Schema | None = None
        for path in map(self.buckets.file, self.buckets.facts.files):
            found = read_checked(path, lambda p: pl.scan_parquet(p, glob=False).collect_schema())
            common = common or found
            if problem := column_problem(found) or missing_column(found, self.schema, self.given_parts):
                raise RunError(f"{path}: {problem}; write buckets that follow docs/prepared-format.md and the schema")
            if WEIGHT in found and not self.schema.weighted:
                raise ConfigError(
                    f"{path}: column '{WEIGHT}', and schema.weight is empty; name its column, or leave it out"
                )
            if dict(found) != dict(common):
                raise RunError(
                    f"{path}: does not follow docs/prepared-format.md (rule {Rule.SAME_COLUMNS.value}: other columns "
                    "or types than the first file); write all files with the same"
                )

    def read(self, bucket: Bucket, *columns: str) -> pl.DataFrame:
        """Return the users and other columns of a bucket, of which the files of several segments are merged. Raises
        RunError if what is read breaks a rule of the contract."""
        facts, wanted, several = self.buckets.facts, list(dict.fromkeys([USER, *columns])), len(bucket.files) > 1
        merging = [ITEM, *([TIME] if self.schema.time else []), ROW] if several else []
        names, frames = list(dict.fromkeys([*wanted, *merging])), list[pl.DataFrame]()
        # Rows order what has one time.
        order = [c for c in (USER, TIME, ROW) if c in names and (c != ROW or TIME in names or not self.schema.time)]
        for file in bucket.files:
            path = self.buckets.file(file)
            frame = read_checked(path, lambda p: pl.scan_parquet(p, glob=False).select(names).collect())
            if WEIGHT in names:
                frame = frame.with_columns(pl.col(WEIGHT).cast(pl.Float32))
            for rule, what in record_problems(frame, bucket, file, facts, order, self.strict or several):
                raise self._breaks(path, rule, what)
            self.check_unchanged(path)
            frames.append(frame)
        if not several:
            return frames[0]
        for number, what in repeated_pairs(frames) if facts.duplicates == "error" else ():
            raise self._breaks(self.buckets.file(bucket.files[number]), Rule.PAIRS, what)
        keeps_repeats = facts.duplicates != "last"  # of "error" none is repeated
        return in_bucket_order(pl.concat(frames), bool(self.schema.time), keeps_repeats).select(wanted)

    def _breaks(self, path: Path, rule: Rule, what: str) -> RunError:
        """Return the error of a file that breaks a rule of the contract."""
        return RunError(
            f"{path}: damaged, or does not follow docs/prepared-format.md (rule {rule.value}: {what}); "
            f"`check_buckets(folder={str(self.buckets.folder)!r})` names every problem"
        )

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


@dataclass(frozen=True)
class SplitBuckets:
    """The whole log in buckets, with the part of each interaction; what is known of a bucket lies in two files.

    Their names depend on the files of the bucket: a folder that is kept for a log with a further segment lacks only
    those of the buckets that have changed. A rule that looks at the whole log, such as `time` or `random`, splits all
    again. `prepare` keeps no such folder yet."""

    reader: BucketReader
    split: SplitConfig
    folder: Path

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets in the order of their users."""
        return self.reader.buckets.facts.buckets

    def missing(self) -> bool:
        """Return True if a bucket is not split."""
        return not all(self._counts_file(b).exists() for b in self.buckets)

    def make(self, bucket: Bucket, parts_of: PartsOf) -> bool:
        """Split a bucket; return False if it is split already."""

        def into(path: Path) -> None:
            parts, counts = self._counted(bucket, parts_of)
            parts.tofile(self._parts_file(bucket))
            with path.open("wb") as file:
                np.savez(file, allow_pickle=False, **counts)

        return make_once(self._counts_file(bucket), into)

    def counts(self, bucket: Bucket) -> Columns:
        """Return the counts of a bucket: the `sizes` (3,) of the parts, the numbers of `dropped` and `targets`, and the
        training interactions of each `user` of the bucket and of each `item` that has some, with the `rows` of these
        items."""

        def read(path: Path) -> Columns:
            with np.load(path) as found:
                return dict(found)

        return read_checked(self._counts_file(bucket), read)

    def rule(self, ids: pl.Series) -> PartsOf:
        """Return the rule of the split, of users with these ids."""
        return splits.rule_of(self.split, splits.measured_users(ids, self.split), self)

    def kept(self, bucket: Bucket, *names: str) -> tuple[pl.DataFrame, Parts]:
        """Return users and named columns of the interactions of a bucket that are not dropped, with their parts."""
        frame, parts = self.reader.read(bucket, *names), np.fromfile(self._parts_file(bucket), np.int8)
        return (frame, parts) if (kept := parts != DROPPED).all() else (frame.filter(kept), parts[kept])

    def read_all(self, *names: str) -> Iterator[tuple[Columns, Parts]]:
        """Yield users, items and named columns of each bucket, with its parts."""
        for bucket in self.buckets:
            frame, parts = self.kept(bucket, ITEM, *names)
            yield arrays_of(frame, self.reader.schema), parts

    def contexts(self) -> Iterator[pl.DataFrame]:
        """Yield the values of all features of the context of the training interactions of each bucket."""
        schema = self.reader.schema
        names = [CONTEXT_PREFIX + name for name in schema.context_columns()] + ([TIME] if schema.time else [])
        for bucket in self.buckets:
            frame, parts = self.kept(bucket, *names)
            found = arrays_of(frame, schema)
            yield context_frame(context_of(frame, schema), schema, found[USER], found.get(TIME)).filter(parts == TRAIN)

    def example(self) -> pl.DataFrame:
        """Return the columns of the log that features of the context read, of one interaction."""
        names, schema = [CONTEXT_PREFIX + name for name in self.reader.schema.context_columns()], self.reader.schema
        bucket = next((b for b in self.buckets if b.rows and names), None)
        return pl.DataFrame() if bucket is None else context_of(self.reader.read(bucket, *names)[:1], schema)

    def _counts_file(self, bucket: Bucket) -> Path:
        return self.folder / f"{self._name(bucket)}.npz"

    def _parts_file(self, bucket: Bucket) -> Path:
        return self.folder / f"{self._name(bucket)}.parts"

    def _name(self, bucket: Bucket) -> str:
        states = [self.reader.found[str(self.reader.buckets.file(file))] for file in bucket.files]
        held = json.dumps([self._rule, bucket.model_dump_json(), states])
        return f"{bucket.name}.{hashlib.sha256(held.encode()).hexdigest()[:16]}"

    @cached_property
    def _rule(self) -> str:
        """Digest of what decides the parts of a bucket apart from its files: settings, and of some rules all files."""
        found: list[files.JsonData] = [self.reader.schema.model_dump(mode="json"), self.split.model_dump(mode="json")]
        found += [] if self.split.is_by_user else [*self.reader.found.values()]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def _counted(self, bucket: Bucket, parts_of: PartsOf) -> tuple[Parts, Columns]:
        schema = self.reader.schema
        names = [ITEM, ROW, POSITIVE, *([TIME] if schema.time else []), *([WEIGHT] if schema.weighted else [])]
        found = arrays_of(self.reader.read(bucket, *names, *([PART] if self.split.is_given else [])), schema)
        parts = parts_of(found, slice(*bucket.users))
        train = parts == TRAIN
        users = np.bincount(found[USER][train] - bucket.users[0], minlength=bucket.users[1] - bucket.users[0])
        rows, items = np.unique(found[ITEM][train], return_counts=True)
        targets = np.array(np.count_nonzero(target_mask(found[POSITIVE], found.get(WEIGHT)) & train))
        return parts, {
            "sizes": splits.part_sizes(parts),
            "dropped": np.array(np.count_nonzero(parts == DROPPED)),
            "targets": targets,
            "user": users,
            "item": items,
            "rows": rows,
        }

    def times(self, of_train: bool = False) -> Ints:
        """Return the times of all interactions, or of those that are given as train, in any order."""
        times, start = self._scratch(self.reader.buckets.facts.rows, np.int64), 0
        for bucket in self.buckets:
            found = self.reader.read(bucket, TIME, *([PART] if of_train else []))
            own = (found.filter(pl.col(PART) == TRAIN) if of_train else found)[TIME].to_numpy()
            times[start : start + len(own)] = own
            start += len(own)
        return times[:start]

    def by_row(self, draw: Callable[[int, splits.Scratch], npt.NDArray[Scalar]]) -> npt.NDArray[Scalar]:
        """Return by row of the log what is drawn for the rows that are kept."""
        facts, start, n = self.reader.buckets.facts, 0, 0
        kept = self._scratch(facts.read, np.bool_)
        kept[:] = False
        for bucket in facts.buckets:
            rows = self.reader.read(bucket, ROW)[ROW].to_numpy()
            kept[rows] = True
            n += len(rows)
        if int(np.count_nonzero(kept)) != n:
            raise RunError(f"{self.reader.buckets.folder}: damaged, two interactions have one row of the log (rule 9)")
        drawn = draw(n, self._scratch)
        by_row: npt.NDArray[Scalar] = self._scratch(facts.read, drawn.dtype.type)
        for first in range(0, facts.read, splits.BLOCK_ROWS):
            rows = first + np.flatnonzero(kept[first : first + splits.BLOCK_ROWS])
            by_row[rows] = drawn[start : start + len(rows)]
            start += len(rows)
        return by_row

    def _scratch(self, n: int, dtype: type[Scalar]) -> npt.NDArray[Scalar]:
        return temporary_array(n, dtype, folder=self.folder)


def given_facts(reader: BucketReader) -> Ints:
    """Return the facts of the given parts of all buckets, as `splits.given_facts`."""
    names = (PART, *([TIME] if reader.schema.time else []))
    found = (arrays_of(reader.read(bucket, *names), reader.schema) for bucket in reader.buckets.facts.buckets)
    facts: Ints = np.stack([splits.given_facts(f.get(TIME), f[PART]) for f in found]).max(0)
    return facts
