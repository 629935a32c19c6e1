"""Text files of a log, copied as Parquet, with the types that all of them allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from twotower.data.readers import CANONICAL_BOOLEAN, CANONICAL_INTEGER, Reading, table_errors
from twotower.data.table_path import TablePath
from twotower.data.table_shards import TableFile, text_as_parquet
from twotower.files.resumable import make_once


@dataclass(frozen=True)
class TextLog:
    """Copies of text files by name, and the type of each column of text, as `readers.parse_canonical_text` gives it to
    the whole column."""

    copies: Mapping[str, Path]
    types: Mapping[str, pl.DataType]

    @classmethod
    def copy(cls, files: Sequence[TableFile], columns: list[str], reading: Reading, folder: Path) -> TextLog:
        """Write columns of the files as Parquet into a folder, those files that it lacks. Raises DataError."""
        folder.mkdir(exist_ok=True)
        copies = {file.name: folder / f"{n:06d}.parquet" for n, file in enumerate(files)}
        first = 0
        for file in files:

            def into(to: Path, path: TablePath = file.path, first: int = first) -> None:
                with table_errors(path):
                    text_as_parquet(path, columns, reading, to, first)

            make_once(copies[file.name], into)
            first += file.rows
        text = [name for name in columns if name not in (reading.numbers or ())]
        return cls(copies, _types([*copies.values()], text))

    def scan(self, file: TableFile) -> pl.LazyFrame:
        """Return the copy of a file, with the types of its columns."""
        typed = (
            (pl.col(name).str.to_lowercase() == "true").alias(name) if dtype == pl.Boolean else pl.col(name).cast(dtype)
            for name, dtype in self.types.items()
        )
        return pl.scan_parquet(self.copies[file.name], glob=False).with_columns(typed)


def _types(copies: list[Path], columns: list[str]) -> dict[str, pl.DataType]:
    """Return the types of columns of text that are no text in any file."""
    table = pl.concat([pl.scan_parquet(path, glob=False).select(columns) for path in copies])
    found = dict[str, pl.DataType]()
    for name in columns:
        values = pl.col(name)
        n = values.count()
        tests = {
            "integer": values.str.contains(CANONICAL_INTEGER).all(),
            "boolean": values.str.contains(CANONICAL_BOOLEAN).all(),
            **{str(t): values.cast(t, strict=False).count() == n for t in (pl.Int64, pl.UInt64)},
        }
        row = table.select(n.alias("n"), *(test.alias(key) for key, test in tests.items())).collect(engine="streaming")
        is_true = row.row(0, named=True)
        if not is_true["n"]:
            continue
        wide = next((t for t in (pl.Int64, pl.UInt64) if is_true[str(t)]), None)
        if is_true["integer"] and wide is not None:
            found[name] = wide()
        elif is_true["boolean"]:
            found[name] = pl.Boolean()
    return found
