"""MovieLens 100K and 1M: fetch, verify, parse into tables.

The licence forbids redistribution, so the data is fetched on the user's machine: from GroupLens, from a local
archive (`source`, or the environment variable TWOTOWER_DATA), or, for 100K, out of a PyPI wheel that carries it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl

from twotower import files
from twotower.data.datasets import title_queries
from twotower.data.datasets.archive import MAX_MEMBER_BYTES, Archive, download, open_zip, read_member
from twotower.data.tables import Tables
from twotower.errors import DataError
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.schema import Schema
from twotower.features.text import Text

log = logging.getLogger(__name__)

Name = Literal["ml-1m", "ml-100k"]
TITLES_SUFFIX = "-titles"  # after an archive's name: queries made of its films' titles
SOURCE_VARIABLE = "TWOTOWER_DATA"

ARCHIVES: dict[Name, Archive] = {
    "ml-1m": Archive(
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        5_917_549,
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    ),
    "ml-100k": Archive(
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        4_924_029,
        "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    ),
}
# The only public package that contains MovieLens 100K, pinned to one version, whose digest is known.
WHEEL, WHEEL_SHA256 = "recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
WHEEL_FOLDER = "recbole/dataset_example/ml-100k/"


@dataclass(frozen=True)
class Downloads:
    """Sources of the archives on the network."""

    archives: Mapping[Name, Archive] = field(default_factory=lambda: ARCHIVES)
    wheel_sha256: str = WHEEL_SHA256
    """Digest of the PyPI wheel that stands in for MovieLens 100K."""
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
SCHEMAS: dict[str, Schema] = dict.fromkeys(ARCHIVES, SCHEMA) | {
    name + TITLES_SUFFIX: TITLES_SCHEMA for name in ARCHIVES
}
"""Schema of each data set by name."""

Columns = dict[str, type[pl.DataType]]
RATING: Columns = {"user_id": pl.Int64, "item_id": pl.Int64, "rating": pl.Int64, "timestamp": pl.Int64}
USER_1M: Columns = {
    "user_id": pl.Int64, "gender": pl.String, "age": pl.Int64, "occupation": pl.Int64, "zip": pl.String,
}  # fmt: skip
USER_100K: Columns = {
    "user_id": pl.Int64, "age": pl.Int64, "gender": pl.String, "occupation": pl.String, "zip": pl.String,
}  # fmt: skip
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


def load(name: str, source: str | Path | None = None, downloads: Downloads | None = None) -> Tables:
    """Return the tables of one of SCHEMAS, from the archive `source`, else from TWOTOWER_DATA, else from the network.

    Raises DataError if the archive is damaged, is not MovieLens `name`, or nothing can be reached.
    """
    if name.endswith(TITLES_SUFFIX):
        return title_queries.make_title_queries(load(name.removesuffix(TITLES_SUFFIX), source, downloads).items)
    name, downloads = next(known for known in ARCHIVES if known == name), downloads or Downloads()
    source = source or os.environ.get(SOURCE_VARIABLE) or None
    if source:
        path = Path(source)
        if not path.is_file():
            raise DataError(f"{path}: no such file; give the path of {name}.zip ({ARCHIVES[name].url})")
        return parse(path.read_bytes(), str(path), name)
    archive = downloads.archives[name]
    try:
        data = download(archive, downloads.timeout)
    except DataError as e:
        if name == "ml-1m":
            raise DataError(
                f"{e}; download it elsewhere and pass `source='path/to/ml-1m.zip'` (data.archive in a config), set "
                f"{SOURCE_VARIABLE}, or use ml-100k"
            ) from None
        log.info(f"{e}; taking MovieLens 100K out of the PyPI wheel {WHEEL} instead")
        return _from_wheel(downloads.wheel_sha256)
    return parse(data, archive.url, name)


def archive_name(source: str | Path) -> Name:
    """Return the name of the MovieLens in a local archive, from the folder inside it. Raises DataError."""
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of ml-1m.zip or ml-100k.zip")
    names = open_zip(path.read_bytes(), str(path)).namelist()
    for name in ARCHIVES:
        if any(n.startswith(f"{name}/") for n in names):
            return name
    raise DataError(f"{path}: neither an ml-1m/ nor an ml-100k/ folder inside; expected a MovieLens archive")


def save(tables: Tables, folder: Path) -> None:
    """Write users.parquet, items.parquet and interactions.parquet into `folder`, each atomically."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"{folder}: cannot be made ({e.strerror}); choose another folder") from None
    for name in ("users", "items", "interactions"):
        frame: pl.DataFrame = getattr(tables, name)
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        files.write(folder / f"{name}.parquet", buffer.getvalue())


