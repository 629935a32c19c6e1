"""Buckets of a log: pieces with rows for ids, sorted by polars, one bucket at a time."""

from __future__ import annotations

import logging
import platform
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import polars as pl

from twotower.arrays.types import Ints
from twotower.data.buckets import (
    Bucket,
    BucketFacts,
    BucketFile,
    Buckets,
    LogColumns,
    Segment,
    in_bucket_order,
    in_user_order,
)
from twotower.data.interaction_columns import POSITIVE, TIME, USER
from twotower.data.labels import no_positives
from twotower.data.parts import tell_of_repeats_at_most
from twotower.data.prepare.log_pieces import Log, Sides, counts_of_users, write_pieces
from twotower.data.prepare.options import PrepareOptions
from twotower.data.reading import times
from twotower.data.reading.readers import read_file, table_errors
from twotower.data.reading.table_path import TablePath
from twotower.data.reading.table_paths import table_files
from twotower.data.reading.text_files import Reading
from twotower.data.tables import (
    CheckedLog,
    kept_of_repeated,
    no_known_rows,
    nothing_to_learn,
    side_columns,
    with_id_name,
)
from twotower.errors import DataError, RunError
from twotower.features.side import SIDES, SideName
from twotower.files import layout
from twotower.files.readers import write_parquet
from twotower.files.resumable import make_once
from twotower.progress import JobProgress, Summary
from twotower.version import __version__

log = logging.getLogger(__name__)

_Shard: TypeAlias = tuple[int, tuple[int, int]]
"""Number of a bucket, and its first user row and the one after its last."""


def make_buckets(source: Log, folder: Path, work: Path, options: PrepareOptions) -> Buckets:
    """Write the buckets of a log into a folder, those that it lacks; `work` is for temporary files.

    Raises DataError for a log of no use, ConfigError for too little memory, OSError."""
    if (folder / layout.BUCKET_FACTS).exists():
        return Buckets.open(folder)
    source = source.copied(work / "text")
    pieces, scratch, interactions = work / "pieces", work / "scratch", folder / layout.BUCKET_FOLDER
    for path in (pieces, scratch, interactions):
        path.mkdir(exist_ok=True)
    sides, paths, checked = _write_pieces(source, folder, pieces, options)
    counts = counts_of_users(paths, sides["user"].height)
    if not counts.any():
        raise no_known_rows()
    schema, busiest = source.schema, int(np.argmax(counts))
    options.check_memory(int(counts[busiest]), f"the history of user '{sides['user'][schema.user_id][busiest]}'")
    found, progress = list[Bucket](), JobProgress(log, "interactions sorted", source.rows)

    def add(sorted_: SortedBucket) -> None:
        users = sorted_.bucket.users
        (progress.advance if sorted_.is_new else progress.skip)(int(counts[users[0] : users[1]].sum()))
        found.append(sorted_.bucket)

    sorting = Sorting(tuple(paths), bool(schema.time), schema.duplicates == "keep", scratch, interactions)
    options.job_engine().run(sorting, list(enumerate(user_ranges(counts, options.bucket_rows))), add)
    found.sort(key=lambda bucket: bucket.users)
    buckets = Buckets(folder, _facts(source, sides, tuple(found), interactions, int(counts.sum()), checked))
    buckets.save()
    for path in (pieces, scratch, work / "text"):
        shutil.rmtree(path, ignore_errors=True)
    return buckets


@dataclass(frozen=True)
class SortedBucket:
    """A finished bucket. `is_new` tells if this call has made it."""

    bucket: Bucket
    is_new: bool


