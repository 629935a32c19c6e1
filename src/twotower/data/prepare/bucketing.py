"""Buckets of a log: pieces with rows for ids, sorted by an engine."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from twotower.arrays.types import Ints
from twotower.data.buckets import Bucket, BucketFacts, Buckets, LogColumns
from twotower.data.interaction_columns import POSITIVE, TIME
from twotower.data.prepare.engines import choose_engine
from twotower.data.prepare.log_pieces import Log, Sides, counts_of_users, write_pieces
from twotower.data.prepare.options import PrepareOptions
from twotower.data.prepare.sides import settle_sides
from twotower.data.tables import kept_of_repeated, no_known_rows, nothing_to_learn
from twotower.errors import DataError
from twotower.features.side import SIDES
from twotower.files import layout
from twotower.files.readers import write_parquet
from twotower.files.resumable import make_once
from twotower.progress import JobProgress, Summary
from twotower.version import __version__

log = logging.getLogger(__name__)


def make_buckets(source: Log, folder: Path, work: Path, options: PrepareOptions) -> Buckets:
    """Write the buckets of a log into a folder, those that it lacks; `work` is for temporary files.

    Raises DataError for a log of no use, ConfigError for too little memory, OSError."""
    if (folder / layout.BUCKET_FACTS).exists():
        return Buckets.open(folder)
    engine = choose_engine(options.engine, source.rows, options.memory)
    source = source.copied(work / "text")
    pieces, spill, interactions = work / "pieces", work / "spill", folder / layout.BUCKET_FOLDER
    for path in (pieces, spill, interactions):
        path.mkdir(exist_ok=True)
    sides, paths = _write_pieces(source, folder, pieces, options)
    counts = counts_of_users(paths, sides["user"].height)
    if not counts.any():
        raise no_known_rows()
    busiest = int(np.argmax(counts))
    user = sides["user"][source.schema.user_id][busiest]
    options.check_memory(int(counts[busiest]), f"the history of user '{user}'")
    found, progress = list[Bucket](), JobProgress(log, "interactions sorted", source.rows)
    schema = source.schema
    keeps_repeats = schema.duplicates == "keep"
    with engine(paths, bool(schema.time), keeps_repeats, options.memory, options.threads, spill) as sorter:
        for n, users in enumerate(_ranges(counts, options.bucket_rows)):
            path = interactions / f"{n:05d}.parquet"
            made = make_once(path, lambda to, users=users: sorter.write(users, to))  # type: ignore[misc]
            (progress.advance if made else progress.skip)(int(counts[users[0] : users[1]].sum()))
            found.append(Bucket(file=path.name, users=users, rows=_height(path)))
    buckets = Buckets(folder, _facts(source, sides, engine.name, tuple(found), interactions, int(counts.sum())))
    buckets.save()
    shutil.rmtree(pieces)
    shutil.rmtree(spill)
    shutil.rmtree(work / "text", ignore_errors=True)
    return buckets


def _write_pieces(source: Log, folder: Path, pieces: Path, options: PrepareOptions) -> tuple[Sides, list[Path]]:
    """Write the tables of both sides and the pieces, those that are missing; return the tables and the pieces' files."""
    tables, notes = {side: folder / layout.table(side) for side in SIDES}, list[str]()
    known = {side: pl.read_parquet(path, glob=False) for side, path in tables.items() if path.exists()}
    sides, versions, times = settle_sides(source, known if len(known) == len(SIDES) else None, notes)
    for note in notes:
        log.info(note)
    for side, of_side in versions.items():
        make_once(folder / layout.versions(side), partial(write_parquet, of_side))
    for side, path in tables.items():
        make_once(path, partial(write_parquet, sides[side]))
    progress = JobProgress(log, "interactions read", source.rows)
    return sides, write_pieces(source, sides, times, pieces, options.threads, progress)


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
    source: Log, sides: Sides, engine: str, buckets: tuple[Bucket, ...], folder: Path, of_pieces: int
) -> BucketFacts:
    """Return the facts of finished buckets; `of_pieces` interactions were sorted. Raises DataError for repeated pairs, if not
    allowed, or without a positive row."""
    schema, kept = source.schema, sum(b.rows for b in buckets)
    repeated = of_pieces - kept
    if repeated and schema.duplicates == "error":
        raise DataError(
            f"interactions: {repeated} rows repeat a pair of user and item; drop them or set schema.duplicates = 'last' or "
            "'keep'"
        )
    summary = Summary("interactions", source.rows)
    ignored = source.ignored
    summary.drop("rows are ignored events", ignored)
    summary.drop("rows have ids that users or items lack", source.rows - ignored - of_pieces)
    summary.drop(f"rows repeated a pair of user and item, {kept_of_repeated(schema)}", repeated)
    log.info(str(summary))
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
        maker=f"twotower {__version__}, {engine}", duplicates=schema.duplicates, log=LogColumns.of(schema), users=sides["user"].height,
        items=sides["item"].height, read=source.rows, rows=kept, positives=positives, buckets=buckets,
        first_time=of_all["first"].min() if times else None, last_time=of_all["last"].max() if times else None,
    )  # fmt: skip
