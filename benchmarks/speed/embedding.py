import re
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.lib.machine import product_rate, read, timed
from benchmarks.lib.report import Report, declared
from benchmarks.lib.worlds import dataset
from twotower import Schema
from twotower.config.toml import parse_config
from twotower.embedding.bulk import embed
from twotower.model.two_tower import TwoTower
from twotower.runs import Run

TOWER: dict[str, Any] = declared(__file__)["tower"]
KNOWN: int = TOWER["known"]


def main(chosen: Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table, few = write_items(folder, chosen.rows), write_items(folder, 10_000, "few")
        for ids in chosen.ids:
            run = fresh_run(ids)
            embed(run, "item", few, folder / f"warm-{ids}")
            before = resident(reset=True)
            seconds = timed(lambda run=run, ids=ids: embed(run, "item", table, folder / f"vectors-{ids}"))  # type: ignore[misc]
            peak = resident()
            model = run.config.model
            wide, deep = model.pairs[0].item.layers
            floor = product_rate() / (2 * (3 * model.width * wide + wide * deep))
            name = f"{chosen.rows:,} rows, {chosen.threads} thread{'s' * (chosen.threads > 1)}, {ids} ids"
            report.add(name, chosen.rows / seconds, "rows/s", floor=floor)
            report.add(f"{name}, memory beside the process", (peak - before) / 1024, "MB")
            report.add(f"{name}, peak of the process", peak / 1024, "MB")


def items(first: int, n: int) -> pl.DataFrame:
    """Return the items `first` to `first + n`, with one to three genres each."""
    rng = np.random.default_rng(first)
    names = pl.Series([f"genre {g}" for g in range(TOWER["genres"])])
    drawn = [names.gather(rng.integers(0, len(names), n)).alias(str(i)) for i in range(3)]
    years, some = rng.integers(1930, 2025, n), rng.integers(1, 4, n)
    frame = pl.DataFrame({"item_id": np.arange(first, first + n), "year": years, "some": some})
    genres = pl.concat_list([pl.col(str(i)) for i in range(3)]).list.head(pl.col("some")).list.join("|")
    return frame.with_columns(drawn).select("item_id", genres.alias("genres"), "year")


def write_items(folder: Path, n: int, name: str = "items", piece: int = 1_000_000) -> Path:
    path = folder / name
    path.mkdir()
    for first in range(0, n, piece):
        items(first, min(piece, n - first)).write_parquet(path / f"{first:09}.parquet")
    return path


def fresh_run(ids: str) -> Run:
    """Return an untrained run over the first items, each with one interaction."""
    schema = Schema.model_validate({"features": TOWER["features"]})
    hashed = {"hash_buckets": KNOWN if ids == "hash" else 0}
    features = [f.model_copy(update=hashed) if f.name == "item_id" else f for f in schema.features]
    schema = schema.model_copy(update={"features": tuple(features)})
    actions = pl.DataFrame({"user_id": np.arange(KNOWN) % 1000, "item_id": np.arange(KNOWN)})
    config = parse_config(TOWER["config"])[1]
    data = dataset(None, items(0, KNOWN), actions, schema, config)
    model = TwoTower(config.model, data.encoders.fields("user"), data.encoders.fields("item"))
    return Run(None, config, data, model, {}, [])


def resident(reset: bool = False) -> int:
    """Return the peak of resident memory in KiB; with `reset`, the present memory, where the peak starts again."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+)", read("/proc/self/status"))[0])
