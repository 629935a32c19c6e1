"""Check of a folder of buckets against docs/prepared-format.md, as a stream.

Memory holds a block of records, the pairs of one user, the ids of the items, and 128 MiB of bits for rows of the log.
"""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl

from twotower.data.buckets import BucketFacts, Buckets, column_problem, missing_column
from twotower.data.buckets.records import BucketRecords, LogRows
from twotower.data.buckets.rules import Problems, Rule, read_blocks
from twotower.data.buckets.tables import check_table
from twotower.data.interaction_columns import ROW
from twotower.data.times import plausible_range
from twotower.errors import RunError
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.files import layout
from twotower.progress import JobProgress

log = logging.getLogger(__name__)


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
    _check_facts(path, buckets.facts, schema, problems)
    _check_names(buckets, problems)
    for side in SIDES:
        check_table(buckets, side, schema, problems, block_rows)
    _check_interactions(buckets, schema, problems, block_rows, window_rows)
    return problems.lines


def _check_facts(path: Path, facts: BucketFacts, schema: Schema | None, problems: Problems) -> None:
    """Add the problems of buckets.json that show without another file."""
    if absent := sorted(set(BucketFacts.model_fields) - facts.model_fields_set):
        problems.add(path, Rule.FACTS, f"no key '{absent[0]}'")
    if schema and (problem := facts.difference(schema)):
        problems.add(path, Rule.SCHEMA, problem)


def _check_names(buckets: Buckets, problems: Problems) -> None:
    """Add the files in the folder of the buckets that are no bucket; names that begin with '_' or '.' belong to
    engines."""
    place, names = buckets.folder / layout.BUCKET_FOLDER, {b.file for b in buckets.facts.buckets}
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.name not in names and path.name[0] not in "._":
            problems.add(path, Rule.FILES, f"not a bucket of {layout.BUCKET_FACTS}, expected no other files; remove it")


def _check_interactions(
    buckets: Buckets, schema: Schema | None, problems: Problems, block_rows: int, window_rows: int
) -> None:
    facts = buckets.facts
    progress = JobProgress(log, "interactions checked", facts.rows)
    times = plausible_range() if schema and schema.time and schema.time_unit != "order" else None
    common: tuple[Path, dict[str, pl.DataType]] | None = None
    found: list[BucketRecords] = []
    for bucket in facts.buckets:
        path = buckets.file(bucket)
        columns = problems.columns(path)
        problem = column_problem(columns) if columns else ""
        if problem:
            problems.add(path, Rule.COLUMNS, problem)
        if problem or not columns:
            continue
        common = common or (path, columns)
        if columns != common[1]:
            what = f"{_shown(columns)}, expected those of {common[0].name}: {_shown(common[1])}"
            problems.add(path, Rule.SAME_COLUMNS, what)
        _check_schema(path, list(columns), schema, problems)
        records = BucketRecords(path, bucket, facts, problems)
        try:
            if records.check(list(columns), times, block_rows, window_rows):
                found.append(records)
        except RunError as e:
            problems.unreadable(path, e)
        progress.advance(records.rows)
    if len(found) == len(facts.buckets):
        _check_totals(buckets, found, problems)
    _check_rows(buckets, found, problems, block_rows, window_rows)


def _shown(columns: dict[str, pl.DataType]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(columns.items()))


def _check_schema(path: Path, columns: list[str], schema: Schema | None, problems: Problems) -> None:
    """Add the problem of a bucket that lacks a column which the schema needs."""
    if schema and (problem := missing_column(columns, schema)):
        problems.add(path, Rule.SCHEMA, problem)


def _check_totals(buckets: Buckets, found: list[BucketRecords], problems: Problems) -> None:
    facts = buckets.facts
    times = [t for records in found for t in (records.first_time, records.last_time) if t is not None]
    for key, given, value in (
        ("positives", facts.positives, sum(records.positives for records in found)),
        ("first_time", facts.first_time, min(times, default=None)),
        ("last_time", facts.last_time, max(times, default=None)),
    ):
        if given != value:
            what = f"{key} {given}, expected {value} as in the buckets"
            problems.add(buckets.folder / layout.BUCKET_FACTS, Rule.COUNTS, what)


def _check_rows(
    buckets: Buckets, found: list[BucketRecords], problems: Problems, block_rows: int, window_rows: int
) -> None:
    """Add the rows of the log that two interactions have. Each window of rows is a pass over the column of the rows."""
    for window in sorted({w for records in found for w in records.windows}):
        first = window * window_rows
        rows = LogRows(first, min(window_rows, buckets.facts.read - first))
        for records in (r for r in found if window in r.windows):
            for start, block in read_blocks(records.path, [ROW], block_rows):
                if (at := rows.add(block[ROW])) is not None:
                    what = f"record {start + at} has {ROW} {block[ROW][at]}, which another has; expected each row once"
                    problems.add(records.path, Rule.ROWS, what)
