"""Tables larger than memory, cut into shards of rows that are read a slice at a time."""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import polars as pl

from twotower.data.reading.readers import columns_and_rows, need, table_errors
from twotower.data.reading.table_path import TablePath
from twotower.data.reading.table_paths import table_files, takes_in
from twotower.data.reading.text_files import Reading, as_types, text_as_parquet, text_types
from twotower.data.reading.text_format import TextFormat
from twotower.errors import DataError, RunError
from twotower.files.locks import scratch_folder
from twotower.files.places import JsonObject
from twotower.files.readers import file_digest
from twotower.files.urls import Url


@dataclass(frozen=True)
class TableFile:
    """A file of a table: its path, its name within the table, its number of rows, its size and time of change, or tag,
    as they were before it was first read, and its columns, of a text file as text."""

    path: TablePath
    name: str
    rows: int
    seen: tuple[str | int, ...]
    columns: pl.Schema = field(compare=False)

    @classmethod
    def look_at(cls, paths: Sequence[TablePath], reading: Reading) -> list[TableFile]:
        """Return the files at some paths, text files as in a reading. Raises DataError."""
        found = list[TableFile]()
        for path, name in zip(paths, names_within(paths), strict=True):
            with table_errors(path):
                seen = tuple(path.state())
                columns, rows = columns_and_rows(path, reading)
            found.append(cls(path, name, rows, seen, columns))
        return found

    def state(self) -> list[str | int]:
        """Return name, size in bytes, modification time or tag, and rows, to detect changes."""
        return [self.name, *self.seen, self.rows]

    def digest(self) -> str:
        """Return the SHA-256 of the content of a file on a disk; of another table that of its address and its state, as
        tag or version. Raises DataError."""
        if isinstance(self.path.place, Url) or not self.path.place.is_file():
            return hashlib.sha256(f"{self.path} {self.seen}".encode()).hexdigest()
        with table_errors(self.path):
            return file_digest(self.path.place)

    def check_unchanged(self) -> None:
        """Raise DataError if the file has changed since it was looked at."""
        with suppress(OSError, DataError):
            if tuple(self.path.state()) == self.seen:
                return
        raise DataError(
            f"{self.path}: was changed while it was read; when it is complete, call again with `overwrite=True`"
        )


@dataclass(frozen=True)
class TableShard:
    """Rows `start` to `start + rows` of a file."""

    number: int
    file: TableFile
    start: int
    rows: int


def check_apart(source: Path | Url, made: Path | Url, rows: str) -> None:
    """Raise RunError if a later call would read the file `made` as rows of the table `source`, or if the folder of
    `made` holds a file of the table. `rows` is what the rows are called, such as "users"."""
    out = made.parent
    if takes_in(source, made):
        raise RunError(
            f"{out}: lies in the table {source}, and the next call would read it as {rows}; choose a folder outside"
        )
    for path in table_files(source):
        if _lies_in(path.place, out):
            raise RunError(f"{out}: holds the file {path.name} of the table {source}; choose another folder")


def _lies_in(file: Path | Url, folder: Path | Url) -> bool:
    """Return True if a file is below a folder."""
    if isinstance(file, Path) and isinstance(folder, Path):
        return folder.resolve() in file.resolve().parents
    if isinstance(file, Url) and isinstance(folder, Url):
        return file.root == folder.root and file.parts[: len(folder.parts)] == folder.parts
    return False


def cut_into_shards(sources: list[TableFile], rows: int) -> list[TableShard]:
    """Return the shards of at most `rows` rows of the files, in their order; a file without rows has none."""
    shards: list[TableShard] = []
    for file in sources:
        for start in range(0, file.rows, rows):
            shards.append(TableShard(len(shards), file, start, min(rows, file.rows - start)))
    return shards


def names_within(paths: Sequence[TablePath]) -> list[str]:
    """Return the names of files within their common folder, or as they are if they have none."""
    try:
        base = PurePath(os.path.commonpath([p.path.parent for p in paths]))
    except ValueError:  # some are relative, or at URLs
        return [str(path) for path in paths]
    return [path.path.relative_to(base).as_posix() for path in paths]


