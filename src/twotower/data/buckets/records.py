"""Rules of docs/prepared-format.md by number, and the check of a bucket's records: values, ranges, order and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np
import polars as pl

from twotower.arrays.types import Bools
from twotower.data.buckets import Bucket, BucketFacts
from twotower.data.interaction_columns import CONTEXT_PREFIX, ITEM, PART, ROW, USER, VALUE_PREFIX, WEIGHT
from twotower.data.split import PART_NAMES
from twotower.escaping import escape_controls
from twotower.files import layout


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


class BucketRecords:
    """Records of one bucket, of which any columns are checked, in one block or several."""

    def __init__(
        self, path: Path, bucket: Bucket, facts: BucketFacts, problems: Problems, order: Sequence[str], pairs: bool
    ) -> None:
        """`order` are the columns by which the records rise, `pairs` is True if the pairs of user and item are
        checked."""
        self.path, self.bucket, self.facts, self.problems = path, bucket, facts, problems
        self.order, self.pairs, self.rows = order, pairs and facts.duplicates != "keep", 0
        self._last = pl.DataFrame()  # of the last record read, the columns of the order
        self._pairs = pl.DataFrame()  # pairs of the user of that record

    def check(self, block: pl.DataFrame) -> bool:
        """Add the problems of the next records. Return False if a value is missing; the rest is not checked then."""
        for name in block.columns:
            if block[name].null_count() and not name.startswith((VALUE_PREFIX, CONTEXT_PREFIX)):
                self.add_value(Rule.VALUES, block, name, block[name].is_null(), "a value")
                return False
        last = len(PART_NAMES) - 1
        for rule, name, first, after, what in (
            (Rule.RANGES, USER, *self.bucket.users, "a row"),
            (Rule.RANGES, ITEM, 0, self.facts.items, "a row"),
            (Rule.ROWS, ROW, 0, self.facts.read, "a row"),
            (Rule.VALUES, PART, 0, last + 1, "a part"),
        ):
            if name in block.columns:
                bad = ~block[name].cast(pl.Int64).is_between(first, after - 1)
                self.add_value(rule, block, name, bad, f"{what} from {first} to {after - 1}")
        if WEIGHT in block.columns:
            bad = ~(block[WEIGHT].is_finite() & (block[WEIGHT] >= 0))
            self.add_value(Rule.VALUES, block, WEIGHT, bad, "a finite number of at least 0")
        if block.height:
            self._check_order(block)
            if self.pairs and ITEM in block.columns:
                self._check_pairs(block)
        self.rows += block.height
        return True

    def check_number(self) -> None:
        """Add a problem if other than the bucket's number of records were checked."""
        if self.rows != self.bucket.rows:
            what = f"number of records {self.rows:,}, expected {self.bucket.rows:,} as in {layout.BUCKET_FACTS}"
            self.problems.add(self.path, Rule.COUNTS, what)

    def add_value(self, rule: Rule, block: pl.DataFrame, column: str, bad: pl.Series, expected: str) -> None:
        """Add the problem of the first `bad` value (n,) of the next records, if there is one."""
        if (at := first_true(bad)) is not None:
            value = block[column][at]
            found = "null" if value is None else f"{value}"
            self.problems.add(self.path, rule, f"record {self.rows + at} has {column} {found}, expected {expected}")

    def _check_order(self, block: pl.DataFrame) -> None:
        keys = pl.concat([self._last, block.select(self.order)]) if self._last.height else block.select(self.order)
        earlier: Bools = np.full(keys.height - 1, ROW in self.order)  # no two have one row
        for name in reversed(self.order):
            values = keys[name].to_numpy()
            earlier = (values[1:] < values[:-1]) | ((values[1:] == values[:-1]) & earlier)
        if (at := first_true(earlier)) is not None:
            before, record = (", ".join(f"{n} {v}" for n, v in keys.row(at + k, named=True).items()) for k in (0, 1))
            what = f"has {record} after {before}, expected records sorted by {', '.join(self.order)}"
            self.problems.add(self.path, Rule.ORDER, f"record {self.rows + at + 1 - self._last.height} {what}")
        self._last = keys.tail(1)

    def _check_pairs(self, block: pl.DataFrame) -> None:
        pairs = block.select(USER, ITEM)
        carried = self._pairs.filter(pl.col(USER) == pairs[USER][0]).height if self._pairs.height else 0
        if carried:
            pairs = pl.concat([self._pairs, pairs])
        if (at := first_true(~pairs.select(pl.struct(USER, ITEM).is_first_distinct()).to_series())) is not None:
            user, item = pairs.row(at)
            what = f"record {self.rows + at - carried} repeats user {user} and item {item}, expected each pair once"
            self.problems.add(self.path, Rule.PAIRS, what)
        self._pairs = pairs.filter(pl.col(USER) == pairs[USER][-1]).unique()


def first_true(found: Bools | pl.Series) -> int | None:
    """Return the place of the first True of (n,); None without one. A null is False."""
    flags = found if isinstance(found, pl.Series) else pl.Series(found)
    return flags.arg_max() if flags.any() else None
