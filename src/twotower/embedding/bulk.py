"""Bulk embedding of tables larger than memory. An engine makes the shards of a table; a tower embeds one block of rows at a time."""

from __future__ import annotations

import logging
import math
from collections import abc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl

from twotower import files
from twotower.arrays.npy_writer import write_blocks
from twotower.data.readers import Reading, column_names, parse_canonical_text, table_errors
from twotower.data.table_path import TablePath
from twotower.data.table_paths import absolute, table_files, table_source
from twotower.data.table_shards import (
    TableFile,
    TableShard,
    check_apart,
    cut_into_shards,
    read_slices,
    scan_columns,
)
from twotower.data.text_format import TextFormat
from twotower.embedding.folder import StoredVectors, part_names
from twotower.embedding.shards import EmbeddingWork, save_ids
from twotower.embedding.vectors import Precision, TableVectors
from twotower.engines import open_engine
from twotower.errors import ConfigError, DataError, RunError
from twotower.features.side import SideName
from twotower.files.shard_folders import shard_folder
from twotower.files.sharded_work import JsonObject, MadeShard
from twotower.kinds import foreign_modules
from twotower.progress import JobProgress
from twotower.runs import Run
from twotower.runs.copies import RunCopy, check_share, run_digests

log = logging.getLogger(__name__)

SHARD_ROWS = 1_048_576
"""Default rows of a shard. A multiple of the block, so that blocks, and with them rounding, are the same for every cut."""


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
    """Write the vector of every row of the table `source` into the folder `out`, on a disk or at a URL of an object store, and return
    the number of embedded rows.

    `source` is a text (.csv, .tsv, .txt) or Parquet file, a folder of them, or a pattern such as "items/*.parquet", of any size. A shard
    is up to `shard_rows` rows of a Parquet file, or a whole text file, and is written as folder.py describes; `EmbeddingsFolder` reads it
    from a disk. A later call continues with shards that are missing or damaged. `engine` is "local" (this process), "ray" (`threads` processes of this machine) or "ray://HOST:PORT"
    (those of a cluster, with `threads` each), which makes several shards; its processes load the run from its folder, of which each host
    may have a copy, or through `share`, a prefix in a bucket such as "s3://BUCKET/RUNS", where its files stay. `separator` is the character between the values of text files, "" the one of their ending; `columns` are the names of
    their columns, if their first lines do not name them; `decimal` is the mark of their numbers, "." or ",".

    A row whose id is in the run has the run's sequences and statistics; a new row has empty sequences, a count of zero and
    no mean. A repeated id gets a vector for each of its rows.

    Raises DataError if the table does not fit the schema, or changes meanwhile; RunError if `out` lies in the folder `source`, holds other
    files, or vectors of another table or model without `overwrite`, or is written by another call, or if a vector is not finite;
    ConfigError for an unusable argument, and for users of a model that reads the context, unless each of its features declares a
    default, which all users get; Unavailable for an engine that is lost.
    """
    table, place, chosen = table_source(source), table_source(out), open_engine(engine, threads)
    check_share(share, chosen)
    if shard_rows < 1:
        raise ConfigError(f"shards of {shard_rows} rows: expected at least 1")
    check_apart(table, place / part_names(0)[1], f"{side}s")
    form = TextFormat.of_table(separator, columns, decimal=decimal)
    maker = _ShardMaker(TableVectors(run, side, precision), form, batch_rows)
    if side == "user" and run.config.model.own_counts and run.model.own_counts.are_fitted:
        log.warning(
            "users: the model has own counts (model.own_counts), which stand beside the product and in no vector: an index of other software ranks "
            "without them"
        )
    if side == "item" and run.config.model.recent_popularity and run.model.recent_popularity.is_fitted:
        log.warning(
            "items: the model ranks by what is popular lately (model.recent_popularity), which the vectors have by the id: an item whose id training lacks, or "
            "has fewer than min_count rows of, is taken for one without a row, where the index of a bundle reads its rows; publish the run for these"
        )
    if chosen.is_remote:
        table, place = absolute(table), absolute(place)
    at, sources = shard_folder(place), maker.files(table_files(table))
    shards = cut_into_shards(sources, shard_rows)
    if maker.has_versions:
        log.warning(
            f"{side}s: '{maker.vectors.schema.valid_from}' tells versions of an id, and each row gets a vector: give a table of the newest "
            "row of each id for an index"
        )
    if not shards:
        raise DataError(f"{side}s: the table has no rows, expected at least one; fill it")
    model, schema = run_digests(run)
    plan = {
        "side": side, "model": model, "schema": schema, "precision": precision, "shard_rows": shard_rows,
        "table": [file.state() for file in sources], "separator, decimal, columns": form.given,
    }  # fmt: skip
    copy = RunCopy.of(run, share) if chosen.is_remote else None
    records, progress = dict[int, JsonObject](), JobProgress(log, f"{side}s embedded", seconds=math.inf)

    def add(made: MadeShard) -> None:
        made.log_damage()
        records[made.number] = made.record
        if made.is_new:
            progress.advance(made.record["rows"])
            log.info(f"{progress.line()}, shard {made.number + 1} of {len(shards)}")

    with EmbeddingWork.begin(at, plan, overwrite) as work:
        here = partial(maker.make, work)
        job = partial(_load, copy, side, precision, form, batch_rows, work) if copy else lambda: here
        chosen.run(job, shards, add, foreign_modules(run.config, run.dataset.schema))
        n: int = sum(record["rows"] for record in records.values())
        if not n:
            raise DataError(f"{side}s: the table has no rows, expected at least one; fill it")
        for file in sources:
            file.check_unchanged()
        work.finish(run.model.config.metric, [records[number] for number in range(len(shards))])
        log.info(f"{n:,} {side}s in {len(shards):,} shard{'s' * (len(shards) > 1)} have vectors: {at}")
        return n


