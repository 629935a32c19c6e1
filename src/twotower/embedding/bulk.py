"""Bulk embedding of tables larger than memory. An engine makes the shards; a tower embeds a block of rows at a time."""

from __future__ import annotations

import logging
from collections import abc
from functools import partial
from pathlib import Path

import polars as pl

from twotower.data.reading.sharded_job import Rows, ShardedJob
from twotower.data.reading.table_shards import ShardedTable, TableShard
from twotower.data.reading.text_files import Reading
from twotower.data.reading.text_format import TextFormat
from twotower.embedding.folder import EMBEDDINGS_FORMAT, LIST_FILE
from twotower.embedding.vectors import Precision, TableVectors
from twotower.features.side import SideName
from twotower.files.places import JsonObject
from twotower.files.sharded_result import MadeShard, ShardedResult
from twotower.kinds import foreign_modules
from twotower.runs import Run
from twotower.runs.shared import RunCopy, check_share, run_digests

log = logging.getLogger(__name__)

SHARD_ROWS = 131_072
"""Default rows of a shard, in memory together. A multiple of the block: every cut has the same blocks, and rounding."""


def embed(
    run: Run,
    side: SideName,
    source: Path | str,
    out: Path | str,
    batch_rows: int = 65_536,
    *,
    shard_rows: int = SHARD_ROWS,
    precision: Precision = "fp32",
    overwrite: bool = False,
    engine: str = "local",
    threads: int = 0,
    separator: str = "",
    columns: abc.Sequence[str] = (),
    decimal: str = ".",
    share: Path | str = "",
) -> int:
    """Write the vector of every row of the table `source` into the folder `out`. Returns the number of rows.

    `source` is a text (.csv, .tsv, .txt) or Parquet file, a folder of files, or a pattern such as "items/*.parquet", of
    any size. `out` is a path or a URL of an object store. A shard is up to `shard_rows` rows of a file; a later call
    makes missing or damaged shards. `engine` is "local" (this process), "ray" (`threads` processes of this machine) or
    "ray://HOST:PORT" (processes of a cluster with `threads` each). Its processes load the run from its folder, which
    may be a copy on each host, or through `share`, a prefix in a bucket such as "s3://BUCKET/RUNS", where its files
    stay. For text files, `separator` is the character between values ("": by the file's ending), `columns` are the
    names of their columns if their first lines have none, and `decimal` is the decimal mark, "." or ",".

    A row with an id of the run has the run's sequences and statistics; a new row has empty sequences, a count of zero
    and no mean. A repeated id gets a vector for each of its rows. All users get the default of each context feature.

    Raises DataError if the table does not fit the schema or changes meanwhile; RunError if `out` is in the folder
    `source`, contains other files, or, without `overwrite`, vectors of another table or model, if another call writes
    it, or if a vector is not finite; ConfigError for an unusable argument, or users of a model with a context feature
    without a default; Unavailable if the engine is lost.
    """
    job = ShardedJob(source, out, f"{side}s", engine, threads, shard_rows)
    check_share(share, job.engine)
    vectors, form = TableVectors(run, side, precision), TextFormat.of_table(separator, columns, decimal=decimal)
    reading = Reading.of(vectors.schema, side).of_table(form)
    table = ShardedTable(job.source, reading, form, vectors.known.frame.schema)
    own = vectors.schema.table_id(side)
    table.select([own if own in table.names else vectors.key, *vectors.columns[1:]], job.rows)
    for missed in run.vector_gaps(side, table.names):
        log.warning(missed)
    model, schema = run_digests(run)
    plan: JsonObject = {
        "format": EMBEDDINGS_FORMAT, "side": side, "model": model, "schema": schema, "precision": precision,
        "shard_rows": shard_rows, "separator, decimal, columns": form.given, **table.states(),
    }  # fmt: skip
    copy = RunCopy.of(run, share) if job.engine.is_remote else None

    def about(made: list[MadeShard]) -> JsonObject:
        return {
            "metric": run.model.metric, "rows": table.rows, "width": made[0].facts["width"],
            "shards": [{"file": shard.file, "rows": shard.facts["rows"]} for shard in made],
        }  # fmt: skip

    made = job.run(
        ShardedResult(job.place, "vectors", LIST_FILE, plan), table,
        (lambda: TableVectors(copy.load(), side, precision)) if copy else (lambda: vectors),
        partial(_embedded, table, batch_rows), about, "embedded", overwrite,
        foreign_modules(run.config, run.dataset.schema), seconds=0.0,
    )  # fmt: skip
    log.info(f"{table.rows:,} {side}s in {len(made):,} shard{'s' * (len(made) > 1)} have vectors: {job.place}")
    return table.rows


def _embedded(table: ShardedTable, batch_rows: int, vectors: TableVectors, shard: TableShard) -> Rows:
    """Return the ids and vectors of a shard."""
    (given,) = table.slices(shard, shard.rows)
    frame = pl.concat(map(vectors, given.iter_slices(batch_rows)))
    return frame, {"rows": len(frame), "width": len(frame["vector"][0])}
