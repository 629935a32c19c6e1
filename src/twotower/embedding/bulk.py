"""Bulk embedding of tables larger than memory. Ranks share the shards of a table; a tower embeds one block of rows at a time."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower import files
from twotower.arrays.npy_writer import write_npy_header
from twotower.arrays.ragged import Column, Ragged
from twotower.data.context import default_context
from twotower.data.readers import Reading, column_names, parse_canonical_text, table_errors
from twotower.data.splits import TEST
from twotower.data.table_paths import TablePath, table_files, table_source
from twotower.data.table_shards import (
    TableFile,
    TableShard,
    check_apart,
    cut_into_shards,
    names_within,
    read_slices,
    text_as_parquet,
)
from twotower.data.tables import need, with_ids
from twotower.data.text_format import TextFormat
from twotower.distributed import DistributedContext
from twotower.embedding.folder import IDS_FILE, LIST_FILE, VECTORS_FILE, WORK_FOLDER, StoredVectors
from twotower.embedding.shards import EmbeddingWork, common_type, save_ids
from twotower.errors import ConfigError, DataError, RunError
from twotower.features.categorical import CategoricalEncoder
from twotower.features.side import SideName
from twotower.files.sharded_work import HOW_TO_OVERWRITE
from twotower.files.urls import Url
from twotower.model.inputs.gather import ColumnRows, JoinedRows, TowerFields
from twotower.model.inputs.side_tensors import carry_forward, tensors
from twotower.model.two_tower import evaluation_mode
from twotower.runs import Run

log = logging.getLogger(__name__)

TOWER_BLOCK_ROWS = 32_768
"""Rows of one call of a tower. More rows need more memory; fewer make its threads wait for each other more often."""

SHARD_ROWS = 1_048_576
"""Default rows of a shard. A multiple of the block, so that blocks, and with them rounding, are the same for every cut."""

Precision = Literal["fp32", "fp16"]
_DTYPES = {"fp32": "<f4", "fp16": "<f2"}


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
    context: DistributedContext | None = None,
    separator: str = "",
    columns: abc.Sequence[str] = (),
) -> int:
    """Write the vector of every row of the table `source` into the folder `out`, and return the number of embedded rows.

    `source` is a text (.csv, .tsv, .txt) or Parquet file, a folder of them, or a pattern such as "items/*.parquet", of any size. A shard
    is up to `shard_rows` rows of a Parquet file, or a whole text file. A single shard is written as vectors.npy (n, D) and
    ids.parquet, several as folder.py describes; `EmbeddingsFolder` reads both. A later call continues with shards
    that are missing or damaged. The ranks of `context` share the shards without a barrier: a rank that is done takes
    remaining shards, and the last rank writes the list. `separator` is the character between the values of text files, "" the one
    of their ending; `columns` are the names of their columns, if their first lines do not name them.

    A row whose id is in the run has the run's sequences and statistics; a new row has empty sequences, a count of zero and
    no mean. A repeated id gets a vector for each of its rows.

    Raises DataError if the table does not fit the schema; RunError if `out` lies in the folder `source` or holds other
    files, or vectors of another table or model without `overwrite`, or if a vector is not finite; ConfigError for an
    unusable argument, and for users of a model that reads the context, unless each of its features declares a default,
    which all users get.
    """
    table, out, me = table_source(source), Path(out), context or DistributedContext()
    if precision not in _DTYPES:
        raise ConfigError(f"precision '{precision}': allowed are {', '.join(_DTYPES)}")
    if shard_rows < 1:
        raise ConfigError(f"shards of {shard_rows} rows: expected at least 1")
    check_apart(table, out / IDS_FILE, f"{side}s")
    form = TextFormat.of_table(separator, columns)
    has_text = any(path.is_text for path in table_files(table))
    form.check_used(has_text, has_text, "`{}`")
    rows = _RowEncoder(run, side, form)
    sources = _files(table, rows)
    shards = cut_into_shards(sources, shard_rows)
    if not shards:
        raise DataError(f"{side}s: the table has no rows, expected at least one; fill it")
    tower = _ShardEmbedder(run, rows, precision, batch_rows, f"rank {me.rank}: " if me.world_size > 1 else "")
    if len(shards) == 1:
        return _embed_single_shard(tower, shards[0], out, overwrite) if me.is_main else 0
    plan = {
        "side": side, "model": _digest(run), "schema": hashlib.sha256(rows.schema.model_dump_json().encode()).hexdigest(),
        "precision": precision, "shard_rows": shard_rows, "table": [f.state() for f in sources], "form": form.given,
    }  # fmt: skip
    with EmbeddingWork.begin(out, plan, len(shards), overwrite) as work:
        for i in range(me.rank, len(shards), me.world_size):
            _embed_shard(tower, work, shards[i], verify=True)
        while True:  # help other ranks, from the end, which a slow rank reaches last
            missing = [s for s in reversed(shards) if not work.record(s.number)]
            if not sum(_embed_shard(tower, work, s, verify=False) for s in missing):
                break
        n, last = work.finish(run.model.config.metric)
        if not n and all(work.record(s.number) for s in shards):
            raise DataError(f"{side}s: the table has no rows, expected at least one; fill it")
        if last or (work.complete and me.is_main):
            log.info(f"{n:,} {side}s in {len(shards):,} shards have vectors: {out}")
        return n


def _embed_single_shard(tower: _ShardEmbedder, shard: TableShard, out: Path, overwrite: bool) -> int:
    """Embed a table of one shard, in place of an earlier one, and return the number of rows."""
    EmbeddingWork.check_folder(out)
    if (out / WORK_FOLDER).exists() or (out / LIST_FILE).exists():
        if not overwrite:
            raise RunError(f"{out}: holds the shards of another table; {HOW_TO_OVERWRITE}")
        if (out / WORK_FOLDER).exists():
            EmbeddingWork.clear_folder(out)
    with files.new_folder(out) as folder:
        n, *_ = tower(shard, folder)
        if not n:
            raise DataError(f"{tower.rows.side}s: the table has no rows, expected at least one; fill it")
    tower.log_progress(n, f": {out}")
    return n


def _embed_shard(tower: _ShardEmbedder, work: EmbeddingWork, shard: TableShard, verify: bool) -> bool:
    """Embed a shard, unless it is finished or another process has claimed it; return True if it was embedded.

    `verify` checks the files of a finished shard, and embeds it again if they are damaged.
    """
    with work.unfinished(shard.number, verify) as folder:
        if folder is None:
            return False
        n, width, kind = tower(shard, folder)
        work.publish_shard(shard.number, folder, n, width, kind)
    tower.log_progress(n, f", shard {shard.number + 1} of {work.shards}")
    return True


def _digest(run: Run) -> str:
    """Return the digest of the run's model.safetensors, or of the weights of a model without a folder."""
    if run.sha256:  # of the loaded model; the folder may hold another run by now
        return run.sha256
    digest = hashlib.sha256()
    for name, weights in run.model.named_parameters():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights.detach().cpu().numpy()).data)
    return digest.hexdigest()


