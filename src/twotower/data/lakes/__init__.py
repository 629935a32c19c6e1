"""Tables of a lake: folders that are no folders of files. A kind is a file here, and a word in `LAKES`."""

from __future__ import annotations

from glob import has_magic
from pathlib import Path

from twotower.data.lakes.delta import DeltaLakeTable
from twotower.data.lakes.iceberg import IcebergTable
from twotower.data.lakes.lake import LakeTable
from twotower.data.table_path import TABLE_SUFFIXES, ending
from twotower.files.urls import Url

LAKES: tuple[type[LakeTable], ...] = (DeltaLakeTable, IcebergTable)


def lake_table(place: Path | Url) -> LakeTable | None:
    """Return the table of a lake at a place, None if it is none. Raises DataError, ObjectError."""
    if isinstance(place, Url) and (ending(Path(place.name)) in TABLE_SUFFIXES or has_magic(place.key)):
        return None  # a file or a pattern: nothing is listed
    kind = next((kind for kind in LAKES if kind.finds(place)), None)
    return kind.open(place) if kind else None
