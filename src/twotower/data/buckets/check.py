"""Check of a folder of buckets against docs/prepared-format.md.

Memory holds one bucket or one table at a time, and 8 bytes for each interaction, on a disk above some megabytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np
import polars as pl

from twotower.arrays.pieces import pieces, temporary_array
from twotower.arrays.types import Bools, Ints
from twotower.data.buckets import (
    Bucket,
    BucketFacts,
    BucketFile,
    Buckets,
    column_problem,
    missing_column,
    user_hashes,
)
from twotower.data.interaction_columns import (
    CONTEXT_PREFIX,
    ITEM,
    PART,
    POSITIVE,
    ROW,
    TIME,
    USER,
    VALUE_PREFIX,
    WEIGHT,
)
from twotower.data.reading.times import plausible_range
from twotower.data.split import PART_NAMES
from twotower.data.tables import side_columns
from twotower.errors import RunError
from twotower.escaping import escape_controls
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.files import layout
from twotower.files.readers import read_checked, read_parquet
from twotower.progress import JobProgress

log = logging.getLogger(__name__)

ID_TYPES = (pl.Int64, pl.UInt64, pl.String)


class Rule(IntEnum):
    """Number of a rule in docs/prepared-format.md."""

    FILES = 1
    IDS = 2
    FEATURES = 3
    USER_ORDER = 4
    COLUMNS = 5
    SAME_COLUMNS = 6
    VALUES = 7
    RANGES = 8
    ROWS = 9
    ORDER = 10
    PAIRS = 11
    SCHEMA = 12
    FACTS = 13
    COUNTS = 14


@dataclass
class Problems:
    """Problems of a folder, one line for each rule that a file breaks: the first record that breaks it."""

    folder: Path
    lines: list[str] = field(default_factory=list)
    _known: set[tuple[Path, Rule]] = field(default_factory=set)

    def add(self, path: Path, rule: Rule, what: str) -> None:
        """Add a problem of a file, if it is the file's first with a rule. `what` says what was found and expected."""
        if (path, rule) not in self._known:
            self._known.add((path, rule))
            self.lines.append(escape_controls(f"{path.relative_to(self.folder)}: rule {rule.value}: {what}"))


def repeated_pairs(of_files: Sequence[pl.DataFrame]) -> Iterator[tuple[int, str]]:
    """Yield the number of the first file of a bucket that repeats a pair of user and item of its own or of an earlier
    one, and the record; nothing if none does."""
    every = pl.concat([frame.select(USER, ITEM) for frame in of_files], how="vertical_relaxed")
    if (at := first_true(~every.select(pl.struct(USER, ITEM).is_first_distinct()).to_series())) is not None:
        starts = np.cumsum([0, *(frame.height for frame in of_files)])
        number = int(np.searchsorted(starts, at, side="right")) - 1
        user, item = every.row(at)
        yield number, f"record {at - starts[number]} repeats user {user} and item {item}, expected each pair once"


def record_problems(
    frame: pl.DataFrame,
    bucket: Bucket,
    file: BucketFile,
    facts: BucketFacts,
    order: Sequence[str],
    pairs: bool,
) -> Iterator[tuple[Rule, str]]:
    """Yield the rules that the records of a file of a bucket break, of which any columns are given, and how: values,
    ranges, order and pairs. `order` are the columns by which the records rise; `pairs` is True if those of user and
    item are checked. If a value is missing, the rest is not checked."""
    for name in frame.columns:
        if frame[name].null_count() and not name.startswith((VALUE_PREFIX, CONTEXT_PREFIX)):
            yield Rule.VALUES, bad_value(frame, name, frame[name].is_null(), "a value")
            return
    segment = facts.segments[file.segment]
    of = f", as of segment {file.segment}" if len(facts.segments) > 1 else ""
    for rule, name, first, after, what, which in (
        (Rule.RANGES, USER, *bucket.users, "a row", ""),
        (Rule.RANGES, ITEM, 0, segment.items[1], "a row", of),
        (Rule.ROWS, ROW, *segment.read, "a row", of),
        (Rule.VALUES, PART, 0, len(PART_NAMES), "a part", ""),
    ):
        if name in frame.columns:
            bad = ~frame[name].cast(pl.Int64).is_between(first, after - 1)
            if found := bad_value(frame, name, bad, f"{what} from {first} to {after - 1}{which}"):
                yield rule, found
    if WEIGHT in frame.columns:
        bad = ~(frame[WEIGHT].is_finite() & (frame[WEIGHT] >= 0))
        if found := bad_value(frame, WEIGHT, bad, "a finite number of at least 0"):
            yield Rule.VALUES, found
    earlier: Bools = np.full(max(0, frame.height - 1), ROW in order)  # no two have one row
    for name in reversed(order):
        values = frame[name].to_numpy()
        earlier = (values[1:] < values[:-1]) | ((values[1:] == values[:-1]) & earlier)
    if (at := first_true(earlier)) is not None:
        before, record = (
            ", ".join(f"{n} {v}" for n, v in frame.select(order).row(at + k, named=True).items()) for k in (0, 1)
        )
        expected = f"expected records sorted by {', '.join(order)}"
        yield Rule.ORDER, f"record {at + 1} has {record} after {before}, {expected}"
    if pairs and facts.duplicates != "keep" and ITEM in frame.columns:
        yield from ((Rule.PAIRS, what) for _, what in repeated_pairs([frame]))
    if frame.height != file.rows:
        what = f"number of records {frame.height:,}, expected {file.rows:,} as in {layout.BUCKET_FACTS}"
        yield Rule.COUNTS, what


