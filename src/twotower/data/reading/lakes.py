"""Tables of a lake: folders that a log or a metadata file describes, read as of one version. A place may end with the
number of a version, as Spark's readers of Delta Lake have it: "lake/clicks@v12"."""

from __future__ import annotations

import hashlib
import os
import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import polars as pl

from twotower.data.reading.table_path import TABLE_SUFFIXES, TablePath, ending, table_server
from twotower.errors import DataError, first_line, missing_package
from twotower.files import places
from twotower.files.object_stores import ObjectClient, ObjectError, RemoteLimits, explain
from twotower.files.urls import Url

if TYPE_CHECKING:
    from deltalake import DeltaTable

_VERSION = re.compile(r"(.+)@v(\d{1,19})", re.DOTALL)
_DELTA_LOG = "_delta_log"
_METADATA, _HINT, _ENDING = "metadata", "version-hint.text", ".metadata.json"


def lake_table(place: Path | Url) -> LakeTable | None:
    """Return the table of a lake at a place, in the version that the place names or the current one; None if it is
    none. Raises DataError, ObjectError."""
    if table := _table(place, None):
        return table
    if not (named := _VERSION.fullmatch(place.name)) or (isinstance(place, Path) and place.exists()):
        return None
    return _table(place.with_name(named[1]) if isinstance(place, Path) else place.parent / named[1], int(named[2]))


def _table(place: Path | Url, version: int | None) -> LakeTable | None:
    if isinstance(place, Url) and (ending(Path(place.name)) in TABLE_SUFFIXES or has_magic(place.key)):
        return None  # a file or a pattern: nothing is listed
    kind = next((kind for kind in (DeltaLakeTable, IcebergTable) if kind.finds(place)), None)
    if kind is None:
        return None
    with _lake_errors(place, kind.what):
        return kind.at(place, version)


@dataclass(frozen=True)
class LakeTable(TablePath):
    """A table of a lake. All scans are of the version that was named, or was the current one, when it was opened."""

    version: int = 0
    table_id: str = ""
    """Identity of the table, which another table at the same place has not."""
    files: str = ""
    """Digest of the version's files in their order, which is that of its rows."""

    what: ClassVar[str] = ""
    """Name of the format in messages."""

    @classmethod
    @abstractmethod
    def finds(cls, place: Path | Url) -> bool:
        """Return True if a place is a table of this kind. Raises DataError for one whose kind is unclear."""

    @classmethod
    @abstractmethod
    def at(cls, place: Path | Url, version: int | None) -> LakeTable:
        """Return the table with a version, by its number in this kind of lake, or with its current one. Raises
        DataError."""

    @abstractmethod
    def rows(self) -> pl.LazyFrame:
        """Scan the version. Raises the errors of a library."""

    def scan(self) -> pl.LazyFrame:
        with _lake_errors(self.place, self.what):
            return self.rows()

    @property
    def ending(self) -> str:
        """The ending of the files inside."""
        return ".parquet"

    def state(self) -> list[str | int]:
        """Return what stays as it is: the version, the identity of the table, its files."""
        return [self.version, self.table_id, *filter(None, [self.files])]


class DeltaLakeTable(LakeTable):
    """A folder with a log `_delta_log`. Only the log tells which of the files inside belong to a version."""

    what: ClassVar[str] = "Delta Lake"

    @classmethod
    def finds(cls, place: Path | Url) -> bool:
        return _may_list(place) and _has(place, _DELTA_LOG)

    @classmethod
    def at(cls, place: Path | Url, version: int | None) -> DeltaLakeTable:
        if isinstance(place, Path) and place.absolute().as_uri() != f"file://{place.absolute()}":
            raise DataError(
                f"{place}: a table of {cls.what} in a path of other characters than ASCII letters, digits and -._~ "
                "cannot be read; move it, or give its frame in Python"
            )
        table = _delta(place, version)
        return cls(place, version=table.version(), table_id=str(table.metadata().id), files=_digest(table))

    def rows(self) -> pl.LazyFrame:
        table = _delta(self.place, self.version)
        if _digest(table) != self.files:
            raise DataError(
                f"{self.place}: version {self.version} lists other files, or in another order, than when its reading "
                "began; start again"
            )
        if isinstance(self.place, Path):
            return pl.scan_delta(table)
        return pl.scan_delta(table, storage_options=RemoteLimits().for_polars(), credential_provider=None)


def _delta(place: Path | Url, version: int | None) -> DeltaTable:
    """Open a version of a table, or the current one. Raises DataError for a version that is not there yet, which the
    reader would look for among all numbers up to it."""
    from deltalake import DeltaTable

    options = RemoteLimits().for_delta() if isinstance(place, Url) else None
    table = DeltaTable(str(place), storage_options=options)
    if version is not None and version > (last := table.version()):
        raise DataError(f"{place}: has no version {version}, and the last is {last}; name one up to it (@vNUMBER)")
    if version is not None and version < last:
        table.load_as_version(version)
    return table


