"""MovieLens 100K, and queries made of its titles."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import polars as pl

from twotower.data.datasets.archive import Archive, open_zip, read_member
from twotower.data.datasets.movielens import (
    RATING,
    USER,
    Columns,
    Downloads,
    MovieLens,
    MovieLensTitles,
    films_frame,
    read_rows,
    split_lines,
)
from twotower.data.tables import Tables
from twotower.errors import DataError

log = logging.getLogger(__name__)

# The only public package that contains MovieLens 100K, pinned to one version, whose digest is known.
WHEEL, WHEEL_SHA256 = "recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
WHEEL_FOLDER = "recbole/dataset_example/ml-100k/"

USER_100K: Columns = {
    "user_id": pl.Int64, "age": pl.Int64, "gender": pl.String, "occupation": pl.String, "zip": pl.String,
}  # fmt: skip
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


class MovieLens100K(MovieLens):
    """MovieLens 100K (Harper and Konstan 2015): 100,000 ratings of 1,682 films by 943 users, with the columns of
    `ml-1m`.

    Use it for a quick try: it is a tenth of `ml-1m`.
    """

    kind = "ml-100k"
    official = Archive(
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        4_924_029,
        "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    )

    def read(self, archive: zipfile.ZipFile, what: str) -> Tables:
        ratings = read_rows(archive, "ml-100k/u.data", what, "\t", RATING)
        users = read_rows(archive, "ml-100k/u.user", what, "|", USER_100K)
        films = split_lines(archive, "ml-100k/u.item", what, "|", 5 + len(GENRES_100K))
        genres = [[g for g, on in zip(GENRES_100K, x[5:], strict=True) if on == "1"] for x in films]
        return Tables(users.select(*USER), films_frame(films, genres), ratings)

    def fall_back(self, error: DataError, downloads: Downloads) -> Tables:
        log.info(f"{error}; taking MovieLens 100K out of the PyPI wheel {WHEEL} instead")
        return _from_wheel(downloads.wheel_sha256 or WHEEL_SHA256)


class MovieLens100KTitles(MovieLensTitles):
    """Search queries made of the titles of MovieLens 100K, as typed by people who remember a title in part.

    Use it for a quick try of text features and a search.
    """

    kind = "ml-100k-titles"
    films = MovieLens100K


def _from_wheel(sha256: str) -> Tables:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("recbole-*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise DataError(f"cannot fetch {WHEEL} with pip either ({reason}); name a local archive with `archive`")
        data = wheels[0].read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != sha256:
        raise DataError(f"{WHEEL}: the wheel has SHA-256 {digest[:12]}…, expected {sha256[:12]}…")
    archive = open_zip(data, WHEEL)
    users, items, actions = (
        _typed_header(read_member(archive, f"{WHEEL_FOLDER}ml-100k.{kind}", WHEEL))
        for kind in ("user", "item", "inter")
    )
    return Tables(
        users.rename({"zip_code": "zip"}).select(*USER),
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