def read_slices(table: pl.LazyFrame, source: TablePath, start: int, rows: int, step: int) -> Iterator[pl.DataFrame]:
    """Yield rows `start` to `start + rows` of a scanned Parquet file, `step` at a time. Raises DataError, which names
    `source`, if fewer are there."""
    for first in range(0, rows, step):
        wanted = min(step, rows - first)
        with table_errors(source):
            # A slice of a Parquet file skips the rows before it; streamed batches would be read far ahead.
            frame = table.slice(start + first, wanted).collect(engine="streaming")
        if len(frame) != wanted:
            raise DataError(f"{source}: was changed while it was read; call again when it is complete")
        yield frame


class ShardedTable:
    """Columns of a table, read a slice at a time. A process copies a text file as Parquet into its temporary folder,
    where one such copy is at a time: the shards of a file come one after the other."""

    def __init__(self, source: Path | Url, reading: Reading, form: TextFormat, known: pl.Schema) -> None:
        """Look at the columns of all files, and count their rows. `reading` has the types of text files in a form, and
        `known` those of the training, whose booleans are parsed from text. Raises DataError."""
        paths = table_files(source)
        form.check_used({"interactions": next((path for path in paths if path.is_text), None)}, "`{}`")
        self.files = TableFile.look_at(paths, reading)
        self.schemas = [file.columns for file in self.files]
        self.rows = sum(file.rows for file in self.files)
        self.names = {name for schema in self.schemas for name in schema}
        self.columns = list[str]()
        """Columns that are read: the ids first."""
        self._reading = reading
        self._typed = (reading.numbers or frozenset()) | {n for n, dtype in known.items() if dtype == pl.Boolean}
        self._copies: Path | None = None
        self._copied_types = dict[str, pl.DataType]()

    def __getstate__(self) -> JsonObject:
        """Return what another process needs, which makes copies of its own."""
        return vars(self) | {"_copies": None}

    def select(self, columns: list[str], rows: str) -> None:
        """Choose the columns that are read. Raises DataError if a file lacks one, or if there are no rows, such as
        "users"."""
        for schema in self.schemas:
            need(pl.DataFrame(schema=schema), columns, rows)
        if not self.rows:
            raise DataError(f"{rows}: the table has no rows, expected at least one; fill it")
        self.columns = columns

    def shards(self, rows: int) -> list[TableShard]:
        """Return the shards of at most `rows` rows of one file."""
        return cut_into_shards(self.files, rows)

    def slices(self, shard: TableShard, step: int, columns: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
        """Yield the rows of a shard, at most `step` at a time, with some of the columns, or all. Raises DataError, also
        if the file has changed since it was looked at."""
        path, table = shard.file.path, self._scan(shard.file).select(columns or self.columns)
        for frame in read_slices(table, path, shard.start, shard.rows, step):
            types = {name: dtype for name, dtype in self._copied_types.items() if name in frame.columns}
            yield frame.with_columns(as_types(types, self._reading.of_file(path))) if path.is_text else frame
        shard.file.check_unchanged()

    def states(self) -> dict[str, list[str | int]]:
        """Return the states of the files, by words for messages that name a file: "table (a.parquet)"."""
        return {f"table ({name})": state for name, *state in (file.state() for file in self.files)}

    def check_unchanged(self) -> None:
        """Raise DataError if a file has changed since it was looked at."""
        for file in self.files:
            file.check_unchanged()

    def _scan(self, file: TableFile) -> pl.LazyFrame:
        with table_errors(file.path):
            if not file.path.is_text:
                return file.path.scan()
            if self._copies is None:
                held = ExitStack()
                self._copies = held.enter_context(scratch_folder(Path(tempfile.gettempdir()), "text"))
                weakref.finalize(self, held.close)
            copy = self._copies / f"{hashlib.sha256(file.name.encode()).hexdigest()}.parquet"
            if not copy.exists():
                for other in self._copies.iterdir():
                    other.unlink()
                text_as_parquet(file.path, self.columns, self._reading, half := copy.with_suffix(".half"))
                half.rename(copy)  # a disk that is full leaves no copy
                table = pl.scan_parquet(copy, glob=False)
                self._copied_types = text_types(table, self._reading.of_file(file.path), self._typed)
            return pl.scan_parquet(copy, glob=False)
