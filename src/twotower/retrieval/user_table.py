"""Tables of users that are larger than memory: files of Parquet or CSV, cut into shards of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from twotower.data.column_types import common_types, with_types
from twotower.data.readers import Reading, table_errors
from twotower.data.table_shards import ShardedTable, TableShard
from twotower.data.text_format import TextFormat
from twotower.errors import DataError
from twotower.files.urls import Url
from twotower.retrieval.request import Method
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.user_batch import read_columns


class UserTable(ShardedTable):
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
        users, form = retriever.dataset.users, form or TextFormat()
        super().__init__(source, Reading.of(retriever.schema, "user").of_table(form), form, users.frame.schema)
        paths, schemas = [file.path for file in self.files], self.schemas
        columns = read_columns(retriever, schemas[0].names(), method)
        for path, schema in zip(paths[1:], schemas[1:], strict=True):
            for name in columns:
                if name not in schema:
                    raise DataError(
                        f"{path}: no column '{name}', which {paths[0].name} has; give all files the same columns"
                    )
            if more := [name for name in read_columns(retriever, schema.names(), method) if name not in columns]:
                raise DataError(
                    f"{path}: column '{more[0]}' is not in {paths[0].name}; give all files the same columns"
                )
        self.select(columns, "users")
        self._types = common_types(paths, [pl.Schema({name: schema[name] for name in columns}) for schema in schemas])
        is_typed = not all(path.is_text for path in paths)
        self.odd_id = None if is_typed else self._odd_id(users.ids.dtype)
        """The first id of a CSV that is not spelled as the ids of the bundle are, which are whole numbers; None without one."""
        id_type = self._types[self.columns[0]] if is_typed else users.ids.dtype
        self.id_type = pl.String() if self.odd_id is not None and answers_unknown else id_type
        """Type of the ids of answers. A CSV has no types: the bundle's, or text if an answered id is spelled otherwise."""

    def read(self, shard: TableShard) -> pl.DataFrame:
        """Return the rows of a shard, of a CSV with ids as text. Raises DataError as `slices` does."""
        (frame,) = self.slices(shard, shard.rows)
        return frame if shard.file.path.is_text else with_types(shard.file.path, frame, self._types)

    def id_slices(self, rows: int) -> Iterator[pl.Series]:
        """Yield the ids of all users, at most `rows` at a time."""
        key = self.columns[0]
        for shard in self.shards(rows):
            (frame,) = self.slices(shard, rows, [key])
            yield with_types(shard.file.path, frame, {key: self._types[key]}).to_series()

    def _odd_id(self, id_type: pl.DataType) -> str | None:
        """Return the first id of a CSV that is not spelled as those of a type are, None without one."""
        for file in self.files:
            with table_errors(file.path):
                ids = self._scan(file).select(pl.col(self.columns[0]).alias("id"))
                is_odd = pl.col("id").cast(id_type, strict=False).cast(pl.String).ne_missing(pl.col("id"))
                odd = ids.filter(is_odd & pl.col("id").is_not_null()).head(1).collect(engine="streaming")
            if len(odd):
                return str(odd.item())
        return None
