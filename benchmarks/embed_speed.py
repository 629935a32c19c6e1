"""Measure bulk embedding: rows per second and memory of `embed.embed` over a Parquet table of items.

    python benchmarks/embed_speed.py --rows 1000000 --threads 2

An item tower over an id (a vocabulary of 200,000 items, or hashed), genres (several of 18, as text) and a year, layers
128 and 64, with the weights of a fresh model: speed does not depend on them. The table is written first, block by block,
into a temporary folder. Memory is the growth of resident memory during embedding; its peak counts torch, polars and the run. The
floor is the time of the tower's matrix products alone, at the rate of a large one with the same threads.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import torch
from measure import finish, options, product_rate, result, timed

from twotower.config.toml import parse_config
from twotower.data.dataset import build_dataset
from twotower.data.tables import check
from twotower.embedding.bulk import embed
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.schema import Schema
from twotower.model.two_tower import TwoTower
from twotower.runs import Run

GENRES = 18
KNOWN = 200_000
WIDTH, LAYERS = 16, (128, 64)
FLOPS_PER_ROW = 2 * (3 * WIDTH * LAYERS[0] + LAYERS[0] * LAYERS[1])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--ids", choices=("vocabulary", "hash", "both"), default="both")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        table = write_items(Path(folder), chosen.rows)
        for ids in ("vocabulary", "hash") if chosen.ids == "both" else (chosen.ids,):
            run = fresh_run(ids)
            embed(run, "item", write_items(Path(folder), 10_000, "few"), Path(folder) / "warm")
            before = resident(reset=True)
            seconds = timed(lambda run=run: embed(run, "item", table, Path(folder) / "vectors"))  # type: ignore[misc]
            peak = resident()
            floor = product_rate() / FLOPS_PER_ROW
            name, shared = (
                f"embed_speed: {chosen.rows:,} rows, {chosen.threads} thread{'s' * (chosen.threads > 1)}, {ids} ids",
                {"table_rows": chosen.rows, "threads": chosen.threads},
            )
            results += [
                result(name, chosen.rows / seconds, "rows/s", floor=floor, **shared),
                result(f"{name}, memory beside the process", (peak - before) / 1024, "MB", more=False, **shared),
                result(f"{name}, peak of the process", peak / 1024, "MB", more=False, **shared),
            ]
    finish(results, chosen)


def items(first: int, n: int) -> pl.DataFrame:
    """Return the items `first` to `first + n`, with one to three genres each."""
    rng = np.random.default_rng(first)
    names = pl.Series([f"genre {g}" for g in range(GENRES)])
    drawn = [names.gather(rng.integers(0, GENRES, n)).alias(str(i)) for i in range(3)]
    frame = pl.DataFrame(
        {"item_id": np.arange(first, first + n), "year": rng.integers(1930, 2025, n), "some": rng.integers(1, 4, n)}
    )
    genres = pl.concat_list([pl.col(str(i)) for i in range(3)]).list.head(pl.col("some")).list.join("|")
    return frame.with_columns(drawn).select("item_id", genres.alias("genres"), "year")


def write_items(folder: Path, n: int, name: str = "items", piece: int = 1_000_000) -> Path:
    parts = []
    for first in range(0, n, piece):
        parts.append(folder / f"{name}.{first}.parquet")
        items(first, min(piece, n - first)).write_parquet(parts[-1])
    path = folder / f"{name}.parquet"
    pl.scan_parquet(parts).sink_parquet(path)
    for part in parts:
        part.unlink()
    return path


def fresh_run(ids: str) -> Run:
    """Return an untrained run over the first items, each with one interaction."""
    schema = Schema(
        features=(
            Categorical(name="user_id", side="user"),
            Categorical(name="item_id", side="item", hash_buckets=KNOWN if ids == "hash" else 0),
            MultiHot(name="genres", side="item", separator="|"),
            Categorical(name="year", side="item"),
        )
    )
    actions = pl.DataFrame({"user_id": np.arange(KNOWN) % 1000, "item_id": np.arange(KNOWN)})
    layers = {s: {"layers": list(LAYERS)} for s in ("user", "item")}
    _, config = parse_config(
        {"model": {"width": WIDTH, "pairs": [layers]}, "split": {"test": 0.01, "validation": 0.01}}
    )
    dataset = build_dataset(check(None, items(0, KNOWN), actions, schema), schema, config.split)
    model = TwoTower(config.model, dataset.encoders.fields("user"), dataset.encoders.fields("item"))
    return Run(None, config, dataset, model, {}, [])


def resident(reset: bool = False) -> int:
    """Return the peak of resident memory in KiB; with `reset`, the present memory, where the peak starts again."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    main()
