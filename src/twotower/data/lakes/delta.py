"""Tables of Delta Lake, by their folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import polars as pl

from twotower.data.lakes.lake import LakeTable, has, lake_errors
from twotower.files.object_stores import RemoteLimits
from twotower.files.urls import Url

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

    @classmethod
    def open(cls, place: Path | Url) -> DeltaLakeTable:  # type: ignore[override]
        with lake_errors(place, cls.what):
            from deltalake import DeltaTable

            options = RemoteLimits().for_delta() if isinstance(place, Url) else None
            table = DeltaTable(str(place), storage_options=options)
            return cls(place, version=table.version(), table_id=str(table.metadata().id))

    def scan(self) -> pl.LazyFrame:
        with lake_errors(self.place, self.what):
            if isinstance(self.place, Path):
                return pl.scan_delta(self.place, version=self.version)
            from deltalake import DeltaTable

            limits = RemoteLimits()
            table = DeltaTable(str(self.place), version=self.version, storage_options=limits.for_delta())
            return pl.scan_delta(table, storage_options=limits.for_polars(), credential_provider=None)
