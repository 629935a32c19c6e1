"""Preparation of a log as a `MemmapDataset`, in memory that does not grow with the number of interactions.

    log -> pieces (ids become rows) -> buckets (sorted, in this process or in Ray's) -> arrays (of all buckets)

A call that was killed is continued by the next one, which makes only the files that are missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from twotower import files
from twotower.data.buckets import Bucket, Buckets
from twotower.data.config import DataConfig, check_lone_options
from twotower.data.memmap import MEMMAP_FORMAT, MemmapDataset
from twotower.data.parts import check_gap
from twotower.data.prepare.arrays import PreparedArrays
from twotower.data.prepare.bucket_reader import BucketReader
from twotower.data.prepare.bucketing import make_buckets
from twotower.data.prepare.log_pieces import Log
from twotower.data.prepare.options import ROW_BYTES, PrepareOptions
from twotower.data.prepare.segments import SegmentWriter
from twotower.data.split import SplitConfig
from twotower.data.splits import need_times
from twotower.engines.engine import LocalEngine
from twotower.errors import ConfigError, RunError
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.files import layout
from twotower.files.resumable import resumable_folder
from twotower.progress import JobProgress
from twotower.version import __version__

log = logging.getLogger(__name__)


def write_prepared(
    data: DataConfig, schema: Schema, split: SplitConfig, out: Path, options: PrepareOptions | None = None
) -> MemmapDataset:
    """Prepare the tables that `data` names (files, folders of shards or patterns), or a folder of buckets, in the new
    folder `out`.

    The dataset equals that of `dataset.build_dataset`, apart from the order of the users and of the interactions.
    Raises DataError or ConfigError for unusable tables or settings; `out` is then unchanged.
    """
    options = (options or PrepareOptions()).resolved()
    encoded = {layout.ENCODERS, layout.VOCABULARIES, layout.CONTEXT}
    _check(data, schema, split, out, {layout.PREPARED_FACTS, layout.ARRAYS, *encoded})
    source = _bucketed(data, schema, split, options) if data.buckets else _log(data, schema, split, options)
    settings: dict[str, files.JsonData] = {
        "format": MEMMAP_FORMAT,
        "schema": schema.model_dump(mode="json"),
        "split": split.model_dump(mode="json"),
    }
    with resumable_folder(out, "prepare", settings | _plan(source)) as (made, work):
        if isinstance(source, Log):
            reader = BucketReader.open(_make_buckets(source, work / "buckets", work, options), schema, split.is_given)
        else:
            reader = source
        buckets = reader.buckets
        workers = max(1, min(options.threads, options.memory // ROW_BYTES // max(1, reader.largest)))

        def each(what: str, task: Callable[[Bucket], bool]) -> None:
            progress = JobProgress(log, what, buckets.facts.rows)

            def run(bucket: Bucket) -> None:
                (progress.advance if task(bucket) else progress.skip)(bucket.rows)

            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(run, buckets.facts.buckets))

        PreparedArrays(reader, split, made, work, options.side_block_rows).write(each, workers)
    return MemmapDataset.open(out)


def write_buckets(
    data: DataConfig,
    schema: Schema,
    out: Path,
    options: PrepareOptions | None = None,
    split: SplitConfig | None = None,
) -> Buckets:
    """Write the tables that `data` names as a folder of buckets (docs/prepared-format.md), with the column `part` if
    the split gives the parts. Raises as `write_prepared`."""
    options = (options or PrepareOptions()).resolved()
    _check(data, schema, None, out, {layout.BUCKET_FACTS, layout.BUCKET_FOLDER})
    source = _log(data, schema, split or SplitConfig(), options)
    plan = {"schema": schema.model_dump(mode="json")} | _plan(source)
    with resumable_folder(out, "bucket", plan) as (made, work):
        _make_buckets(source, made, work, options)
    return Buckets.open(out)


def append_segment(
    data: DataConfig, schema: Schema, split: SplitConfig, new: Path | str, options: PrepareOptions | None = None
) -> Buckets:
    """Add the interactions `new`, a file, a folder or a pattern, to the folder `data.buckets`, as a segment, with the
    users and items of the tables of `data` as they are now. Rows of users, items and interactions stay as they are.

    The folder is replaced in one step: a reader of its files keeps them. Raises DataError for a log that does not fit
    the folder or is in it already, ConfigError, RunError; the folder is then unchanged."""
    if not data.buckets:
        raise ConfigError("data.buckets is missing; name the folder of buckets to which the rows are added")
    if data.parts:
        raise ConfigError(
            f"data.{next(iter(data.parts))}: new rows have no part by their file; set split.kind = 'column'"
        )
    options = (options or PrepareOptions()).resolved()
    folder, data = Path(data.buckets), data.model_copy(update={"interactions": str(new)})
    _check(data, schema, None, folder, {layout.BUCKET_FACTS, layout.BUCKET_FOLDER})
    if schema.valid_from:
        raise ConfigError(
            f"schema.valid_from = '{schema.valid_from}': versions take no segment; write all buckets again"
        )
    before = BucketReader.open(Buckets.open(folder), schema, split.is_given).buckets
    writer = SegmentWriter(_log(data, schema, split, options).in_pieces(options.piece_rows, before.facts.read), before)
    writer.check()
    plan = {"schema": schema.model_dump(mode="json"), "to": before.facts.model_dump(mode="json")} | _plan(writer.source)
    with resumable_folder(folder, "append", plan) as (made, work):
        if Buckets.open(folder).facts != before.facts:
            raise RunError(f"{folder}: another call has changed it; call again")
        writer.write(made, work, options.kept(work / "sizes.json"))
    buckets = Buckets.open(folder)
    log.info(f"{buckets.facts.rows:,} interactions in {len(buckets.facts.segments):,} segments: {folder}")
    return buckets


def _make_buckets(source: Log, folder: Path, work: Path, options: PrepareOptions) -> Buckets:
    """Write the buckets of a log, in the pieces and buckets that an earlier call has begun."""
    folder.mkdir(exist_ok=True)
    options = options.kept(work / "sizes.json")
    return make_buckets(source.in_pieces(options.piece_rows), folder, work, options)


def _log(data: DataConfig, schema: Schema, split: SplitConfig, options: PrepareOptions) -> Log:
    """Return the log that `data` names. Raises DataError for one of no use, ConfigError for an engine of no use."""
    options.job_engine()
    return Log.open(data, schema, split)


def _bucketed(data: DataConfig, schema: Schema, split: SplitConfig, options: PrepareOptions) -> BucketReader:
    """Return a reader of the buckets that `data` names. Raises RunError or ConfigError if they cannot be prepared."""
    if options.engine != LocalEngine.name:
        raise ConfigError(f"`engine` is '{options.engine}', but data.buckets are sorted already; leave it out")
    reader = BucketReader.open(Buckets.open(data.buckets), schema, split.is_given, strict=True)
    options.check_memory(reader.largest, f"the largest bucket of {data.buckets}")
    return reader


def _plan(source: Log | BucketReader) -> dict[str, files.JsonData]:
    """Return the inputs on which the files of a preparation depend."""
    if isinstance(source, Log):
        given: files.JsonData = [source.split.column, dict(source.parts)] if source.split.is_given else []
        return {"version": __version__, "log": source.found, "parts": given}
    return {"version": __version__, "buckets": source.buckets.facts.model_dump(mode="json"), "files": source.found}


def _check(data: DataConfig, schema: Schema, split: SplitConfig | None, out: Path, ours: set[str]) -> None:
    if split:
        need_times(split, bool(schema.time))
        check_gap(schema, split)
    check_lone_options(schema, split)
    if not (data.interactions or data.parts or (data.buckets and split)):
        raise ConfigError(
            "data.interactions is missing; name Parquet files, a folder of them or a pattern, or set data.buckets"
        )
    for history in schema.histories("item"):
        raise ConfigError(f"feature '{history.name}': sequences of items' users cannot be prepared; drop it")
    if out.exists():
        names = {p.name for p in out.iterdir()} if out.is_dir() else {out.name}
        known = (
            {*ours, *map(layout.table, SIDES), *map(layout.versions, SIDES)}
            if names & {layout.PREPARED_FACTS, layout.BUCKET_FACTS} & ours
            else set()
        )
        if strange := sorted(names - known):
            what = "a prepared dataset" if split else "a folder of buckets"
            raise ConfigError(f"{out}: not empty and not {what} alone (it holds {strange[0]}); choose another folder")
