"""Pieces of a log: its interactions as rows of users and items, in Parquet files that an engine turns into buckets.

A piece is up to `rows` interactions of one file of the log, sorted by user.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl
from polars import selectors

from twotower.arrays.types import Ints
from twotower.data.bucket_columns import bucket_columns
from twotower.data.config import DataConfig
from twotower.data.interaction_columns import USER
from twotower.data.labels import POSITIVE
from twotower.data.parts import PART, PartFiles, check_part_column, given_parts
from twotower.data.reading.column_types import common_types, with_types
from twotower.data.reading.readers import need, table_errors
from twotower.data.reading.table_path import TablePath
from twotower.data.reading.table_paths import check_one_kind, part_paths, table_files
from twotower.data.reading.table_shards import TableFile, TableShard, cut_into_shards, read_slices
from twotower.data.reading.text_files import Reading, as_types, text_as_parquet, text_types
from twotower.data.reading.times import TIME
from twotower.data.split import PART_NAMES, SplitConfig
from twotower.data.tables import CheckedLog, averaged_columns
from twotower.errors import DataError
from twotower.features.schema import Schema
from twotower.features.side import SideName
from twotower.features.values import TEXT_TYPES
from twotower.files import JsonData
from twotower.files.readers import write_parquet
from twotower.files.resumable import make_once
from twotower.progress import JobProgress

log = logging.getLogger(__name__)

ROW_GROUP_ROWS = 32_768
"""Interactions of a row group of a piece: an engine reads those of a bucket's users and skips the others."""

_ROW = "__row"  # temporary
Sides = dict[SideName, pl.DataFrame]


@dataclass(frozen=True)
class Log:
    """The interactions of a config, in the order of their files' names."""

    data: DataConfig
    schema: Schema
    files: tuple[TableFile, ...]
    found: Mapping[str, Mapping[str, JsonData]]
    """Size and time of change of each file as it was found first, by table and path."""
    split: SplitConfig
    parts: Mapping[str, int]
    """Part code of each file, if files give the parts."""
    types: Mapping[str, pl.DataType]
    """Type of each column that is read. Parquet files may lack it, or have another one; columns of text files that are
    not named here are text."""
    first: int = 0
    """Row at which it begins in the log of all segments."""
    pieces: tuple[TableShard, ...] = ()
    copies: Mapping[str, Path] = field(default_factory=dict)
    """Parquet copies of the files by name, if they are text."""

    @classmethod
    def open(cls, data: DataConfig, schema: Schema, split: SplitConfig) -> Log:
        """Find the files of a log. Raises DataError for a missing column or no rows."""
        by_part = part_paths(PartFiles(data.parts))
        given = [(path, PART_NAMES.index(name)) for name, found in by_part.items() for path in found]
        paths = [path for path, _ in given] if given else table_files(data.interactions)
        check_one_kind(paths)
        users, items = (table_files(given)[0] if given else None for given in (data.users, data.items))
        data.format.check_used({"users": users, "items": items, "interactions": paths[0]})
        paths = [replace(path, encoding=data.format.encoding) for path in paths]
        files = TableFile.look_at(paths, Reading.of(schema, form=data.format))
        for columns in (file.columns for file in files if file.path.is_text):
            need(pl.DataFrame(schema=columns), used_columns(schema), "interactions")
            check_part_column(columns.names(), split)
        parts = {file.name: part for file, (_, part) in zip(files, given, strict=True)} if given else {}
        types = {} if paths[0].is_text else _types(paths, [file.columns for file in files], schema, split)
        log = cls(data, schema, tuple(files), _state(data), split, parts, types)
        if not log.rows:
            raise DataError("interactions: the table has no rows, expected at least one; fill it")
        return log

    @property
    def is_text(self) -> bool:
        """True if the files have no types."""
        return self.files[0].path.is_text

    def copied(self, folder: Path) -> Log:
        """Return the log with its text files copied into a folder as Parquet, those that it lacks; Parquet files are
        read as they are. Raises DataError."""
        if not self.is_text:
            return self
        folder.mkdir(exist_ok=True)
        wanted = list(dict.fromkeys([*used_columns(self.schema), *filter(None, [self.split.column])]))
        copies, first = {file.name: folder / f"{n:06d}.parquet" for n, file in enumerate(self.files)}, 0
        for file in self.files:

            def into(to: Path, path: TablePath = file.path, first: int = first) -> None:
                with table_errors(path):
                    text_as_parquet(path, wanted, self._reading, to, first)

            make_once(copies[file.name], into)
            first += file.rows
        table = pl.scan_parquet([*copies.values()], glob=False)
        return replace(self, copies=copies, types=text_types(table, self._reading))

    @property
    def _reading(self) -> Reading:
        return Reading.of(self.schema, form=self.data.format).of_file(self.files[0].path)

    def in_pieces(self, rows: int, first: int = 0) -> Log:
        """Return the log, which begins at row `first` of all segments, cut into pieces of at most `rows`
        interactions."""
        return replace(self, pieces=tuple(cut_into_shards([*self.files], rows)), first=first)

    @property
    def firsts(self) -> list[int]:
        """Row of the log of all segments at which each piece begins."""
        return [*itertools.accumulate((piece.rows for piece in self.pieces), initial=self.first)][:-1]

    @property
    def rows(self) -> int:
        """Number of interactions."""
        return sum(file.rows for file in self.files)

    def read(self, piece: TableShard, columns: Sequence[str]) -> pl.DataFrame:
        """Return some columns of a piece. Raises DataError if its file is another one than at first."""
        path, rows = piece.file.path, piece.rows
        with table_errors(path):
            copy = self.copies.get(piece.file.name)
            table = path.scan() if copy is None else pl.scan_parquet(copy, glob=False)
            table = table.select(selectors.by_name(*columns, require_all=copy is not None))
        (frame,) = read_slices(table, path, piece.start, rows, rows)
        self.check_unchanged("interactions", path)
        types = {name: self.types[name] for name in columns if name in self.types}
        if copy is None:
            return with_types(path, frame, types)
        return frame.with_columns(as_types(types, self._reading))

    def check_unchanged(self, table: str, path: TablePath) -> None:
        """Raise DataError if a file is another one than at first."""
        with table_errors(path):
            found = path.state()
        if found != self.found[table].get(str(path)):
            raise DataError(f"{path}: was changed while it was read; call again when it is complete")