@dataclass(frozen=True)
class Sorting:
    """Sorts the buckets of a log, or of a later segment of it, in any process that sees its pieces."""

    pieces: tuple[Path, ...]
    is_timed: bool
    keeps_repeats: bool
    work: Path
    to: Path
    segment: int = 0
    types: Mapping[str, pl.DataType] = field(default_factory=dict)
    """Types of columns that are other ones in the pieces."""

    def __call__(self) -> Callable[[_Shard], SortedBucket]:
        """Return the function that sorts a bucket in this process. Raises RunError."""
        if not self.to.is_dir() or not all(path.exists() for path in self.pieces):
            raise RunError(
                f"{self.to}: the host {platform.node()} does not see the files of the call; name a folder on a file "
                "system that all hosts share, at the same path"
            )
        return partial(self._write, Path(tempfile.mkdtemp(dir=self.work)))

    def _write(self, scratch: Path, shard: _Shard) -> SortedBucket:
        """Return a bucket by number and range of users, which is written unless it is there. Raises RunError."""
        n, users = shard
        path = self.to / f"{n:05d}{f'-{self.segment}' if self.segment else ''}.parquet"
        try:
            is_new = make_once(path, lambda to: write_parquet(self._sorted(users), to, compression="lz4"), scratch)
        except OSError as e:
            raise RunError(f"{self.to}: cannot be written ({e.strerror or e}); call again to go on") from e
        file = BucketFile(file=path.name, segment=self.segment, rows=_height(path))
        return SortedBucket(Bucket(users=users, files=(file,)), is_new)

    def _sorted(self, users: tuple[int, int]) -> pl.DataFrame:
        """Return the interactions of users in the order of a bucket: polars reads the row groups of the pieces that
        have these users."""
        own = pl.scan_parquet([*self.pieces], glob=False).filter(pl.col(USER).is_between(users[0], users[1] - 1))
        return in_bucket_order(own.collect().cast(pl.Schema(self.types)), self.is_timed, self.keeps_repeats)


def _write_pieces(
    source: Log, folder: Path, pieces: Path, options: PrepareOptions
) -> tuple[Sides, list[Path], CheckedLog]:
    """Write the tables of both sides and the pieces, those that are missing; return the tables, the pieces' files, and
    the log as it was looked at."""
    tables, checked = {side: folder / layout.table(side) for side in SIDES}, CheckedLog(source.schema)
    found = {side: pl.read_parquet(path, glob=False) for side, path in tables.items() if path.exists()}
    known = len(found) == len(SIDES)
    look(source, checked, known)
    if not known:
        found, versions = _settled_sides(source, checked)
        for side, of_side in versions.items():
            make_once(folder / layout.versions(side), partial(write_parquet, of_side))
        for side, path in tables.items():
            make_once(path, partial(write_parquet, found[side]))
    for note in checked.notes:
        log.info(note)
    progress = JobProgress(log, "interactions read", source.rows)
    return found, write_pieces(source, checked, found, pieces, options.threads, progress), checked


def look(source: Log, checked: CheckedLog, known: bool = False) -> None:
    """Look at all pieces of a log, as `CheckedLog.look`. Raises DataError."""
    progress = JobProgress(log, "interactions looked at", source.rows)

    def read(columns: list[str]) -> Iterator[pl.DataFrame]:
        for piece in source.pieces:
            yield source.read(piece, columns)
            progress.advance(piece.rows)

    checked.look(read, known)


def given_table(source: Log, side: SideName, notes: list[str]) -> tuple[pl.DataFrame, bool] | None:
    """Return the table of a side, and whether its ids or those of the log were read from text; None without one.
    `notes` receive the columns that are not kept. Raises DataError."""
    schema = source.schema
    if not (table := getattr(source.data, f"{side}s")):
        return None
    wanted = [schema.table_id(side), *side_columns(side, schema)[1:], *filter(None, [schema.valid_from])]
    frame = with_id_name(read_file(table, Reading.of(schema, side, source.data.format), wanted), side, schema)
    paths = table_files(table)
    notes += _not_kept(side, paths, frame, wanted)
    for path in paths:
        source.check_unchanged(f"{side}s", path)
    return frame, paths[0].is_text or source.is_text


def _settled_sides(source: Log, checked: CheckedLog) -> tuple[Sides, Sides]:
    """Return the tables of both sides, the users in the order of their rows, and those of the versions of sides that
    have some. Raises DataError."""
    schema = source.schema
    found, versions = checked.sides({side: given_table(source, side, checked.notes) for side in SIDES})
    found = {side: table.select(side_columns(side, schema)) for side, table in found.items()}
    found["user"] = in_user_order(found["user"], schema.user_id)
    return found, {side: every.select(*side_columns(side, schema), times.TIME) for side, every in versions.items()}


