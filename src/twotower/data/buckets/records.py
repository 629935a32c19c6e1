"""Check of the records of one bucket: values, ranges, order, pairs and counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from twotower.arrays.types import Bools, Ints
from twotower.data.buckets import Bucket, BucketFacts
from twotower.data.buckets.rules import Problems, Rule, first_true, read_blocks
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
from twotower.data.split import PART_NAMES
from twotower.files import layout


class BucketRecords:
    """Records of one bucket, checked block by block."""

    def __init__(self, path: Path, bucket: Bucket, facts: BucketFacts, problems: Problems) -> None:
        self.path, self.bucket, self.facts, self.problems = path, bucket, facts, problems
        self.rows = self.positives = 0
        self.first_time: int | None = None
        self.last_time: int | None = None
        self.windows: set[int] = set()
        """Numbers of the windows of `window_rows` rows of the log that hold rows of this bucket."""
        self._last = pl.DataFrame()  # user, time and row of the last record read
        self._pairs = pl.DataFrame()  # pairs of the user of that record

    def check(self, columns: Sequence[str], times: tuple[int, int] | None, block_rows: int, window_rows: int) -> bool:
        """Read the file and add its problems. Return True if it was read to its end.

        `times` are the earliest and latest plausible time; None: any. Raises RunError for a damaged file."""
        for start, block in read_blocks(self.path, columns, block_rows):
            if not self._has_values(start, block):
                return False
            self._check_ranges(start, block)
            self._check_order(start, block)
            if self.facts.duplicates != "keep":
                self._check_pairs(start, block)
            self._count(block)
            rows = block[ROW].filter(block[ROW].is_between(0, self.facts.read - 1))
            self.windows.update((rows // window_rows).unique().to_list())
            if times and TIME in columns:
                bad = ~block[TIME].is_between(*times)
                self._add(
                    Rule.SCHEMA, start, first_true(bad), block, TIME, "microseconds since 1970, from 1990 to tomorrow"
                )
        if self.rows != self.bucket.rows:
            what = f"number of records {self.rows:,}, expected {self.bucket.rows:,} as in {layout.BUCKET_FACTS}"
            self.problems.add(self.path, Rule.COUNTS, what)
        return True

    def _add(self, rule: Rule, start: int, at: int | None, block: pl.DataFrame, column: str, expected: str) -> None:
        """Add the problem of a value, if there is one at the place `at` of a block."""
        if at is not None:
            value = block[column][at]
            found = "null" if value is None else f"{value}"
            self.problems.add(self.path, rule, f"record {start + at} has {column} {found}, expected {expected}")

    def _has_values(self, start: int, block: pl.DataFrame) -> bool:
        """Return False, and add a problem, if a column has nulls."""
        for name in block.columns:
            optional = name.startswith((VALUE_PREFIX, CONTEXT_PREFIX))
            if not optional and (at := first_true(block[name].is_null())) is not None:
                self._add(Rule.VALUES, start, at, block, name, "a value")
                return False
        return True

    def _check_ranges(self, start: int, block: pl.DataFrame) -> None:
        low, end = self.bucket.users
        for rule, name, first, after in (
            (Rule.RANGES, USER, low, end),
            (Rule.RANGES, ITEM, 0, self.facts.items),
            (Rule.ROWS, ROW, 0, self.facts.read),
        ):
            rows = block[name].cast(pl.Int64)
            bad = (rows < first) | (rows >= after)
            self._add(rule, start, first_true(bad), block, name, f"a row from {first} to {after - 1}")
        if PART in block.columns:
            last = len(PART_NAMES) - 1
            bad = ~block[PART].is_between(0, last)
            self._add(Rule.VALUES, start, first_true(bad), block, PART, f"a part from 0 to {last}")
        if WEIGHT in block.columns:
            bad = ~(block[WEIGHT].is_finite() & (block[WEIGHT] >= 0))
            self._add(Rule.VALUES, start, first_true(bad), block, WEIGHT, "a finite number of at least 0")

    def _check_order(self, start: int, block: pl.DataFrame) -> None:
        names = [name for name in (USER, TIME, ROW) if name in block.columns]
        keys = pl.concat([self._last, block.select(names)]) if self._last.height else block.select(names)
        earlier: Bools = np.zeros(max(keys.height - 1, 0), bool)
        for name in reversed(names):
            values = keys[name].to_numpy()
            earlier = (values[1:] < values[:-1]) | ((values[1:] == values[:-1]) & earlier)
        if (at := first_true(earlier)) is not None:
            before, record = (", ".join(f"{n} {v}" for n, v in keys.row(at + k, named=True).items()) for k in (0, 1))
            place = start + at + 1 - self._last.height
            self.problems.add(
                self.path,
                Rule.ORDER,
                f"record {place} has {record} after {before}, expected records sorted by {', '.join(names)}",
            )
        self._last = keys.tail(1)

    def _check_pairs(self, start: int, block: pl.DataFrame) -> None:
        pairs = block.select(USER, ITEM)
        carried = self._pairs.filter(pl.col(USER) == pairs[USER][0]).height if self._pairs.height else 0
        if carried:
            pairs = pl.concat([self._pairs, pairs])
        if (at := first_true(~pairs.select(pl.struct(USER, ITEM).is_first_distinct()).to_series())) is not None:
            user, item = pairs.row(at)
            self.problems.add(
                self.path,
                Rule.PAIRS,
                f"record {start + at - carried} repeats user {user} and item {item}, expected each pair once",
            )
        self._pairs = pairs.filter(pl.col(USER) == pairs[USER][-1]).unique()

    def _count(self, block: pl.DataFrame) -> None:
        self.rows += block.height
        self.positives += int(block[POSITIVE].sum())
        if TIME in block.columns:
            first, last = block.select(pl.col(TIME).min().alias("first"), pl.col(TIME).max().alias("last")).row(0)
            self.first_time = first if self.first_time is None else min(first, self.first_time)
            self.last_time = last if self.last_time is None else max(last, self.last_time)


class LogRows:
    """Set of rows of the log, from `first` on, of at most `n`: a bit for each."""

    def __init__(self, first: int, n: int) -> None:
        self.first, self.n = first, n
        self._bits = np.zeros((n + 7) // 8, np.uint8)

    def add(self, rows: pl.Series) -> int | None:
        """Add the rows (n,) that lie in the range, and return the place of the first that is there already, or None."""
        inside = rows.is_between(self.first, self.first + self.n - 1)
        numbers: Ints = (rows - self.first).to_numpy()
        numbers = np.where(inside.to_numpy(), numbers, 0)
        byte, bit = numbers >> 3, (1 << (numbers & 7)).astype(np.uint8)
        known = (self._bits[byte] & bit) > 0
        repeated = inside & (pl.Series(known) | ~rows.is_first_distinct())
        kept = inside.to_numpy()
        np.bitwise_or.at(self._bits, byte[kept], bit[kept])
        return first_true(repeated)
