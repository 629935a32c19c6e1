"""A file of a table, on the disk or at a URL, and the columns that its folders give."""

from __future__ import annotations

import atexit
import codecs
import gzip
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePath
from threading import Lock
from typing import Any, BinaryIO, TypedDict, Unpack

import polars as pl

from twotower.errors import DataError
from twotower.files.object_stores import ObjectClient, ObjectError
from twotower.files.scratch import scratch_folder
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


COPIES = 4
"""Copies of text files as UTF-8 that a process has at once: of the tables that it reads together."""
_copies: dict[tuple[object, ...], Path] = {}
_copying = Lock()
_held: list[Any] = []
"""Holder of the folder of the copies until the process ends, and the folder."""


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
    encoding: str | None = None
    """Encoding of a text file, as Python names it. None: UTF-8, and no option of the reader names another one."""

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
        """Open the file, of a gzipped one the content, as UTF-8. Raises OSError, RunError, DataError."""
        return self.open_bytes() if self._is_utf8 else self._utf8_copy.open("rb")

    def open_bytes(self) -> BinaryIO | gzip.GzipFile:
        """Open the file in its own encoding, of a gzipped one the content. Raises OSError, RunError."""
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
        if not self._is_utf8:
            return pl.scan_csv(self._utf8_copy, glob=False, **options)
        return pl.scan_csv(self._where, glob=False, **options, **self._options)

    def read_csv(self, **options: Unpack[CsvOptions]) -> pl.DataFrame:
        """Read a text file, without the columns of its folders."""
        if isinstance(self.place, Path) or not self._is_utf8:
            return pl.read_csv(self.place if self._is_utf8 else self._utf8_copy, glob=False, **options)  # type: ignore[arg-type]
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
    def _is_utf8(self) -> bool:
        return not self.is_text or codecs.lookup(self.encoding or "utf-8").name == "utf-8"

    @property
    def _utf8_copy(self) -> Path:
        """A copy of the file as UTF-8, made where the latest COPIES lack it. Raises OSError, RunError, and DataError with the number of the first
        line that is not of the encoding."""
        key = (self.identity, self.encoding, *self.state())
        with _copying:
            if key not in _copies:
                while len(_copies) >= COPIES:
                    _copies.pop(next(iter(_copies))).unlink(missing_ok=True)
                if not _held:
                    _held.append(ExitStack())
                    atexit.register(_held[0].close)
                    _held.append(_held[0].enter_context(scratch_folder(Path(tempfile.gettempdir()), "utf8")))
                _copies[key] = self._write_utf8(_held[1] / f"{secrets.token_hex(8)}{self.ending}")
            _copies[key] = _copies.pop(key)
            return _copies[key]

    def _holds_utf8(self) -> bool:
        """Return True for a file of UTF-8 that is not ASCII alone, which bytes of other encodings hardly ever are."""
        decoder, is_ascii = codecs.getincrementaldecoder("utf-8")(), True
        with self.open_bytes() as source:
            try:
                while block := source.read(2**20):
                    decoder.decode(block)
                    is_ascii = is_ascii and block.isascii()
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return False
        return not is_ascii

    def _write_utf8(self, to: Path) -> Path:
        encoding = "utf-8" if self._holds_utf8() else str(self.encoding)
        decoder = codecs.getincrementaldecoder(encoding)()
        line, is_last = 1, False
        with self.open_bytes() as source, to.open("w", encoding="utf-8", newline="") as copy:
            while not is_last:
                block, before = source.read(2**20), decoder.getstate()
                is_last = not block
                try:
                    text = decoder.decode(block, is_last)
                except UnicodeError as e:
                    decoder.setstate(before)
                    read = getattr(e, "start", 0) - len(before[0])
                    line += decoder.decode(block[: max(0, read)]).count("\n")
                    raise DataError(
                        f"{self}: line {line:,} is not {self.encoding}; name the encoding of the file in data.format.encoding"
                    ) from None
                line += text.count("\n")
                copy.write(text.removeprefix("\ufeff") if not copy.tell() else text)
        return to

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
