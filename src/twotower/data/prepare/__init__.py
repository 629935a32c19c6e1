"""Preparation of a log as a `MemmapDataset`, in memory that does not grow with the number of interactions.

    log -> pieces (polars gives ids their rows) -> buckets (an engine sorts) -> arrays (one range for each bucket)

A call that was killed is continued by the next one, which makes only the files that are missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from twotower import files
from twotower.data.buckets import Bucket, Buckets
from twotower.data.config import DataConfig
from twotower.data.memmap import MEMMAP_FORMAT, MemmapDataset
from twotower.data.parts import check_gap
from twotower.data.prepare.arrays import PreparedArrays
from twotower.data.prepare.bucket_reader import BucketReader
from twotower.data.prepare.bucketing import make_buckets
from twotower.data.prepare.engines.engine import ROW_BYTES
from twotower.data.prepare.log_pieces import Log
from twotower.data.prepare.options import PrepareOptions
from twotower.data.split import SplitConfig
from twotower.errors import ConfigError, DataError
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
    """Prepare the tables that `data` names (files, folders of shards or patterns), or a folder of buckets, in the new folder
    `out`.

    The dataset equals that of `dataset.build_dataset`, apart from the order of the users and of the interactions. Raises
    DataError or ConfigError for unusable tables or settings; `out` is then unchanged.
    """
    options = (options or PrepareOptions()).resolved()
    _check(data, schema, split, out, {layout.PREPARED_FACTS, layout.ENCODERS, layout.VOCABULARIES, layout.ARRAYS})
    source = _bucketed(data, schema, split, options) if data.buckets else Log.open(data, schema, split)
    settings: dict[str, files.JsonData] = {
        "format": MEMMAP_FORMAT,
        "schema": schema.model_dump(mode="json"),
        "split": split.model_dump(mode="json"),
    }
    with resumable_folder(out, "prepare", settings | _plan(source)) as (made, work):
        buckets = _make_buckets(source, work / "buckets", work, options) if isinstance(source, Log) else source
        arrays = PreparedArrays(buckets, schema, split, made, work, options.side_block_rows)
        largest = max(b.rows for b in buckets.facts.buckets)
        options.check_memory(largest, f"the largest bucket of {buckets.folder}")
        workers = max(1, min(options.threads, options.memory // ROW_BYTES // max(1, largest)))

        def each(what: str, task: Callable[[Bucket], bool]) -> None:
            progress = JobProgress(log, what, buckets.facts.rows)

            def run(bucket: Bucket) -> None:
                (progress.advance if task(bucket) else progress.skip)(bucket.rows)

            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(run, buckets.facts.buckets))

        arrays.write(each, workers)
    return MemmapDataset.open(out)


def write_buckets(
    data: DataConfig,
    schema: Schema,
    out: Path,
    options: PrepareOptions | None = None,
    split: SplitConfig | None = None,
) -> Buckets:
    """Write the tables that `data` names as a folder of buckets (docs/prepared-format.md), with the column `part` if the split
    gives the parts. Raises as `write_prepared`."""
    options = (options or PrepareOptions()).resolved()
    _check(data, schema, None, out, {layout.BUCKET_FACTS, layout.BUCKET_FOLDER})
    source = Log.open(data, schema, split or SplitConfig())
    plan = {"schema": schema.model_dump(mode="json")} | _plan(source)
    with resumable_folder(out, "bucket", plan) as (made, work):
        _make_buckets(source, made, work, options)
    return Buckets.open(out)


def _make_buckets(source: Log, folder: Path, work: Path, options: PrepareOptions) -> Buckets:
    """Write the buckets of a log, in the pieces and buckets that an earlier call has begun."""
    folder.mkdir(exist_ok=True)
    options = options.kept(work / "sizes.json")
    return make_buckets(source.in_pieces(options.piece_rows), folder, work, options)


def _bucketed(data: DataConfig, schema: Schema, split: SplitConfig, options: PrepareOptions) -> Buckets:
    """Return the buckets that `data` names. Raises RunError or ConfigError if they cannot be prepared with the schema."""
    if options.engine != "auto":
        raise ConfigError(f"`engine` is '{options.engine}', but data.buckets are sorted already; leave it out")
    buckets = Buckets.open(data.buckets)
    BucketReader(buckets, schema, split.is_given).check()
    return buckets


def _plan(source: Log | Buckets) -> dict[str, files.JsonData]:
    """Return the inputs on which the files of a preparation depend."""
    if isinstance(source, Buckets):
        paths = [source.table(side) for side in SIDES] + [source.file(b) for b in source.facts.buckets]
        found: list[files.JsonData] = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths if p.exists()]
        return {"version": __version__, "buckets": source.facts.model_dump(mode="json"), "files": found}
    return {"version": __version__, "log": source.state()}


def _check(data: DataConfig, schema: Schema, split: SplitConfig | None, out: Path, ours: set[str]) -> None:
    if split and split.needs_time and not schema.time:
        raise DataError(f"split.kind = '{split.kind}' needs a time; name its column in schema.time")
    if split:
        check_gap(schema, split)
    if data.buckets and not split:
        raise ConfigError("data.buckets names buckets already; give data.interactions")
    if data.buckets and (data.interactions or data.parts or data.users or data.items):
        raise ConfigError("give either data.buckets or data.interactions (with users and items), not both")
    if not (data.interactions or data.parts or data.buckets):
        raise ConfigError(
            "data.interactions is missing; name Parquet files, a folder of them or a pattern, or set data.buckets"
        )
    for history in schema.histories("item"):
        raise ConfigError(f"feature '{history.name}': sequences of items' users cannot be prepared; drop it")
    if out.exists():
        names = {p.name for p in out.iterdir()} if out.is_dir() else {out.name}
        known = (
            {*ours, *map(layout.table, SIDES)} if names & {layout.PREPARED_FACTS, layout.BUCKET_FACTS} & ours else set()
        )
        if strange := sorted(names - known):
            what = "a prepared dataset" if split else "a folder of buckets"
            raise ConfigError(f"{out}: not empty and not {what} alone (it holds {strange[0]}); choose another folder")
