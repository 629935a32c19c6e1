"""Check of a folder of buckets against docs/prepared-format.md, as a stream.

Memory holds a block of records, the pairs of one user, the ids of the items, and 128 MiB of bits for rows of the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from twotower.arrays.types import Ints
from twotower.data.buckets import BucketFacts, Buckets, column_problem, missing_column, user_hashes
from twotower.data.buckets.records import BucketRecords, Problems, Rule, first_true
from twotower.data.interaction_columns import POSITIVE, ROW, TIME, USER
from twotower.data.tables import side_columns
from twotower.data.times import plausible_range
from twotower.errors import RunError
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.files import layout
from twotower.files.readers import read_checked
from twotower.progress import JobProgress

log = logging.getLogger(__name__)

ID_TYPES = (pl.Int64, pl.UInt64, pl.String)


def check_buckets(
    folder: Path | str, schema: Schema | None = None, *, block_rows: int = 2**17, window_rows: int = 2**30
) -> list[str]:
    """Return the problems of a folder of buckets, one line each: file, rule of docs/prepared-format.md, the first
    record that breaks it, and what is expected. A folder that meets the contract has none.

    With a schema, the tables and buckets need the columns that it names. `block_rows` records are read at a time, and
    `window_rows` rows of the log are searched at a time for repeated ones. Raises RunError if there is no such folder.
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
    _Check(buckets, schema, problems, block_rows).run(window_rows)
    return problems.lines


