"""Tables of users that are larger than memory: files of Parquet or CSV, cut into shards of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from twotower.data.column_types import common_types, with_types
from twotower.data.readers import Reading, column_names, parse_canonical_text, scan_text, table_errors
from twotower.data.table_path import TablePath
from twotower.data.table_paths import table_files
from twotower.data.table_shards import (
    TableFile,
    TableShard,
    cut_into_shards,
    read_slices,
    scan_columns,
)
from twotower.data.text_format import TextFormat
from twotower.errors import DataError
from twotower.files.urls import Url
from twotower.retrieval.request import Method
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.user_batch import read_columns


class UserTable:
    """The columns of a table of users that a method reads."""

    def __init__(
        self,
        source: Path | Url,
        retriever: Retriever,
        method: Method = 1,
        answers_unknown: bool = True,
        form: TextFormat | None = None,
    ) -> None:
        """Compare the columns of all files, count their rows, and look for ids of a CSV that the bundle could not have; these get
        an answer with `answers_unknown`. Text files are in a form. Raises DataError."""
        users = retriever.dataset.users
        paths, form = table_files(source), form or TextFormat()
        form.check_table(paths)
        self._reading = Reading.of(retriever.schema, "user").of_table(form)
        files = TableFile.look_at(paths)
        schemas = [_schema(path, self._reading) for path in paths]
        self.columns = read_columns(retriever, schemas[0].names(), method)
        """Columns that are read: the ids first."""
        self._booleans = [name for name in self.columns[1:] if users.frame.schema.get(name) == pl.Boolean]
        for path, schema in zip(paths[1:], schemas[1:], strict=True):
            for name in self.columns:
                if name not in schema:
                    raise DataError(
                        f"{path}: no column '{name}', which {paths[0].name} has; give all files the same columns"
                    )
            if more := [name for name in read_columns(retriever, schema.names(), method) if name not in self.columns]:
                raise DataError(
                    f"{path}: column '{more[0]}' is not in {paths[0].name}; give all files the same columns"
                )
        kept = [pl.Schema({name: schema[name] for name in self.columns}) for schema in schemas]
        self._types = common_types(paths, kept)
        measured = [self._measure(path, users.ids.dtype) for path in paths]
        self.files = [replace(file, rows=rows) for file, (rows, _) in zip(files, measured, strict=True)]
        self.rows = sum(file.rows or 0 for file in self.files)
        if not self.rows:
            raise DataError(f"{source}: the table has no users, expected at least one; fill it")
        is_typed = not all(path.is_text for path in paths)
        self.odd_id = None if is_typed else next((odd for _, odd in measured if odd is not None), None)
        """The first id of a CSV that is not spelled as the ids of the bundle are, which are whole numbers; None without one."""
        id_type = self._types[self.columns[0]] if is_typed else users.ids.dtype
        self.id_type = pl.String() if self.odd_id is not None and answers_unknown else id_type
        """Type of the ids of answers. A CSV has no types: the bundle's, or text if an answered id is spelled otherwise."""

    def shards(self, rows: int) -> list[TableShard]:
        """Return the shards of at most `rows` rows of one file."""
        return cut_into_shards(self.files, rows)

    def read(self, shard: TableShard, scratch: Path) -> pl.DataFrame:
        """Return the rows of a shard, of a CSV with ids as text; a CSV is first written as Parquet into the folder `scratch`, once for each such folder.
        Raises DataError, also if the file has changed since the table was opened."""
        table = self._scan(shard.file, scratch)
        (frame,) = read_slices(table, shard.file.path, shard.start, shard.rows or 0, shard.rows or 1)
        shard.file.check_unchanged()
        if not shard.file.path.is_text:
            return with_types(shard.file.path, frame, self._types)
        return frame.with_columns(parse_canonical_text(frame[name]) for name in self._booleans)

    def id_slices(self, scratch: Path, step: int) -> Iterator[pl.Series]:
        """Yield the ids of all users, `step` at a time."""
        for file in self.files:
            key = self.columns[0]
            table = self._scan(file, scratch).select(key)
            for frame in read_slices(table, file.path, 0, file.rows or 0, step):
                yield with_types(file.path, frame, {key: self._types[key]}).to_series()

    def check_unchanged(self) -> None:
        """Raise DataError if a file has changed since the table was opened."""
        for file in self.files:
            file.check_unchanged()

    def _measure(self, path: TablePath, id_type: pl.DataType) -> tuple[int, str | None]:
        """Return the number of rows of a file, and the first id of a CSV that is not spelled as those of a type are."""
        with table_errors(path):
            if not path.is_text:
                return int(path.scan().select(pl.len()).collect(engine="streaming").item()), None
            table = scan_text(path, replace(self._reading, numbers=frozenset()))
            ids = pl.col(self.columns[0])
            is_odd = (ids.cast(id_type, strict=False).cast(pl.String) != ids).fill_null(ids.is_not_null())
            rows, odd = table.select(pl.len(), ids.filter(is_odd).first()).collect(engine="streaming").row(0)
            return rows, odd

    def _scan(self, file: TableFile, scratch: Path) -> pl.LazyFrame:
        return scan_columns(file, self.columns, self._reading, scratch / f"{self.files.index(file)}.parquet")


def _schema(path: TablePath, reading: Reading) -> pl.Schema:
    with table_errors(path):
        if path.is_text:
            return pl.Schema(dict.fromkeys(column_names(path, reading), pl.String()))
        return path.scan().collect_schema()