def _digest(table: DeltaTable) -> str:
    return hashlib.blake2b("\n".join(table.file_uris()).encode(), digest_size=8).hexdigest()


class IcebergTable(LakeTable):
    """A metadata file, or a folder that says which one is current; its current snapshot is read, or one by its id."""

    what: ClassVar[str] = "Apache Iceberg"

    @classmethod
    def finds(cls, place: Path | Url) -> bool:
        if place.name.endswith(_ENDING):
            return True
        if not _may_list(place) or not _has(place, _METADATA):
            return False
        if _has(place, f"{_METADATA}/{_HINT}"):
            return True
        with table_server():
            names = places.names(place / _METADATA)
        if any(name.endswith(_ENDING) for name in names):
            raise DataError(
                f"{place}: a table of {cls.what} whose catalog alone knows the current version; name its metadata "
                f"file, {place}/{_METADATA}/….{_ENDING[1:]}, or give the table's scan().to_arrow() in Python"
            )
        return False

    @classmethod
    def at(cls, place: Path | Url, version: int | None) -> IcebergTable:
        file = place if place.name.endswith(_ENDING) else _hinted(place)
        from pyiceberg.table import StaticTable

        table = StaticTable.from_metadata(_location(file), _properties())
        snapshot = table.current_snapshot() if version is None else table.snapshot_by_id(version)
        if snapshot is None and version is not None and table.snapshots():
            known = ", ".join(str(s.snapshot_id) for s in table.snapshots()[-3:])
            raise DataError(
                f"{place}: has no snapshot {version}, and the last ones are {known}; name one of them (@vNUMBER)"
            )
        if snapshot is None:
            raise DataError(f"{place}: the table of {cls.what} has no snapshot; write rows into it")
        return cls(file, version=snapshot.snapshot_id, table_id=str(table.metadata.table_uuid))

    def rows(self) -> pl.LazyFrame:
        from pyiceberg.table import StaticTable

        table = StaticTable.from_metadata(_location(self.place), _properties())
        options = RemoteLimits().for_polars() if isinstance(self.place, Url) else None
        return pl.scan_iceberg(table, snapshot_id=self.version, storage_options=options)


def _location(file: Path | Url) -> str:
    return f"file://{file.absolute()}" if isinstance(file, Path) else str(file)


def _hinted(place: Path | Url) -> Path | Url:
    """Return the metadata file that the hint of a folder names."""
    folder = place / _METADATA
    with table_server():
        name = (places.read(folder / _HINT) or b"").decode().strip()
    return folder / (name if name.endswith(_ENDING) else f"{'v' if name.isdigit() else ''}{name}{_ENDING}")


def _properties() -> dict[str, str]:
    """Return the settings of the environment as pyiceberg calls them."""
    names = {
        "s3.endpoint": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"), "s3.region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        "s3.access-key-id": ("AWS_ACCESS_KEY_ID",), "s3.secret-access-key": ("AWS_SECRET_ACCESS_KEY",),
        "s3.session-token": ("AWS_SESSION_TOKEN",),
    }  # fmt: skip
    given = {name: next(filter(None, map(os.environ.get, of)), "") for name, of in names.items()}
    limits = RemoteLimits()
    times = {"s3.connect-timeout": f"{limits.connect_seconds:g}", "s3.request-timeout": f"{limits.silence_seconds:g}"}
    return {name: value for name, value in given.items() if value} | times


@contextmanager
def _lake_errors(place: Path | Url, what: str) -> Iterator[None]:
    """Turn the errors of a library of a lake into DataErrors of one line."""
    try:
        yield
    except ModuleNotFoundError as e:
        raise missing_package(e, f"{place}: a table of {what}") or e from None
    except DataError:
        raise
    except Exception as e:  # each library has errors of its own
        if isinstance(place, Url) and isinstance(e, OSError):
            with table_server():
                raise explain(e, place) from None
        raise DataError(f"{place}: cannot be read as a table of {what} ({first_line(e)})") from None


def _may_list(place: Path | Url) -> bool:
    return isinstance(place, Path) or place.is_object_store


def _has(place: Path | Url, name: str) -> bool:
    """Return True if a folder, or a prefix that may be listed, holds something of a name. Raises DataError,
    ObjectError."""
    if isinstance(place, Path):
        return (place / name).exists()
    with table_server():
        try:
            return ObjectClient(place).holds((place / name).key)
        except ObjectError as e:  # of the place that the user has named
            if e.cause == "refused":  # who may read a file need not have the right to list its folder
                return False
            raise ObjectError(str(e).replace(f"{place / name}", f"{place}"), e.cause) from None