class _Check:
    """Check of a folder whose facts can be read. Reads `block_rows` records at a time."""

    def __init__(self, buckets: Buckets, schema: Schema | None, problems: Problems, block_rows: int) -> None:
        self.buckets, self.facts, self.schema, self.problems = buckets, buckets.facts, schema, problems
        self.block_rows = block_rows

    def run(self, window_rows: int) -> None:
        """Add all problems of the folder."""
        path = self.buckets.folder / layout.BUCKET_FACTS
        if absent := sorted(set(BucketFacts.model_fields) - self.facts.model_fields_set):
            self.problems.add(path, Rule.FACTS, f"no key '{absent[0]}'")
        if self.schema and (problem := self.facts.difference(self.schema)):
            self.problems.add(path, Rule.SCHEMA, problem)
        place, names = self.buckets.folder / layout.BUCKET_FOLDER, {b.file for b in self.facts.buckets}
        for found in sorted(place.iterdir()) if place.is_dir() else ():
            if found.name not in names and found.name[0] not in "._":  # those names belong to engines
                what = f"not a bucket of {layout.BUCKET_FACTS}, expected no other files; remove it"
                self.problems.add(found, Rule.FILES, what)
        for side in SIDES:
            self._check_table(side)
        self._check_interactions(window_rows)

    def _columns(self, path: Path) -> dict[str, pl.DataType]:
        """Return the columns of a Parquet file; none, and a problem, for a file that cannot be read."""
        if not path.is_file():
            what = "a folder or special file, expected a file" if path.exists() else "no such file"
            self.problems.add(path, Rule.FILES, what)
            return {}
        try:
            found = read_checked(path, lambda p: pl.scan_parquet(p, glob=False).collect_schema())
        except RunError as e:
            self._unreadable(path, e)
            return {}
        if not found:
            self.problems.add(path, Rule.FILES, "no columns")
        return dict(found)

    def _unreadable(self, path: Path, error: RunError) -> None:
        self.problems.add(path, Rule.FILES, str(error).removeprefix(f"{path}: "))

    def _blocks(self, path: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Yield the records of a Parquet file in blocks. Raises RunError."""

        def read(path: Path) -> pl.DataFrame:
            return pl.scan_parquet(path, glob=False).select(columns).slice(start, self.block_rows).collect()

        start = 0
        while (block := read_checked(path, read)).height:
            yield block
            start += block.height

    def _check_table(self, side: SideName) -> None:
        """Check the table of a side: columns, ids, order and number."""
        path = self.buckets.table(side)
        if not (columns := self._columns(path)):
            return
        names, named = list(columns), side_columns(side, self.schema) if self.schema else []
        key = names[0]
        if named and key != named[0]:
            what = f"first column '{key}', expected '{named[0]}', the id of the schema"
            self.problems.add(path, Rule.FEATURES, what)
        if absent := [name for name in named[1:] if name not in names]:
            what = f"no column '{absent[0]}', which the schema names (found: {', '.join(names)})"
            self.problems.add(path, Rule.FEATURES, what)
        if columns[key] not in ID_TYPES:
            what = f"first column '{key}' holds {columns[key]}, expected Int64, UInt64 or String"
            self.problems.add(path, Rule.IDS, what)
            return
        try:
            rows = (self._check_users if side == "user" else self._check_items)(path, names)
        except RunError as e:
            self._unreadable(path, e)
            return
        expected = self.facts.users if side == "user" else self.facts.items
        if rows not in (None, expected):
            what = f"number of {side}s {rows:,}, expected {expected:,} as in {layout.BUCKET_FACTS}"
            self.problems.add(path, Rule.COUNTS, what)

    def _check_users(self, path: Path, columns: list[str]) -> int | None:
        """Check ids and order of the users. Return their number; None if an id is null."""
        rows, last = 0, pl.DataFrame()
        for block in self._blocks(path, columns):
            if self._has_null(path, rows, ids := block[columns[0]]):
                return None
            users = pl.DataFrame({"id": ids, "hash": user_hashes(ids)})
            users = pl.concat([last, users]) if rows else users
            before, after = users[:-1], users[1:]
            place = rows + 1 - last.height  # of the first record of `after`
            same = after["hash"] == before["hash"]
            if (at := first_true(same & (after["id"] == before["id"]))) is not None:
                self._add_repeated(path, place + at, after["id"][at])
            if (at := first_true((after["hash"] < before["hash"]) | (same & (after["id"] < before["id"])))) is not None:
                (one, hash_one), (two, hash_two) = before.row(at), after.row(at)
                what = f"record {place + at} has id '{two}' of hash {hash_two} after '{one}' of hash {hash_one}"
                expected = "expected ascending hashes, and ascending ids of one hash"
                self.problems.add(path, Rule.USER_ORDER, f"{what}, {expected}")
            last = users.tail(1)
            rows += block.height
        return rows

    def _check_items(self, path: Path, columns: list[str]) -> int | None:
        """Check the ids of the items, all in memory. Return their number; None if one is null."""
        blocks = [block[columns[0]] for block in self._blocks(path, columns)]
        if not blocks:
            return 0
        if self._has_null(path, 0, ids := pl.concat(blocks)):
            return None
        if (at := first_true(~ids.is_first_distinct())) is not None:
            self._add_repeated(path, at, ids[at])
        return len(ids)

    def _add_repeated(self, path: Path, record: int, own: int | str) -> None:
        self.problems.add(path, Rule.IDS, f"record {record} repeats id '{own}', expected each id once")

    def _has_null(self, path: Path, start: int, ids: pl.Series) -> bool:
        """Return True, and add a problem, if an id is null."""
        at = first_true(ids.is_null())
        if at is not None:
            self.problems.add(path, Rule.IDS, f"record {start + at} has no id, expected one")
        return at is not None

    def _check_interactions(self, window_rows: int) -> None:
        """Check the buckets, and what all of them have together."""
        progress = JobProgress(log, "interactions checked", self.facts.rows)
        common: tuple[Path, dict[str, pl.DataType]] | None = None
        whole: list[tuple[Path, pl.DataFrame]] = []
        for bucket in self.facts.buckets:
            path = self.buckets.file(bucket)
            columns = self._columns(path)
            problem = column_problem(columns) if columns else ""
            if problem:
                self.problems.add(path, Rule.COLUMNS, problem)
            if problem or not columns:
                continue
            common = common or (path, columns)
            if columns != common[1]:
                what = f"{_shown(columns)}, expected those of {common[0].name}: {_shown(common[1])}"
                self.problems.add(path, Rule.SAME_COLUMNS, what)
            if self.schema and (problem := missing_column(columns, self.schema)):
                self.problems.add(path, Rule.SCHEMA, problem)
            order = [name for name in (USER, TIME, ROW) if name in columns]
            records = BucketRecords(path, bucket, self.facts, self.problems, order, pairs=True)
            try:
                if (found := self._check_records(records, columns, window_rows)) is not None:
                    whole.append((path, found))
            except RunError as e:
                self._unreadable(path, e)
            progress.advance(records.rows)
        if len(whole) == len(self.facts.buckets):
            self._check_totals(pl.concat([found for _, found in whole]))
        self._check_rows(whole, window_rows)

    def _check_records(
        self, records: BucketRecords, columns: dict[str, pl.DataType], window_rows: int
    ) -> pl.DataFrame | None:
        """Check the records of a bucket. Return facts of each block: its positives, its earliest and latest time, and
        the windows of `window_rows` rows of the log that it has rows of; None for a bucket without a value."""
        times = plausible_range() if self.schema and self.schema.time and self.schema.time_unit != "order" else None
        time = pl.col(TIME) if TIME in columns else pl.lit(None, pl.Int64)
        row = pl.col(ROW).filter(pl.col(ROW).is_between(0, self.facts.read - 1))
        facts = [
            pl.col(POSITIVE).sum(), time.min().alias("first_time"), time.max().alias("last_time"),
            (row // window_rows).unique().implode().alias("windows"),
        ]  # fmt: skip
        found = [pl.DataFrame(schema=columns).select(facts)]
        for block in self._blocks(records.path, list(columns)):
            if times and TIME in columns:
                what = "microseconds since 1970, from 1990 to tomorrow"
                records.add_value(Rule.SCHEMA, block, TIME, ~block[TIME].is_between(*times), what)
            if not records.check(block):
                return None
            found.append(block.select(facts))
        records.check_number()
        return pl.concat(found)

    def _check_totals(self, found: pl.DataFrame) -> None:
        for key, given, value in (
            ("positives", self.facts.positives, found[POSITIVE].sum()),
            ("first_time", self.facts.first_time, found["first_time"].min()),
            ("last_time", self.facts.last_time, found["last_time"].max()),
        ):
            if given != value:
                what = f"{key} {given}, expected {value!r} as in the buckets"
                self.problems.add(self.buckets.folder / layout.BUCKET_FACTS, Rule.COUNTS, what)

    def _check_rows(self, whole: list[tuple[Path, pl.DataFrame]], window_rows: int) -> None:
        """Add the rows of the log that two interactions have. Each window of rows is a pass over the column of the
        rows."""
        windows = [(path, set(found["windows"].explode().drop_nulls())) for path, found in whole]
        for window in sorted(set[int]().union(*(own for _, own in windows))):
            first = window * window_rows
            rows = LogRows(first, min(window_rows, self.facts.read - first))
            for path in (path for path, own in windows if window in own):
                start = 0
                for block in self._blocks(path, [ROW]):
                    if (at := rows.add(block[ROW])) is not None:
                        what = f"record {start + at} has {ROW} {block[ROW][at]}, which another has"
                        self.problems.add(path, Rule.ROWS, f"{what}; expected each row once")
                    start += block.height


class LogRows:
    """Set of rows of the log, from `first` on, of at most `n`: a bit for each."""

    def __init__(self, first: int, n: int) -> None:
        self.first, self.n = first, n
        self._bits = np.zeros((n + 7) // 8, np.uint8)

    def add(self, rows: pl.Series) -> int | None:
        """Add the rows (n,) that lie in the range, and return the place of the first that is there already, or None."""
        kept = rows.is_between(self.first, self.first + self.n - 1).to_numpy()
        numbers: Ints = np.where(kept, (rows - self.first).to_numpy(), 0)
        byte, bit = numbers >> 3, (1 << (numbers & 7)).astype(np.uint8)
        known = (self._bits[byte] & bit) > 0
        np.bitwise_or.at(self._bits, byte[kept], bit[kept])
        return first_true(kept & (known | ~rows.is_first_distinct().to_numpy()))


def _shown(columns: dict[str, pl.DataType]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(columns.items()))