def bad_value(frame: pl.DataFrame, column: str, bad: pl.Series, expected: str) -> str:
    """Return the first `bad` value (n,) of a column as words, "" without one."""
    if (at := first_true(bad)) is None:
        return ""
    value = frame[column][at]
    return f"record {at} has {column} {'null' if value is None else value}, expected {expected}"


def first_true(found: Bools | pl.Series) -> int | None:
    """Return the place of the first True of (n,); None without one. A null is False."""
    flags = found if isinstance(found, pl.Series) else pl.Series(found)
    return flags.arg_max() if flags.any() else None


def check_buckets(folder: Path | str, schema: Schema | None = None) -> list[str]:
    """Return the problems of a folder of buckets, one line each: file, rule of docs/prepared-format.md, the first
    record that breaks it, and what is expected. A folder that meets the contract has none.

    With a schema, the tables and buckets need the columns that it names. Raises RunError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    problems, path = Problems(folder), folder / layout.BUCKET_FACTS
    try:
        buckets = Buckets.open(folder)
    except RunError as e:
        problems.add(path, Rule.FACTS, str(e).removeprefix(f"{path}: "))
        return problems.lines
    _Check(buckets, schema, problems).run()
    return problems.lines


class _Check:
    """Check of a folder whose facts can be read."""

    def __init__(self, buckets: Buckets, schema: Schema | None, problems: Problems) -> None:
        self.buckets, self.facts, self.schema, self.problems = buckets, buckets.facts, schema, problems
        self._common: tuple[Path, pl.Schema] | None = None

    def run(self) -> None:
        """Add all problems of the folder."""
        path = self.buckets.folder / layout.BUCKET_FACTS
        if absent := sorted(set(BucketFacts.model_fields) - self.facts.model_fields_set):
            self.problems.add(path, Rule.FACTS, f"no key '{absent[0]}'")
        if self.schema and (problem := self.facts.difference(self.schema)):
            self.problems.add(path, Rule.SCHEMA, problem)
        place, names = self.buckets.folder / layout.BUCKET_FOLDER, {f.file for f in self.facts.files}
        for found in sorted(place.iterdir()) if place.is_dir() else ():
            if found.name not in names and found.name[0] not in "._":  # those names belong to engines
                what = f"not a file of {layout.BUCKET_FACTS}, expected no other files; remove it"
                self.problems.add(found, Rule.FILES, what)
        for side in SIDES:
            if (table := self._read(self.buckets.table(side))) is not None:
                self._check_table(self.buckets.table(side), table, side)
        self._check_interactions()

    def _read(self, path: Path) -> pl.DataFrame | None:
        """Return a Parquet file; None, and a problem, for a file that cannot be read."""
        if not path.is_file():
            what = "a folder or special file, expected a file" if path.exists() else "no such file"
            self.problems.add(path, Rule.FILES, what)
            return None
        try:
            frame = read_checked(path, read_parquet)
        except RunError as e:
            self.problems.add(path, Rule.FILES, str(e).removeprefix(f"{path}: "))
            return None
        if not frame.columns:
            self.problems.add(path, Rule.FILES, "no columns")
        return frame if frame.columns else None

    def _check_table(self, path: Path, table: pl.DataFrame, side: SideName) -> None:
        """Check the table of a side: columns, ids, order and number."""
        names, named = table.columns, side_columns(side, self.schema) if self.schema else []
        key = names[0]
        if named and key != named[0]:
            what = f"first column '{key}', expected '{named[0]}', the id of the schema"
            self.problems.add(path, Rule.FEATURES, what)
        if absent := [name for name in named[1:] if name not in names]:
            what = f"no column '{absent[0]}', which the schema names (found: {', '.join(names)})"
            self.problems.add(path, Rule.FEATURES, what)
        ids = table[key]
        if ids.dtype not in ID_TYPES:
            what = f"first column '{key}' holds {ids.dtype}, expected Int64, UInt64 or String"
            self.problems.add(path, Rule.IDS, what)
            return
        if (at := first_true(ids.is_null())) is not None:
            self.problems.add(path, Rule.IDS, f"record {at} has no id, expected one")
            return
        if (at := first_true(~ids.is_first_distinct())) is not None:
            self.problems.add(
                path, Rule.IDS, f"record {at} repeats id '{ids[at]}', expected each id once in all segments"
            )
        if side == "user":
            hashes = pl.Series(user_hashes(ids))
            before = (hashes[1:] < hashes[:-1]) | ((hashes[1:] == hashes[:-1]) & (ids[1:] < ids[:-1]))
            begins = pl.int_range(1, len(ids), eager=True).is_in([s.users[0] for s in self.facts.segments])
            if (at := first_true(before & ~begins)) is not None:
                one, two = (f"'{ids[n]}' of hash {hashes[n]}" for n in (at, at + 1))
                expected = "expected ascending hashes in a segment, and ascending ids of one hash"
                self.problems.add(path, Rule.USER_ORDER, f"record {at + 1} has id {two} after {one}, {expected}")
        expected_rows = self.facts.users if side == "user" else self.facts.items
        if table.height != expected_rows:
            what = f"number of {side}s {table.height:,}, expected {expected_rows:,} as in {layout.BUCKET_FACTS}"
            self.problems.add(path, Rule.COUNTS, what)

    def _check_interactions(self) -> None:
        """Check the buckets, and what all of them have together."""
        progress = JobProgress(log, "interactions checked", self.facts.rows)
        totals, whole = list[pl.DataFrame](), list[Path]()
        for bucket in self.facts.buckets:
            paths, pairs = list[Path](), list[pl.DataFrame]()
            for file in bucket.files:
                if (frame := self._check_file(path := self.buckets.file(file), bucket, file)) is not None:
                    time = pl.col(TIME) if TIME in frame.columns else pl.lit(None, pl.Int64)
                    first, last = time.min().alias("first_time"), time.max().alias("last_time")
                    sums = pl.len().alias("rows"), pl.col(POSITIVE).sum().cast(pl.Int64).alias("positives")
                    totals.append(frame.select(*sums, first, last))
                    paths.append(path)
                    pairs.append(frame.select(USER, ITEM))
            whole += paths
            if len(pairs) > 1 and self.facts.duplicates == "error":  # "last" keeps the latest
                for number, what in repeated_pairs(pairs):
                    self.problems.add(paths[number], Rule.PAIRS, what)
            progress.advance(bucket.rows)
        if len(totals) == len(self.facts.files):
            found = pl.concat(totals)
            for key, value in (
                ("positives", found["positives"].sum()), ("first_time", found["first_time"].min()),
                ("last_time", found["last_time"].max()),
            ):  # fmt: skip
                if (given := getattr(self.facts, key)) != value:
                    what = f"{key} {given}, expected {value!r} as in the buckets"
                    self.problems.add(self.buckets.folder / layout.BUCKET_FACTS, Rule.COUNTS, what)
        if whole:
            self._check_rows(whole, int(pl.concat(totals)["rows"].sum()))

    def _check_file(self, path: Path, bucket: Bucket, file: BucketFile) -> pl.DataFrame | None:
        """Check a file of a bucket and return it; None if it lacks a column or a value."""
        if (frame := self._read(path)) is None:
            return None
        if problem := column_problem(frame.schema):
            self.problems.add(path, Rule.COLUMNS, problem)
            return None
        self._common = self._common or (path, frame.schema)
        if dict(frame.schema) != dict(self._common[1]):
            what = f"{_shown(frame.schema)}, expected those of {self._common[0].name}: {_shown(self._common[1])}"
            self.problems.add(path, Rule.SAME_COLUMNS, what)
        if self.schema and (problem := missing_column(frame.columns, self.schema)):
            self.problems.add(path, Rule.SCHEMA, problem)
        if self.schema and self.schema.time and self.schema.time_unit != "order" and TIME in frame.columns:
            bad = ~frame[TIME].is_between(*plausible_range())
            if what := bad_value(frame, TIME, bad, "microseconds since 1970, from 1990 to tomorrow"):
                self.problems.add(path, Rule.SCHEMA, what)
        order = [n for n in (USER, TIME, ROW) if n in frame.columns]
        found = list(record_problems(frame, bucket, file, self.facts, order, True))
        for rule, what in found:
            self.problems.add(path, rule, what)
        has_gaps = any(rule == Rule.VALUES and " null, " in what for rule, what in found)
        return None if has_gaps else frame

    def _check_rows(self, paths: list[Path], n: int) -> None:
        """Add the first row of the log that two of the `n` interactions of some files have."""
        every, start = temporary_array(n, np.int64), 0
        for path in paths:
            rows = _rows(path)
            every[start : start + len(rows)] = rows
            start += len(rows)
        every.sort()
        for part in pieces(max(0, n - 1)):
            some = every[part.start : part.stop + 1]
            if (at := first_true(some[1:] == some[:-1])) is not None:
                path, record = [(p, r) for p in paths for r in np.flatnonzero(_rows(p) == some[at]).tolist()][1]
                what = f"record {record} has {ROW} {some[at]}, which another has; expected each row once"
                self.problems.add(path, Rule.ROWS, what)
                return


def _rows(path: Path) -> Ints:
    return read_checked(path, lambda p: pl.scan_parquet(p, glob=False).select(ROW).collect()[ROW].to_numpy())


def _shown(schema: pl.Schema) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(schema.items()))
