"""Tables of a lake: folders that are no folders of files. A kind is a file here, and a word in `LAKES`. A place may end
with the number of a version, as Spark's readers of Delta Lake have it: "lake/clicks@v12"."""

from __future__ import annotations

import re
from glob import has_magic
from pathlib import Path

from twotower.data.lakes.delta import DeltaLakeTable
from twotower.data.lakes.iceberg import IcebergTable
from twotower.data.lakes.lake import LakeTable
from twotower.data.table_path import TABLE_SUFFIXES, ending
from twotower.files.urls import Url

VERSION = re.compile(r"(.+)@v(\d{1,19})", re.DOTALL)
"""A name with the number of a version after it."""
LAKES: tuple[type[LakeTable], ...] = (DeltaLakeTable, IcebergTable)


def lake_table(place: Path | Url) -> LakeTable | None:
    """Return the table of a lake at a place, in the version that the place names or the current one; None if it is
    none. Raises DataError, ObjectError."""
    if table := _table(place, None):
        return table
    if not (named := VERSION.fullmatch(place.name)) or (isinstance(place, Path) and place.exists()):
        return None
    base = place.with_name(named[1]) if isinstance(place, Path) else place.parent / named[1]
    return _table(base, int(named[2]))


def _table(place: Path | Url, version: int | None) -> LakeTable | None:
    if isinstance(place, Url) and (ending(Path(place.name)) in TABLE_SUFFIXES or has_magic(place.key)):
        return None  # a file or a pattern: nothing is listed
    kind = next((kind for kind in LAKES if kind.finds(place)), None)
    return kind.open(place, version) if kind else None
