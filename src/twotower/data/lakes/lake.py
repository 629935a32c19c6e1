"""Protocol of the tables of a lake: a folder that a log or a metadata file describes, read as of one version."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import polars as pl

from twotower.data.table_path import TablePath, table_server
from twotower.errors import DataError, first_line, missing_package
from twotower.files.object_stores import ObjectClient, ObjectError, explain
from twotower.files.urls import Url


@dataclass(frozen=True)
class LakeTable(TablePath):
    """A table of a lake. All scans are of the version that was named, or was the current one, when it was opened."""

    version: int = 0
    table_id: str = ""
    """Identity of the table, which another table at the same place has not."""

    what: ClassVar[str] = ""
    """Name of the format in messages."""

    @classmethod
    @abstractmethod
    def finds(cls, place: Path | Url) -> bool:
        """Return True if a place is a table of this kind. Raises DataError for one whose kind is unclear."""

    @classmethod
    @abstractmethod
    def open(cls, place: Path | Url, version: int | None = None) -> LakeTable:  # type: ignore[override]  # a table has no bytes of its own
        """Return the table with a version, by its number in this kind of lake, or with its current one. Raises
        DataError."""

    @abstractmethod
    def scan(self) -> pl.LazyFrame:
        """Scan the version."""

    @property
    def ending(self) -> str:
        """The ending of the files inside."""
        return ".parquet"

    def state(self) -> list[str | int]:
        """Return the version and the identity of the table, which stay as they are."""
        return [self.version, self.table_id]


@contextmanager
def lake_errors(place: Path | Url, what: str) -> Iterator[None]:
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


def has(place: Path | Url, name: str) -> bool:
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
