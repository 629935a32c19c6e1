"""Buckets of a log: pieces with rows for ids, sorted by polars, one bucket at a time."""

from __future__ import annotations

import logging
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import polars as pl

from twotower.arrays.types import Ints
from twotower.data.buckets import Bucket, BucketFacts, Buckets, LogColumns
from twotower.data.interaction_columns import ITEM, POSITIVE, ROW, TIME, USER
from twotower.data.parts import tell_of_repeats_at_most
from twotower.data.prepare.log_pieces import Log, Sides, counts_of_users, write_pieces
from twotower.data.prepare.options import PrepareOptions
from twotower.data.prepare.sides import settle_sides
from twotower.data.tables import kept_of_repeated, no_known_rows, nothing_to_learn
from twotower.errors import DataError, RunError
from twotower.features.side import SIDES
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
    sides, paths, left_out = _write_pieces(source, folder, pieces, options)
    counts = counts_of_users(paths, sides["user"].height)
    if not counts.any():
        raise no_known_rows()
    schema, busiest = source.schema, int(np.argmax(counts))
    options.check_memory(int(counts[busiest]), f"the history of user '{sides['user'][schema.user_id][busiest]}'")
    found, progress = list[Bucket](), JobProgress(log, "interactions sorted", source.rows)

    def add(sorted_: _SortedBucket) -> None:
        users = sorted_.bucket.users
        (progress.advance if sorted_.is_new else progress.skip)(int(counts[users[0] : users[1]].sum()))
        found.append(sorted_.bucket)

    sorting = _Sorting(tuple(paths), bool(schema.time), schema.duplicates == "keep", scratch, interactions)
    options.job_engine().run(sorting, list(enumerate(_ranges(counts, options.bucket_rows))), add)
    found.sort(key=lambda bucket: bucket.users)
    buckets = Buckets(folder, _facts(source, sides, tuple(found), interactions, int(counts.sum()), left_out))
    buckets.save()
    for path in (pieces, scratch, work / "text"):
        shutil.rmtree(path, ignore_errors=True)
    return buckets


@dataclass(frozen=True)
class _SortedBucket:
    """A finished bucket. `is_new` tells if this call has made it."""

    bucket: Bucket
    is_new: bool


@dataclass(frozen=True)
class _Sorting:
    """Sorts the buckets of a log, in any process that sees its pieces."""

    pieces: tuple[Path, ...]
    is_timed: bool
    keeps_repeats: bool
    work: Path
    to: Path

    def __call__(self) -> Callable[[_Shard], _SortedBucket]:
        """Return the function that sorts a bucket in this process. Raises RunError."""
        if not self.to.is_dir() or not all(path.exists() for path in self.pieces):
            raise RunError(
                f"{self.to}: the host {platform.node()} does not see the files of the call; name a folder on a file "
                "system that all hosts share, at the same path"
            )
        return partial(self._write, Path(tempfile.mkdtemp(dir=self.work)))

    def _write(self, scratch: Path, shard: _Shard) -> _SortedBucket:
        """Return a bucket by number and range of users, which is written unless it is there. Raises RunError."""
        n, users = shard
        path = self.to / f"{n:05d}.parquet"
        try:
            is_new = make_once(path, lambda to: write_parquet(self._sorted(users), to, compression="lz4"), scratch)
        except OSError as e:
            raise RunError(f"{self.to}: cannot be written ({e.strerror or e}); call again to go on") from e
        return _SortedBucket(Bucket(file=path.name, users=users, rows=_height(path)), is_new)

    def _sorted(self, users: tuple[int, int]) -> pl.DataFrame:
        """Return the interactions of users in the order of a bucket: polars reads the row groups of the pieces that
        have these users."""
        own = pl.scan_parquet(self.pieces, glob=False).filter(pl.col(USER).is_between(users[0], users[1] - 1))
        found = own.collect().sort(USER, *([TIME] if self.is_timed else []), ROW)
        return found if self.keeps_repeats else found.unique([USER, ITEM], keep="last", maintain_order=True)


def _write_pieces(
    source: Log, folder: Path, pieces: Path, options: PrepareOptions
) -> tuple[Sides, list[Path], Mapping[str, int]]:
    """Write the tables of both sides and the pieces, those that are missing; return the tables, the pieces' files, and
    the numbers of interactions that are left out, by reason."""
    tables, notes = {side: folder / layout.table(side) for side in SIDES}, list[str]()
    known = {side: pl.read_parquet(path, glob=False) for side, path in tables.items() if path.exists()}
    sides, versions, times, left_out = settle_sides(source, known if len(known) == len(SIDES) else None, notes)
    for note in notes:
        log.info(note)
    for side, of_side in versions.items():
        make_once(folder / layout.versions(side), partial(write_parquet, of_side))
    for side, path in tables.items():
        make_once(path, partial(write_parquet, sides[side]))
    progress = JobProgress(log, "interactions read", source.rows)
    return sides, write_pieces(source, sides, times, pieces, options.threads, progress), left_out


def _ranges(counts: Ints, bucket_rows: int) -> Iterator[tuple[int, int]]:
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
    left_out: Mapping[str, int],
) -> BucketFacts:
    """Return the facts of finished buckets; `of_pieces` interactions were sorted, others `left_out` by reason. Raises
    DataError for repeated pairs, if not allowed, or without a positive row."""
    schema, kept = source.schema, sum(b.rows for b in buckets)
    repeated = of_pieces - kept
    if repeated and schema.duplicates == "error":
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
    times = [pl.col(TIME).min().alias("first"), pl.col(TIME).max().alias("last")] if schema.time else []
    each = [
        pl.scan_parquet(folder / b.file, glob=False).select(pl.col(POSITIVE).sum(), *times).collect()
        for b in buckets
        if b.rows
    ]
    of_all = pl.concat(each)
    if not (positives := int(of_all[POSITIVE].sum())):
        if not schema.label:
            raise nothing_to_learn(schema)
        raise DataError(
            f"interactions: no row has '{schema.label}' above {schema.positive_above:g}; set schema.positive_above"
        )
    return BucketFacts(
        maker=f"twotower {__version__}", duplicates=schema.duplicates, log=LogColumns.of(schema),
        users=sides["user"].height,
        items=sides["item"].height, read=source.rows, rows=kept, positives=positives, buckets=buckets,
        first_time=of_all["first"].min() if times else None, last_time=of_all["last"].max() if times else None,
    )  # fmt: skip
