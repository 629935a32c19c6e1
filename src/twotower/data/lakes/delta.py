"""Tables of Delta Lake, by their folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import polars as pl

from twotower.data.lakes.lake import LakeTable, has, lake_errors
from twotower.errors import DataError
from twotower.files.object_stores import RemoteLimits
from twotower.files.urls import Url

if TYPE_CHECKING:
    from deltalake import DeltaTable

DELTA_LOG = "_delta_log"


@dataclass(frozen=True)
class DeltaLakeTable(LakeTable):
    """A folder with a log `_delta_log`. Only the log tells which of the files inside belong to a version."""

    what: ClassVar[str] = "Delta Lake"

    @classmethod
    def finds(cls, place: Path | Url) -> bool:
        if isinstance(place, Url) and not place.is_object_store:
            return False
        return has(place, DELTA_LOG)

    files: str = ""
    """Digest of the version's files in their order, which is that of its rows."""

    @classmethod
    def open(cls, place: Path | Url, version: int | None = None) -> DeltaLakeTable:  # type: ignore[override]
        if isinstance(place, Path) and place.absolute().as_uri() != f"file://{place.absolute()}":
            raise DataError(
                f"{place}: a table of {cls.what} in a path of other characters than ASCII letters, digits and -._~ "
                "cannot be read; move it, or give its frame in Python"
            )
        with lake_errors(place, cls.what):
            table = _opened(place, version)
            return cls(place, version=table.version(), table_id=str(table.metadata().id), files=_digest(table))

    def scan(self) -> pl.LazyFrame:
        with lake_errors(self.place, self.what):
            table = _opened(self.place, self.version)
            if _digest(table) != self.files:
                raise DataError(
                    f"{self.place}: version {self.version} lists other files, or in another order, than when its "
                    "reading began; start again"
                )
            if isinstance(self.place, Path):
                return pl.scan_delta(table)
            return pl.scan_delta(table, storage_options=RemoteLimits().for_polars(), credential_provider=None)

    def state(self) -> list[str | int]:
        """Return what stays as it is: the version, the identity of the table, its files."""
        return [*super().state(), self.files]


def _opened(place: Path | Url, version: int | None) -> DeltaTable:
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
