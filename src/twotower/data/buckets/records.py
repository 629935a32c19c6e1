"""Rules of docs/prepared-format.md by number, and the check of a bucket's records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def record_problems(
    frame: pl.DataFrame, bucket: Bucket, facts: BucketFacts, order: Sequence[str], pairs: bool
) -> Iterator[tuple[Rule, str]]:
    """Yield the rules that the records of a bucket break, of which any columns are given, and how: values, ranges,
    order and pairs. `order` are the columns by which the records rise; `pairs` is True if those of user and item are
    checked. If a value is missing, the rest is not checked."""
    for name in frame.columns:
        if frame[name].null_count() and not name.startswith((VALUE_PREFIX, CONTEXT_PREFIX)):
            yield Rule.VALUES, bad_value(frame, name, frame[name].is_null(), "a value")
            return
    for rule, name, first, after, what in (
        (Rule.RANGES, USER, *bucket.users, "a row"),
        (Rule.RANGES, ITEM, 0, facts.items, "a row"),
        (Rule.ROWS, ROW, 0, facts.read, "a row"),
        (Rule.VALUES, PART, 0, len(PART_NAMES), "a part"),
    ):
        if name in frame.columns:
            bad = ~frame[name].cast(pl.Int64).is_between(first, after - 1)
            if found := bad_value(frame, name, bad, f"{what} from {first} to {after - 1}"):
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
        repeated = ~frame.select(pl.struct(USER, ITEM).is_first_distinct()).to_series()
        if (at := first_true(repeated)) is not None:
            user, item = frame[USER][at], frame[ITEM][at]
            yield Rule.PAIRS, f"record {at} repeats user {user} and item {item}, expected each pair once"
    if frame.height != bucket.rows:
        what = f"number of records {frame.height:,}, expected {bucket.rows:,} as in {layout.BUCKET_FACTS}"
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
