"""Tables of Apache Iceberg, by their metadata file, or by their folder if it says which file is the current one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import polars as pl

from twotower.data.lakes.lake import LakeTable, has, lake_errors
from twotower.data.table_path import table_server
from twotower.errors import DataError
from twotower.files import places
from twotower.files.object_stores import RemoteLimits
from twotower.files.urls import Url

_METADATA, _HINT, _ENDING = "metadata", "version-hint.text", ".metadata.json"


@dataclass(frozen=True)
class IcebergTable(LakeTable):
    """A metadata file, whose current snapshot is read, or another one by its id."""

    what: ClassVar[str] = "Apache Iceberg"

    @classmethod
    def finds(cls, place: Path | Url) -> bool:
        if place.name.endswith(_ENDING):
            return True
        if (isinstance(place, Url) and not place.is_object_store) or not has(place, _METADATA):
            return False
        if has(place, f"{_METADATA}/{_HINT}"):
            return True
        if any(name.endswith(_ENDING) for name in _names(place / _METADATA)):
            raise DataError(
                f"{place}: a table of {cls.what} whose catalog alone knows the current version; name its metadata "
                f"file, {place}/{_METADATA}/….{_ENDING[1:]}, or give the table's scan().to_arrow() in Python"
            )
        return False

    @classmethod
    def open(cls, place: Path | Url, version: int | None = None) -> IcebergTable:  # type: ignore[override]
        with lake_errors(place, cls.what):
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

    def scan(self) -> pl.LazyFrame:
        with lake_errors(self.place, self.what):
            from pyiceberg.table import StaticTable

            table = StaticTable.from_metadata(_location(self.place), _properties())
            options = RemoteLimits().for_polars() if isinstance(self.place, Url) else None
            return pl.scan_iceberg(table, snapshot_id=self.version, storage_options=options)


def _location(file: Path | Url) -> str:
    return f"file://{file.absolute()}" if isinstance(file, Path) else str(file)


def _names(folder: Path | Url) -> list[str]:
    with table_server():
        return [name.rpartition("/")[2] for name in places.names(folder)]


def _hinted(place: Path | Url) -> Path | Url:
    """Return the metadata file that the hint of a folder names."""
    folder = place / _METADATA
    hint = folder / _HINT
    with table_server():
        name = (places.read(hint) or b"").decode().strip()
    return folder / (name if name.endswith(_ENDING) else f"v{name}{_ENDING}" if name.isdigit() else f"{name}{_ENDING}")


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