def _from_wheel(sha256: str) -> Tables:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("recbole-*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise DataError(f"cannot fetch {WHEEL} with pip either ({reason}); name a local archive with `source`")
        data = wheels[0].read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != sha256:
        raise DataError(f"{WHEEL}: the wheel has SHA-256 {digest[:12]}…, expected {sha256[:12]}…")
    archive = open_zip(data, WHEEL)
    users, items, actions = (
        _typed_header(read_member(archive, f"{WHEEL_FOLDER}ml-100k.{kind}", WHEEL))
        for kind in ("user", "item", "inter")
    )
    return Tables(
        users.rename({"zip_code": "zip"}).select(*USER_1M),
        items.select(
            "item_id",
            title=pl.col("movie_title"),
            year=pl.col("release_year").cast(pl.Int64, strict=False),
            genres=pl.col("class").str.split(" "),
        ),
        actions.select("user_id", "item_id", "rating", "timestamp"),
    )


def _typed_header(data: bytes) -> pl.DataFrame:
    """Read a tab-separated table whose header has the form `name:type`."""
    frame = pl.read_csv(data, separator="\t", quote_char=None, infer_schema=False)
    frame = frame.rename({c: c.split(":")[0] for c in frame.columns})
    numbers = [c for c in ("user_id", "item_id", "rating", "age") if c in frame.columns]
    frame = frame.with_columns(pl.col(c).cast(pl.Float64).cast(pl.Int64) for c in numbers)
    if "timestamp" in frame.columns:
        frame = frame.with_columns(pl.col("timestamp").cast(pl.Float64).cast(pl.Int64))
    return frame


def parse(data: bytes, what: str, name: Name, max_member_bytes: int = MAX_MEMBER_BYTES) -> Tables:
    """Read the tables of an archive with the official layout. Raises DataError."""
    archive = open_zip(data, what, max_member_bytes)
    if name == "ml-1m":
        ratings = _rows(archive, "ml-1m/ratings.dat", what, "::", RATING)
        users = _rows(archive, "ml-1m/users.dat", what, "::", USER_1M)
        films = _split_lines(archive, "ml-1m/movies.dat", what, "::", 3)
        return Tables(users, _films_frame(films, [x[2].split("|") for x in films]), ratings)
    ratings = _rows(archive, "ml-100k/u.data", what, "\t", RATING)
    users = _rows(archive, "ml-100k/u.user", what, "|", USER_100K)
    films = _split_lines(archive, "ml-100k/u.item", what, "|", 5 + len(GENRES_100K))
    genres = [[g for g, on in zip(GENRES_100K, x[5:], strict=True) if on == "1"] for x in films]
    return Tables(users.select(*USER_1M), _films_frame(films, genres), ratings)


def _rows(archive: zipfile.ZipFile, name: str, what: str, separator: str, columns: Columns) -> pl.DataFrame:
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


def _split_lines(archive: zipfile.ZipFile, name: str, what: str, separator: str, n: int) -> list[list[str]]:
    """Read a Latin-1 member with titles: each line split into `n` texts, of which the first is a number."""
    rows = [line.decode("latin-1").split(separator) for line in read_member(archive, name, what).splitlines() if line]
    for number, row in enumerate(rows, 1):
        if len(row) != n or not row[0].isdecimal():
            raise DataError(
                f"{what}: {name} line {number} does not read as a film in {n} columns separated by '{separator}'; "
                "fetch the archive again"
            )
    return rows


def _films_frame(rows: list[list[str]], genres: list[list[str]]) -> pl.DataFrame:
    titles = [row[1] for row in rows]
    years = [int(m[1]) if (m := re.search(r"\((\d{4})\)\s*$", t)) else None for t in titles]
    return pl.DataFrame(
        {"item_id": [int(row[0]) for row in rows], "title": titles, "year": years, "genres": genres},
        schema={"item_id": pl.Int64, "title": pl.String, "year": pl.Int64, "genres": pl.List(pl.String)},
    )
