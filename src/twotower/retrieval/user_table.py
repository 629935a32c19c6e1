"""Tables of users that are larger than memory: files of Parquet or CSV, cut into shards of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import polars as pl

from twotower.data.readers import (
    Reading,
    column_names,
    csv_options,
    is_text,
    parse_canonical_text,
    table_errors,
    table_files,
)
from twotower.data.table_shards import (
    TableFile,
    TableShard,
    cut_into_shards,
    names_within,
    read_slices,
    text_as_parquet,
)
from twotower.errors import DataError
from twotower.retrieval.request import Method
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.user_batch import read_columns


class UserTable:
    """The columns of a table of users that a method reads."""

    def __init__(self, source: Path, retriever: Retriever, method: Method) -> None:
        """Compare the columns of all files, and count their rows. Raises DataError."""
        users = retriever.dataset.users
        self._reading, self._id_type = Reading.of(retriever.schema, "user"), users.ids.dtype
        paths = table_files(source)
        schemas = [_schema(path) for path in paths]
        self.columns = read_columns(retriever, schemas[0].names(), method)
        """Columns that are read: the ids first."""
        self._booleans = [name for name in self.columns[1:] if users.frame.schema.get(name) == pl.Boolean]
        for path, schema in zip(paths[1:], schemas[1:], strict=True):
            for name in self.columns:
                if schema.get(name) != schemas[0][name]:
                    raise DataError(
                        f"{path}: column '{name}' is {schema.get(name, 'missing')}, and {schemas[0][name]} in {paths[0].name}; "
                        "give all files the same columns"
                    )
            if more := [name for name in read_columns(retriever, schema.names(), method) if name not in self.columns]:
                raise DataError(
                    f"{path}: column '{more[0]}' is not in {paths[0].name}; give all files the same columns"
                )
        self.files = [
            TableFile(path, name, self._length(path)) for path, name in zip(paths, names_within(paths), strict=True)
        ]
        self.rows = sum(file.rows or 0 for file in self.files)
        if not self.rows:
            raise DataError(f"{source}: the table has no users, expected at least one; fill it")
        self.states = [file.state() for file in self.files]
        """Name, size, time of change and rows of each file."""

    def shards(self, rows: int) -> list[TableShard]:
        """Return the shards of at most `rows` rows of one file."""
        return cut_into_shards(self.files, rows)

    def read(self, shard: TableShard, scratch: Path) -> pl.DataFrame:
        """Return the rows of a shard; a CSV is first written as Parquet into the folder `scratch`, once. Raises DataError, also if
        the file has changed since the table was opened."""
        table = self._scan(shard.file, scratch)
        (frame,) = read_slices(table, shard.file.path, shard.start, shard.rows or 0, shard.rows or 1)
        self._check_unchanged(shard.file)
        return self._typed(frame, shard.file.path) if is_text(shard.file.path) else frame

    def id_slices(self, scratch: Path, step: int) -> Iterator[pl.Series]:
        """Yield the ids of all users, `step` at a time."""
        for file in self.files:
            table = self._scan(file, scratch).select(self.columns[0])
            for frame in read_slices(table, file.path, 0, file.rows or 0, step):
                yield frame.to_series()

    def _length(self, path: Path) -> int:
        with table_errors(path):
            table = (
                pl.scan_csv(path, **csv_options(path, Reading(frozenset())))
                if is_text(path)
                else pl.scan_parquet(path, glob=False)
            )
            return int(table.select(pl.len()).collect(engine="streaming").item())

    def _scan(self, file: TableFile, scratch: Path) -> pl.LazyFrame:
        if not is_text(file.path):
            return pl.scan_parquet(file.path, glob=False).select(self.columns)
        copy = scratch / f"{self.files.index(file)}.parquet"
        with table_errors(file.path):
            return (
                pl.scan_parquet(copy, glob=False)
                if copy.exists()
                else text_as_parquet(file.path, self.columns, self._reading, copy)
            )

    def _typed(self, frame: pl.DataFrame, path: Path) -> pl.DataFrame:
        """Return rows of a CSV, which has no types, with ids of the bundle's type. Raises DataError for other ids."""
        texts = frame[self.columns[0]]
        ids = texts.cast(self._id_type, strict=False)
        bad = texts.filter((ids.cast(pl.String) != texts).fill_null(True) & texts.is_not_null())
        if len(bad):
            raise DataError(
                f"{path}: the id '{bad[0]}' of column '{texts.name}' is no {self._id_type}, as the ids of the bundle are; "
                "correct it, or give the table as Parquet with ids as text"
            )
        return frame.with_columns(ids, *(parse_canonical_text(frame[name]) for name in self._booleans))

    def _check_unchanged(self, file: TableFile) -> None:
        with suppress(OSError):
            if file.state() in self.states:
                return
        raise DataError(f"{file.path}: was changed while it was read; call again when it is complete")


def _schema(path: Path) -> pl.Schema:
    with table_errors(path):
        if is_text(path):
            return pl.Schema(dict.fromkeys(column_names(path), pl.String()))
        return pl.scan_parquet(path, glob=False).collect_schema()
