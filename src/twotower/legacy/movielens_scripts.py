"""`data_download.py` and `data_processing.py`: MovieLens 1M as feature files of train, validation and test parts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import polars as pl

from twotower.data.datasets import movielens
from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.data.interaction_columns import USER
from twotower.data.labels import POSITIVE
from twotower.data.reading.readers import as_frame
from twotower.data.reading.times import TIME
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN, VALIDATION, split_interactions
from twotower.data.tables import check, save
from twotower.errors import DataError, TwoTowerError
from twotower.escaping import escape_controls
from twotower.reports.terminal import printed_messages


def download(root: Path) -> int:
    """Run `data_download.py`: fetch MovieLens 1M into `root`/dataset/ml-1m. Returns the exit code."""
    try:
        with printed_messages():
            tables = MovieLens1M().load()
        save(tables, root / "dataset" / "ml-1m")
    except TwoTowerError as e:
        print(escape_controls(f"error: {e}"), file=sys.stderr)
        return e.exit_code
    print(f"MovieLens 1M is in {root / 'dataset' / 'ml-1m'}")
    return 0


def process(root: Path) -> int:
    """Run `data_processing.py`: write features and splits of `root`/dataset/ml-1m into its folder `feature`.

    Returns the exit code."""
    try:
        source, target = root / "dataset" / "ml-1m", root / "dataset" / "ml-1m" / "feature"
        paths = [source / f"{n}.parquet" for n in ("users", "items", "interactions")]
        if not all(p.exists() for p in paths):
            raise DataError(f"{source}: users, items and interactions are not there; run data_download.py first")
        users, items, actions = (as_frame(p, p.stem) for p in paths)
        sizes = write_features(users, items, actions, target)
    except TwoTowerError as e:
        print(escape_controls(f"error: {e}"), file=sys.stderr)
        return e.exit_code
    print(f"{target}: " + ", ".join(f"{n:,} {name} rows" for name, n in sizes.items()))
    return 0


def write_features(users: pl.DataFrame, items: pl.DataFrame, actions: pl.DataFrame, target: Path) -> dict[str, int]:
    """Write train.parquet, val.parquet and test.parquet, one row per rating with the features of both sides.

    The split is random with seed 2022: 80/20, then 90/10. `ratings_count` and `ratings_mean` are of the train part.
    """
    tables = check(users, items, actions, movielens.SCHEMA)
    actions = tables.interactions
    parts = split_interactions({USER: np.zeros(actions.height, np.int32)}, SplitConfig())
    train = actions.filter(parts == TRAIN)
    counted = train.group_by("item_id").agg(
        ratings_count=pl.len().cast(pl.Float64), ratings_mean=pl.col("rating").mean()
    )
    rows = (
        actions.with_columns(part=pl.Series(parts), label=pl.col(POSITIVE).cast(pl.Int8))
        .join(tables.users, on="user_id", how="left", maintain_order="left")
        .join(tables.items, on="item_id", how="left", maintain_order="left")
        .join(counted, on="item_id", how="left", maintain_order="left")
        .with_columns(pl.col("ratings_count").fill_null(0.0))
        .rename(
            {"user_id": "UserID", "gender": "Gender", "age": "Age", "occupation": "JobID", "zip": "ZipCode",
             "item_id": "MovieID", "title": "Title", "year": "Year", "genres": "Genres", "rating": "Rating",
             "timestamp": "Timestamp"}
        )
        .drop(POSITIVE, TIME, strict=False)
    )  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, part in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        frame = rows.filter(pl.col("part") == part).drop("part")
        temporary = target / f".{name}.parquet.tmp"
        frame.write_parquet(temporary)
        os.replace(temporary, target / f"{name}.parquet")
        sizes[name] = frame.height
    return sizes
