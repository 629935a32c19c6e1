"""Interactions on a disk and the same in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from worlds import checkerboard, settings

from twotower import api
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.memmap import MemmapDataset
from twotower.data.tables import check
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema

SCHEMA = Schema(
    label="liked",
    time="at",
    time_unit="order",
    duplicates="error",
    features=(Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")),
)


def on_disk_and_in_memory(folder: Path, split: str, weighted: bool = False) -> tuple[Dataset, Dataset]:
    """Return a part of the checkerboard, a tenth of it with the other label, prepared and in memory; rows of users and
    items are equal. If `weighted`, its rows weigh 0 to 3."""
    _, _, actions = checkerboard()
    rng = np.random.default_rng(3)
    actions = actions.with_columns(
        liked=pl.when(pl.Series(rng.random(actions.height) < 0.1)).then(1 - pl.col("liked")).otherwise(pl.col("liked"))
    ).filter(pl.Series(rng.random(actions.height) < 0.7))
    schema = SCHEMA.model_copy(update={"weight": "n"}) if weighted else SCHEMA
    actions = actions.with_columns(n=rng.integers(0, 4, actions.height))
    folder.mkdir()
    actions.write_parquet(folder / "interactions.parquet")
    config = settings(data={"interactions": str(folder / "interactions.parquet")}, split={"kind": split})
    disk = api.prepare_folder(config, schema, folder / "prepared")
    assert isinstance(disk, MemmapDataset)
    tables = check(disk.users.frame.select("user_id"), disk.items.frame.select("item_id"), actions, schema)
    memory = build_dataset(tables, schema, config.split)
    for side in ("users", "items"):
        assert getattr(disk, side).ids.equals(getattr(memory, side).ids)
    return disk, memory