def _types(
    paths: Sequence[TablePath], schemas: Sequence[pl.Schema], schema: Schema, split: SplitConfig
) -> dict[str, pl.DataType]:
    """Return the types of the columns that a schema and a split name, of Parquet files. Raises DataError for a column
    that all lack, or that has no type for all."""
    wanted = [*used_columns(schema), *filter(None, [split.column])]
    kept = [pl.Schema({name: t for name, t in columns.items() if name in wanted}) for columns in schemas]
    types = common_types(paths, kept)
    for name in types:
        if n := sum(name not in columns for columns in kept):
            log.info(f"interactions: {n} of {len(kept)} files lack the column '{name}'; it is missing in their rows")
    found = list(dict.fromkeys([*types, *(name for columns in schemas for name in columns)]))
    need(pl.DataFrame(schema=found), used_columns(schema), "interactions")
    check_part_column(found, split)
    return types


def _state(data: DataConfig) -> dict[str, dict[str, JsonData]]:
    """Return the size and time of change of each file of a log, by table and path."""
    interactions = [*data.parts.values()] or [data.interactions]
    given = {"interactions": interactions, "users": [data.users], "items": [data.items]}
    return {
        name: {str(path): path.state() for source in filter(None, sources) for path in table_files(source)}
        for name, sources in given.items()
    }


def used_columns(schema: Schema) -> list[str]:
    """Return the columns of the interactions that a schema names."""
    keys = [schema.user_id, schema.item_id, *filter(None, (schema.time, schema.label, schema.weight, schema.event))]
    averaged = (a for a in averaged_columns(schema) if a != POSITIVE)
    return list(dict.fromkeys([*keys, *averaged, *schema.context_columns()]))


def write_pieces(
    source: Log, checked: CheckedLog, sides: Sides, folder: Path, threads: int, progress: JobProgress
) -> list[Path]:
    """Write the pieces of a log into a folder, those that it lacks, and return their files. Raises DataError."""
    paths = [folder / f"{n:06d}.parquet" for n in range(len(source.pieces))]
    firsts = source.firsts

    def write(n: int) -> None:
        def into(path: Path) -> None:
            piece = _encoded(source, source.pieces[n], firsts[n], checked, sides)
            write_parquet(piece, path, compression="lz4", row_group_size=ROW_GROUP_ROWS)

        made = make_once(paths[n], into)
        (progress.advance if made else progress.skip)(source.pieces[n].rows)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(len(paths))))
    return paths


def _encoded(source: Log, piece: TableShard, first: int, checked: CheckedLog, sides: Sides) -> pl.DataFrame:
    """Return a piece, which begins at row `first` of the log, with the columns of a bucket, sorted by user, without
    rows of ids that a side lacks."""
    schema, split = source.schema, source.split
    frame = source.read(piece, list(dict.fromkeys([*used_columns(schema), *filter(None, [split.column])])))
    frame = checked.rows(frame.with_columns(pl.Series(_ROW, np.arange(first, first + frame.height))))
    if source.parts:
        frame = frame.with_columns(pl.lit(source.parts[piece.file.name], pl.Int8).alias(PART))
    if schema.time:
        _check_order(frame, schema)
    frame = frame.with_columns(_plain_type(frame[name]) for name in schema.context_columns())
    # An id that the table lacks is one to drop: `CheckedLog.sides` has added or refused the others.
    return bucket_columns(frame, frame[_ROW], sides, schema, given_parts(frame, split)).sort(USER)


def _plain_type(column: pl.Series) -> pl.Series:
    """Return a column with the widest type of its kind, so that those of several files are of one."""
    if column.dtype.is_integer() and column.dtype != pl.UInt64:
        return column.cast(pl.Int64)
    if column.dtype.is_float():
        return column.cast(pl.Float64)
    return column.cast(pl.String) if column.dtype in TEXT_TYPES else column


def counts_of_users(pieces: list[Path], n_users: int) -> Ints:
    """Return (n_users,) the number of interactions of each user."""
    counts = np.zeros(n_users, np.int64)
    for path in pieces:
        users = pl.scan_parquet(path, glob=False).select(USER).collect()[USER].to_numpy()
        if not len(users):
            continue
        first = int(users[0])  # they rise
        found = np.bincount(users - first)
        counts[first : first + len(found)] += found
    return counts


def _check_order(piece: pl.DataFrame, schema: Schema) -> None:
    """Raise DataError for time_unit "order" with fractions, whose ranks would differ between pieces."""
    given = piece[schema.time]
    if schema.time_unit == "order" and given.dtype.is_numeric() and not (piece[TIME] == given).all():
        raise DataError(
            f"interactions: time '{schema.time}' holds fractions or numbers beyond 64 bits; to prepare, give whole "
            "numbers"
        )
