"""A file of a table, on the disk or at a URL, and the columns that its folders give."""

from __future__ import annotations

import codecs
import gzip
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path, PurePath
from typing import BinaryIO

import polars as pl

from twotower.errors import DataError
from twotower.files.locks import scratch_folder
from twotower.files.object_stores import ObjectClient, ObjectError
from twotower.files.urls import Url

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".pq")


@dataclass(frozen=True)
class FolderColumn:
    """A column whose value is that of the folder `name=value` around a file, of a type common to all files of a
    table."""

    name: str
    value: int | date | str | None
    type: pl.DataType


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
        return self._as_utf8.open_bytes()

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
        table = pl.scan_parquet(
            self._where, glob=False, hive_partitioning=False, storage_options=self._storage, credential_provider=None
        )
        return self.with_folder_columns(table) if self.folder_columns else table

    def scan_csv(
        self, separator: str, names: Sequence[str] = (), quote_char: str | None = '"', first: bool = False
    ) -> pl.LazyFrame:
        """Scan a text file, all columns as text, without the columns of its folders. Without `names` the first line has
        them; the `first` line alone is a row, and those after it may have more values."""
        file = self._as_utf8
        return pl.scan_csv(
            file._where, glob=False, infer_schema=False, separator=separator, quote_char=quote_char,
            has_header=not (names or first), new_columns=list(names) or None, n_rows=1 if first else None,
            truncate_ragged_lines=first, storage_options=file._storage, credential_provider=None,
        )  # fmt: skip

    def with_folder_columns(self, table: pl.LazyFrame) -> pl.LazyFrame:
        """Add the columns of the folders that a table lacks."""
        if not self.folder_columns:
            return table
        own = table.collect_schema().names()
        return table.with_columns(
            pl.lit(c.value, c.type).alias(c.name) for c in self.folder_columns if c.name not in own
        )

    @property
    def _as_utf8(self) -> TablePath:
        """The file, or a copy of a text file of another encoding. Raises OSError, RunError, or DataError for another
        one."""
        is_utf8 = not self.is_text or codecs.lookup(self.encoding or "utf-8").name == "utf-8"
        return self if is_utf8 else TablePath(_utf8_copy(self, *self.state()).path)

    def decoded(self, encoding: str, errors: str = "strict") -> TextIOWrapper:
        """Open the text of the file in an encoding. Raises OSError, RunError."""
        return TextIOWrapper(self.open_bytes(), encoding, errors, newline="")

    @property
    def _where(self) -> Path | str:
        return self.place if isinstance(self.place, Path) else str(self.place)

    @property
    def _storage(self) -> dict[str, str | int] | None:
        """Options of polars that read the file with the limits and the credentials of this package."""
        return None if isinstance(self.place, Path) else dict(ObjectClient(self.place).limits.for_polars())


class _Utf8Copy:
    """A copy of a text file as UTF-8, in a folder that lives as long as the copy. A file that is UTF-8 stays so: text
    of another encoding hardly ever looks like it. A file of ASCII is decoded where the encoding writes letters as ASCII
    does: some encodings write other letters with characters of ASCII."""

    def __init__(self, source: TablePath) -> None:
        held = ExitStack()
        self.path = held.enter_context(scratch_folder(Path(tempfile.gettempdir()), "utf8")) / f"copy{source.ending}"
        weakref.finalize(self, held.close)
        encoding = str(source.encoding)
        with suppress(UnicodeError), source.decoded("utf-8") as text:
            blocks = [(block.isascii(), "\0" in block) for block in iter(lambda: text.read(2**20), "")]
            is_other = all(is_ascii for is_ascii, _ in blocks) and "a".encode(encoding) == b"a"
            encoding = encoding if is_other or any(has_zero for _, has_zero in blocks) else "utf-8"
        try:
            with source.decoded(encoding) as text, self.path.open("w", encoding="utf-8", newline="") as copy:
                shutil.copyfileobj(text, copy, 2**20)
        except UnicodeError:
            line = 1
            with suppress(UnicodeError), source.decoded(encoding, "replace") as text:  # UTF-16 needs its mark
                line = next((n for n, line in enumerate(text, 1) if "\ufffd" in line), 1)
            raise DataError(
                f"{source}: line {line:,} is not {encoding}; name the encoding of the file in data.format.encoding"
            ) from None


@lru_cache(maxsize=4)
def _utf8_copy(source: TablePath, *state: str | int) -> _Utf8Copy:
    """Return the copy of a file in some state. Those of the latest files stay, as many as are read together."""
    return _Utf8Copy(source)


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
