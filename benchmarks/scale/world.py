"""A made world as shards of Parquet: an item has one of a thousand topics, a user three; four of five interactions are
with an item of these topics, and within a topic popular items are much more frequent."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl

TOPICS, SHARD = 1_000, 4_000_000


def write_world(folder: Path, users: int, items: int, rows: int) -> Path:
    """Write shards of all three tables, and the config that trains on them."""
    for name in ("users", "items", "interactions"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    likes = np.stack([(np.arange(users) * m + a) % TOPICS for m, a in ((7, 1), (131, 5), (977, 11))], 1)
    table = {"user_id": np.arange(users), "topics": [*likes]}
    pl.DataFrame(table, schema_overrides={"topics": pl.List(pl.Int64)}).write_parquet(folder / "users/part-0.parquet")
    for start in range(0, items, SHARD):
        item = np.arange(start, min(start + SHARD, items))
        part = folder / "items" / f"part-{start // SHARD:04d}.parquet"
        pl.DataFrame({"item_id": item, "topic": item % TOPICS}).write_parquet(part)
    rng = np.random.default_rng(0)
    for start in range(0, rows, SHARD):
        n = min(SHARD, rows - start)
        user = (users * rng.random(n) ** 1.5).astype(np.int64)
        topic = np.where(rng.random(n) < 0.8, likes[user, rng.integers(0, 3, n)], rng.integers(0, TOPICS, n))
        item = topic + TOPICS * (items // TOPICS * rng.random(n) ** 3).astype(np.int64)
        part = folder / "interactions" / f"part-{start // SHARD:04d}.parquet"
        pl.DataFrame({"user_id": user, "item_id": item, "at": np.arange(start, start + n)}).write_parquet(part)
    return Path(shutil.copyfile(Path(__file__).with_name("config.toml"), folder / "config.toml"))
