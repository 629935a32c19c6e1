"""A file of a table, on the disk or at a URL, and the columns that its folders give."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePath
from typing import BinaryIO, TypedDict, Unpack

import polars as pl

from twotower.errors import DataError
from twotower.files.object_stores import ObjectClient, ObjectError
from twotower.files.urls import Url

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".pq")


class CsvOptions(TypedDict, total=False):
    """Options of polars for a CSV or TSV."""

    separator: str
    has_header: bool
    new_columns: list[str] | None
    infer_schema: bool
    infer_schema_length: None
    try_parse_dates: bool
    decimal_comma: bool
    schema_overrides: dict[str, type[pl.String]]
    quote_char: None
    n_rows: int
    truncate_ragged_lines: bool


class _ServerOptions(TypedDict, total=False):
    """Options of polars for a file at a URL."""

    storage_options: dict[str, str | int]
    credential_provider: None


@dataclass(frozen=True)
class FolderColumn:
    """A column whose value is that of the folder `name=value` around a file. `type` is common to all files of a table: whole
    numbers, dates (2026-11-01) or text."""

    name: str
    text: str | None
    type: type[pl.Int64] | type[pl.Date] | type[pl.String]

    def literal(self, as_text: bool) -> pl.Expr:
        """Return the value as an expression, of its type or as text."""
        if as_text or self.type is pl.String or self.text is None:
            return pl.lit(self.text, pl.String if as_text else self.type).alias(self.name)
        value = int(self.text) if self.type is pl.Int64 else date.fromisoformat(self.text)
        return pl.lit(value, self.type).alias(self.name)


@dataclass(frozen=True)
class TablePath:
    """A file of a table."""

    place: Path | Url
    folder_columns: tuple[FolderColumn, ...] = ()

    def __str__(self) -> str:
        return str(self.place)

    @property
    def path(self) -> PurePath:
        """The path, of a URL that of its bucket and key, for its names."""
        return self.place.path if isinstance(self.place, Url) else self.place

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def ending(self) -> str:
        """The ending of the name in lower case; of gzipped text files, that before ".gz"."""
        return ending(self.path)

    @property
    def is_text(self) -> bool:
        """True for a text file, gzipped or not, by the ending."""
        return self.ending in TEXT_SUFFIXES

    @property
    def identity(self) -> str:
        """A text that is the same for two names of one file."""
        return str(self.place.resolve() if isinstance(self.place, Path) else self.place)

    def state(self) -> list[str | int]:
        """Return the size in bytes and the time of change or the tag, to detect changes. Raises OSError, RunError."""
        if isinstance(self.place, Path):
            found = self.place.stat()
            return [found.st_size, found.st_mtime_ns]
        with table_server():
            info = ObjectClient(self.place).head(self.place.key)
        if info is None:
            raise DataError(f"{self}: no such file")
        return [info.size, info.tag]

    def open(self) -> BinaryIO | gzip.GzipFile:
        """Open the file, of a gzipped one the content. Raises OSError, RunError."""
        is_gzipped = self.name.lower().endswith(".gz")
        if isinstance(self.place, Path):
            return gzip.open(self.place, "rb") if is_gzipped else self.place.open("rb")
        with table_server():
            file = ObjectClient(self.place).open(self.place.key)
        return gzip.open(file, "rb") if is_gzipped else file

    def scan(self) -> pl.LazyFrame:
        """Scan a Parquet file, with the columns of its folders that it lacks."""
        table = pl.scan_parquet(self._where, glob=False, hive_partitioning=False, **self._options)
        return self.with_folder_columns(table) if self.folder_columns else table

    def scan_csv(self, **options: Unpack[CsvOptions]) -> pl.LazyFrame:
        """Scan a text file, without the columns of its folders."""
        return pl.scan_csv(self._where, glob=False, **options, **self._options)

    def read_csv(self, **options: Unpack[CsvOptions]) -> pl.DataFrame:
        """Read a text file, without the columns of its folders."""
        if isinstance(self.place, Path):
            return pl.read_csv(self.place, glob=False, **options)
        return self.scan_csv(**options).collect()

    def with_folder_columns(self, table: pl.LazyFrame, as_text: frozenset[str] | None = frozenset()) -> pl.LazyFrame:
        """Add the columns of the folders that a table lacks; those of `as_text`, of all if that is None, are text."""
        if not self.folder_columns:
            return table
        own = table.collect_schema().names()
        return table.with_columns(
            c.literal(as_text is None or c.name in as_text) for c in self.folder_columns if c.name not in own
        )

    @property
    def _where(self) -> Path | str:
        return self.place if isinstance(self.place, Path) else str(self.place)

    @property
    def _options(self) -> _ServerOptions:
        """Options of polars that read the file with the limits and the credentials of this package."""
        if isinstance(self.place, Path):
            return {}
        return {"storage_options": ObjectClient(self.place).limits.for_polars(), "credential_provider": None}


@contextmanager
def table_server() -> Iterator[None]:
    """Raise DataError for what an object store or server does not have or allow. A server that does not answer stays an
    ObjectError, after which a later call may go on."""
    try:
        yield
    except ObjectError as e:
        if e.cause == "unreachable":
            raise
        raise DataError(str(e)) from None


def ending(path: PurePath) -> str:
    """Return the ending of a file's name in lower case; of gzipped text files, that before ".gz"."""
    inner = Path(path.name.lower().removesuffix(".gz")).suffix
    return inner if inner in TEXT_SUFFIXES else path.suffix.lower()