class _ShardEmbedder:
    """Embeds the rows of a shard, and logs the progress."""

    def __init__(self, run: Run, rows: _RowEncoder, precision: Precision, batch_rows: int, prefix: str) -> None:
        self.run, self.rows, self.type, self.batch_rows, self.prefix = run, rows, _DTYPES[precision], batch_rows, prefix
        self.started = 0.0

    def __call__(self, shard: TableShard, folder: Path) -> tuple[int, int, str]:
        """Write vectors.npy (n, D) and ids.parquet of a shard into a folder; return n, D and the type of the ids. A shard of
        no rows has no ids.parquet and the type ''."""
        run, rows, source = self.run, self.rows, shard.file.path
        tower = run.model.user_vectors if rows.side == "user" else run.model.item_vectors
        device = run.model.log_temperature.device
        self.started = logged = time.perf_counter()
        n = width = 0
        scratch = folder / "scratch"
        scratch.mkdir()
        with (folder / VECTORS_FILE).open("w+b") as file:
            for frame in _batches(shard, rows, scratch, self.batch_rows):
                ids, columns = rows(frame)
                for start in range(0, len(ids), TOWER_BLOCK_ROWS):
                    block = rows.joined(ColumnRows(columns, slice(start, start + TOWER_BLOCK_ROWS)))
                    inputs = tensors(rows.fields, block, carry_forward, device)
                    with evaluation_mode(run.model):
                        vectors = tower(inputs).cpu().numpy()
                    if not np.isfinite(vectors).all():
                        raise RunError(f"a vector of {source} is not finite; the model is broken, train it again")
                    if not width:
                        width = vectors.shape[1]
                        write_npy_header(file, np.zeros(width, self.type), 0)
                    file.write(np.ascontiguousarray(self._rounded(vectors, source)).data)
                ids.to_frame().write_parquet(scratch / f"{n:015d}.parquet")
                n += len(ids)
                files.point(f"shard:{shard.number}")
                if time.perf_counter() > logged + 5:
                    logged = time.perf_counter()
                    self.log_progress(n)
            write_npy_header(file, np.zeros(width, self.type), n)
        kind = ""
        if n:
            parts = sorted(scratch.glob("*.parquet"))
            common = common_type({str(pl.scan_parquet(p, glob=False).collect_schema()["id"]) for p in parts})
            save_ids(parts, common, folder / IDS_FILE)
            kind = str(common)
        shutil.rmtree(scratch)
        return n, width, kind

    def _rounded(self, vectors: npt.NDArray[np.float32], source: TablePath) -> StoredVectors:
        if self.type == "<f4":
            return vectors
        with np.errstate(over="ignore"):
            out = vectors.astype(self.type)
        if not np.isfinite(out).all():
            raise RunError(f"a vector of {source} has a number above 65,504, which fp16 does not reach; use fp32")
        return out

    def log_progress(self, n: int, more: str = "") -> None:
        log.info(
            f"{self.prefix}{n:,} {self.rows.side}s embedded, {n / (time.perf_counter() - self.started):,.0f} a second{more}"
        )