def _not_kept(side: SideName, paths: list[TablePath], frame: pl.DataFrame, wanted: Container[str]) -> list[str]:
    """Return a line about the columns of a table that the schema does not name, none without such. A frame of text
    files has all columns."""
    names = dict.fromkeys(frame.columns)
    for path in () if paths[0].is_text else paths:
        with table_errors(path):
            names |= dict.fromkeys(path.scan().collect_schema().names())
    left = ", ".join(f"'{name}'" for name in names if name not in wanted)
    return (
        [f"{side}s: not kept, as the schema does not name them, so that no filter or slice reads them: {left}"]
        if left
        else []
    )


def user_ranges(counts: Ints, bucket_rows: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of users with at most `bucket_rows` of the interactions `counts` (U,), or of one user with more."""
    ends, start = np.cumsum(counts), 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + bucket_rows, "right")))
        yield start, end
        start = end


def _height(path: Path) -> int:
    return int(pl.scan_parquet(path, glob=False).select(pl.len()).collect().item())


def _facts(
    source: Log,
    sides: Sides,
    buckets: tuple[Bucket, ...],
    folder: Path,
    of_pieces: int,
    checked: CheckedLog,
) -> BucketFacts:
    """Return the facts of finished buckets, into which `of_pieces` interactions were sorted. Raises DataError for
    repeated pairs, if not allowed, or without a positive row."""
    schema, kept = source.schema, sum(b.rows for b in buckets)
    log_summary(source, checked, of_pieces, kept, schema.duplicates)
    positives, first, last, _ = file_sums([folder / b.name for b in buckets if b.rows], bool(schema.time))
    if not positives:
        if not schema.label:
            raise nothing_to_learn(schema)
        raise no_positives(schema)
    return BucketFacts(
        maker=f"twotower {__version__}", duplicates=schema.duplicates, log=LogColumns.of(schema),
        segments=(segment_of(source, sides, checked),),
        rows=kept, positives=positives, buckets=buckets, first_time=first, last_time=last,
    )  # fmt: skip


def segment_of(source: Log, sides: Sides, checked: CheckedLog, before: Segment | None = None) -> Segment:
    """Return the segment of a log with the tables of both sides, after the one `before`. Raises DataError."""
    users, items, read = (before.users[1], before.items[1], before.read[1]) if before else (0, 0, 0)
    sources = tuple(file.digest() for file in source.files)
    for file in source.files:
        source.check_unchanged("interactions", file.path)
    return Segment(
        users=(users, sides["user"].height), items=(items, sides["item"].height), read=(read, read + source.rows),
        sources=sources, times=checked.times.kind if checked.times else "",
    )  # fmt: skip


def log_summary(source: Log, checked: CheckedLog, of_pieces: int, kept: int, duplicates: str) -> None:
    """Log the numbers of interactions that were read, left out and `kept`, of which the pieces have `of_pieces`. Raises
    DataError for repeated pairs with `duplicates` "error"."""
    schema, repeated, left_out = source.schema, of_pieces - kept, checked.left_out
    if repeated and duplicates == "error":
        raise DataError(
            f"interactions: {repeated} rows repeat a pair of user and item; drop them or set schema.duplicates = "
            "'last' or 'keep'"
        )
    summary = Summary("interactions", source.rows)
    for reason, rows in left_out.items():
        summary.drop(reason, rows)
    summary.drop("rows have ids that users or items lack", source.rows - sum(left_out.values()) - of_pieces)
    summary.drop(f"rows repeated a pair of user and item, {kept_of_repeated(schema)}", repeated)
    log.info(str(summary))
    tell_of_repeats_at_most(repeated, schema, source.split)


def file_sums(
    paths: Sequence[Path], is_timed: bool, until: int | None = None
) -> tuple[int, int | None, int | None, int]:
    """Return the number of positive interactions of some files of buckets, the earliest and the latest time, None
    without times, and the number of those that are older than the time `until`."""
    time = pl.col(TIME) if is_timed else pl.lit(None, pl.Int64)
    sums = (
        pl.col(POSITIVE).sum(),
        time.min().alias("first"),
        time.max().alias("last"),
        (time < pl.lit(until, pl.Int64)).sum().alias("n"),
    )
    found = pl.concat(pl.scan_parquet(path, glob=False).select(sums).collect() for path in paths)
    return (
        *found.select(pl.col(POSITIVE).sum(), pl.col("first").min(), pl.col("last").max(), pl.col("n").sum()).row(0),
    )