def _load(
    copy: RunCopy, side: SideName, precision: Precision, form: TextFormat, batch_rows: int, work: EmbeddingWork
) -> abc.Callable[[TableShard], MadeShard]:
    """Load a run in another process, and return the function that makes a shard. Raises RunError if it or the folder is another one."""
    work.check_seen()
    return partial(_ShardMaker(TableVectors(copy.load(), side, precision), form, batch_rows).make, work)


class _ShardMaker:
    """Reads shards of a table, and writes their vectors and ids."""

    def __init__(self, vectors: TableVectors, form: TextFormat, batch_rows: int) -> None:
        self.vectors, self.form, self.batch_rows = vectors, form, batch_rows
        self._reading = Reading.of(vectors.schema, vectors.side).of_table(form)
        # A CSV has no types: ids and columns that were boolean in training are parsed from text.
        known = vectors.known.frame.schema
        booleans = {name for name, dtype in known.items() if dtype == pl.Boolean} - (self._reading.numbers or set())
        self.has_versions = False
        """True if a file of the table has the column of the times of versions."""
        self._parsed = [name for name in vectors.columns if name == vectors.key or name in booleans]

    def files(self, paths: list[TablePath]) -> list[TableFile]:
        """Return the files of a table with their numbers of rows, None for a text file. Raises DataError if one lacks a column."""
        self.form.check_table(paths)
        return [replace(file, rows=self._rows(file.path)) for file in TableFile.look_at(paths)]

    def _rows(self, path: TablePath) -> int | None:
        with table_errors(path):
            table = None if path.is_text else path.scan()
            names = column_names(path, self._reading) if table is None else table.collect_schema().names()
            self.vectors.check(names)
            self.has_versions |= bool(self.vectors.schema.valid_from) and self.vectors.schema.valid_from in names
            return None if table is None else int(table.select(pl.len()).collect().item())

    def make(self, work: EmbeddingWork, shard: TableShard) -> MadeShard:
        """Return a shard of a folder, which is made unless it is there and intact."""
        return work.make(shard.number, partial(self.write, shard))

    def write(self, shard: TableShard, folder: Path) -> JsonObject:
        """Write the vectors (n, D) and the ids of a shard into a folder; return n, D and the type of the ids. A shard of no rows has no
        files."""
        scratch, shapes, (vectors, all_ids) = folder / "scratch", list[tuple[int, ...]](), part_names(shard.number)
        scratch.mkdir()

        def blocks() -> Iterator[StoredVectors]:
            for frame in self._batches(shard, scratch):
                try:
                    ids, found = self.vectors(frame)
                except RunError as e:
                    raise RunError(f"{shard.file.path}: {e}") from None
                ids.to_frame().write_parquet(scratch / f"{len(shapes):09d}.parquet")
                shapes.append(found.shape)
                yield found
                files.point(f"shard:{shard.number}")

        write_blocks(folder / vectors, blocks())
        shard.file.check_unchanged()
        if not shapes:
            (folder / vectors).unlink()
            return {"rows": 0, "width": 0, "id": ""}
        kind = save_ids(sorted(scratch.glob("*.parquet")), folder / all_ids)
        return {
            "rows": sum(n for n, _ in shapes),
            "width": shapes[0][1],
            "id": kind,
        }

    def _batches(self, shard: TableShard, scratch: Path) -> Iterator[pl.DataFrame]:
        """Yield the needed columns of a shard, `batch_rows` rows at a time. Raises DataError as `tables.read_file` does."""
        path = shard.file.path
        table = scan_columns(shard.file, self.vectors.columns, self._reading, scratch / "table")
        with table_errors(path):
            n = int(table.select(pl.len()).collect().item()) if shard.rows is None else shard.rows
        for frame in read_slices(table, path, shard.start, n, self.batch_rows):
            yield frame.with_columns(parse_canonical_text(frame[name]) for name in self._parsed if path.is_text)