class _RowEncoder:
    """Encodes pieces of a side's table: the ids, and the columns that the tower reads."""

    def __init__(self, run: Run, side: SideName, form: TextFormat) -> None:
        self.side, self.schema, self.encoders = side, run.dataset.schema, run.dataset.encoders
        self.key = self.schema.id_column(side)
        self.fields = TowerFields(self.encoders.fields(side))
        self.statistics, self.histories = self.schema.statistics(side), self.schema.histories(side)
        given = [f.source for f in self.schema.columns(side) if not f.computes]
        self.columns = list(dict.fromkeys([self.key, *given]))
        self.known = run.dataset.side_before(side, TEST)
        self.reading = Reading.of(self.schema, side).of_table(form)
        # A CSV has no types: ids and columns that were boolean in training are parsed from text.
        booleans = {c for c, dtype in self.known.frame.schema.items() if dtype == pl.Boolean} - (
            self.reading.numbers or set()
        )
        self.parsed_columns = [c for c in self.columns if c == self.key or c in booleans]
        self._row_encoder = CategoricalEncoder(self.known.ids)
        self._context = dict[str, Column]()
        if side == "user" and self.schema.side("context"):
            self._context = default_context(self.encoders, run.dataset.context_frame)

    def check(self, names: abc.Sequence[str]) -> None:
        """Raise DataError if a column is missing."""
        need(pl.DataFrame(schema=dict.fromkeys(names, pl.Null)), self.columns, self.side + "s")

    def joined(self, block: ColumnRows) -> ColumnRows | JoinedRows:
        """Return encoded rows beside the default context, if the tower reads one."""
        if not self._context:
            return block
        return JoinedRows(block, ColumnRows(self._context, np.zeros(block.n, np.int64)))

    def __call__(self, frame: pl.DataFrame) -> tuple[pl.Series, dict[str, Column]]:
        frame = with_ids(frame, self.key, self.side + "s")
        if self.known.ids.dtype == pl.String:
            frame = frame.with_columns(pl.col(self.key).cast(pl.String))
        if self.statistics or self.histories:
            known_rows = self._row_encoder.transform(frame[self.key])  # 0 for a new id, else 1 + its row in the run
        for s in self.statistics:
            values = self.known.frame[s.source]
            new = pl.Series([s.unseen], dtype=values.dtype)
            frame = frame.with_columns(pl.concat([new, values]).gather(known_rows).alias(s.source))
        columns = self.encoders.transform(self.side, frame)
        for h in self.histories:
            known = self.known.columns[h.name]
            assert isinstance(known, Ragged)
            columns[h.name] = _take_known(known, known_rows)
        return frame[self.key].rename("id"), columns


def _take_known(ragged: Ragged, known_rows: npt.NDArray[np.int32]) -> Ragged:
    """Return row r - 1 of `ragged` for each r of `known_rows`, an empty row for 0."""
    return Ragged(ragged.values, np.r_[0, ragged.offsets]).take(known_rows)


def _files(source: Path | Url, rows: _RowEncoder) -> list[TableFile]:
    """Return the files of a table in the order of their names. Raises DataError if one lacks a column."""
    paths = table_files(source)
    return [TableFile(path, name, _length(path, rows)) for path, name in zip(paths, names_within(paths), strict=True)]


def _length(path: TablePath, rows: _RowEncoder) -> int | None:
    """Return the number of rows of a Parquet file, None for a text file. Raises DataError if a column is missing."""
    with table_errors(path):
        if path.is_text:
            rows.check(column_names(path, rows.reading))
            return None
        table = path.scan_parquet()
        rows.check(table.collect_schema().names())
        return int(table.select(pl.len()).collect().item())


def _batches(shard: TableShard, rows: _RowEncoder, scratch: Path, batch_rows: int) -> Iterator[pl.DataFrame]:
    """Yield the needed columns of a shard, `batch_rows` rows at a time. Raises DataError as `tables.read_file` does."""
    path, text = shard.file.path, shard.file.path.is_text
    with table_errors(path):
        table = (
            text_as_parquet(path, rows.columns, rows.reading, scratch / "table")
            if text
            else path.scan_parquet().select(rows.columns)
        )
        n = int(table.select(pl.len()).collect().item()) if shard.rows is None else shard.rows
    for frame in read_slices(table, path, shard.start, n, batch_rows):
        yield frame.with_columns(parse_canonical_text(frame[name]) for name in rows.parsed_columns) if text else frame
