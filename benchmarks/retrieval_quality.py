"""Measure retrieval quality on MovieLens 1M (protocol P-DSSM): the next film of each user among all 3,416 films.

    TWOTOWER_DATA=path/to/ml-1m.zip python benchmarks/retrieval_quality.py --sequences path/to/ml-1m-sequences.zip \
        --out rows.json

Per user the last film is the test, the one before it validation, the rest train; every rating counts; all films with
five or more ratings are ranked by exact search, the user's history removed; no timestamps, only their order. Epochs are
chosen on validation. The rows of the simple baselines and of other tools come from benchmarks/baselines.py, which
writes into the same file. Rows that --out already has are kept; --only TEXT runs rows whose name contains the text.
Without --sequences the order is the archive's.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from baselines import load_sequences, order_by_time
from measure import Numbers, load, options, result, save

from twotower import api
from twotower.config.experiment import Config
from twotower.config.toml import load_config
from twotower.data.datasets import movielens
from twotower.features.schema import Schema

PREFIX = "retrieval_quality: "
EXAMPLES = Path(__file__).parent.parent / "examples"
MEASURES = {"hr@10": "hit_rate@10", "ndcg@10": "ndcg@10", "hr@100": "hit_rate@100"}
ROWS = [
    *(f"ablation/{n}.toml" for n in ("bce", "in-batch", "in-batch-logq", "mixed", "hard")),
    *(f"ablation/{n}.toml" for n in ("full", "full-senet", "full-parallel", "full-dat")),
    "movielens-retrieve.toml",
    "movielens-sequence.toml",
]
_ORDER = "model.pairs.0.user.fields=['order']"
HISTORIES = {  # what --histories tries instead: file and settings, five epochs each
    "six decaying means": ("movielens-retrieve.toml", []),
    "attention of a learned query": (
        "movielens-sequence.toml",
        [_ORDER, "schema.features.1.pooling={kind='attention', window=128, heads=2, input_dropout=0.2}"],
    ),
    "transformer, plain blocks": ("movielens-sequence.toml", [_ORDER, "schema.features.1.pooling.block='plain'"]),
    "transformer, gated blocks": ("movielens-sequence.toml", [_ORDER]),
    "means beside gated blocks": ("movielens-sequence.toml", []),
}


def main() -> None:
    parser = options(__doc__, threads=0)
    parser.add_argument("--histories", action="store_true", help="compare poolings of a history, five epochs each")
    parser.add_argument("--sequences", default="", help="archive with the published order of every user's films")
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="option to change in all rows, key=value"
    )
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    threads = torch.get_num_threads()
    tables = films(chosen.sequences)
    rows: dict[str, Any] = {name: row for name, row in load(chosen.out)["rows"].items() if name.startswith(PREFIX)}
    tried: dict[str, tuple[str, list[str]]] = {name: (name, []) for name in ROWS}
    if chosen.histories:
        tried = {name: (file, [*changed, "train.epochs=5"]) for name, (file, changed) in HISTORIES.items()}
    for name, (file, changed) in tried.items():
        if chosen.only not in name:
            continue
        schema, config = load_config(EXAMPLES / file, [*changed, *chosen.set, "evaluation.k=[10, 100]"])
        assert schema is not None
        schema = schema.model_copy(update={"time_unit": "order"})
        row = rows.setdefault(PREFIX + name, {"seeds": {}})
        for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
            if str(seed) not in row["seeds"]:
                row["seeds"][str(seed)] = measure(tables, schema, config, seed) | {"threads": threads}
            save(chosen.out, results(name, list(row["seeds"].values())), threads, {PREFIX + name: row})
        print(line(name, list(row["seeds"].values())), flush=True)


def films(sequences: str) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Return users, films with five or more ratings, and interactions whose time is their position in the user's sequence."""
    raw = movielens.load("ml-1m")
    split = load_sequences(sequences) if sequences else order_by_time(raw.interactions)
    user = np.repeat(split.user_ids, np.diff(split.offsets))
    interactions = pl.DataFrame({"user_id": user, "item_id": split.item_ids[split.values]}).with_columns(
        timestamp=pl.int_range(pl.len()).over("user_id")
    )
    known = pl.Series("item_id", split.item_ids)
    return raw.users, raw.items.filter(pl.col("item_id").is_in(known.implode())), interactions


def measure(tables: Any, schema: Schema, config: Config, seed: int) -> dict[str, float]:
    """Return test and validation metrics of one training."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed, "device": "cpu"})})
    started = time.perf_counter()
    done = api.fit(tables, schema, config)
    out = {
        f"{part}.{short}": done.metrics[f"{part}.{name}"]
        for part in ("validation", "test")
        for short, name in MEASURES.items()
    }
    for short, name in MEASURES.items():
        out[f"test.{short}.low"], out[f"test.{short}.high"] = (
            done.metrics[f"test.{name}.{e}"] for e in ("low", "high")
        )
    keys = ("seconds", "rows_per_second", "best_epoch", "peak_memory_mb")
    return out | {k: done.metrics[f"train.{k}"] for k in keys} | {"wall_seconds": time.perf_counter() - started}


def results(name: str, runs: list[dict[str, float]]) -> list[Numbers]:
    """Return a result for each metric; rounds are seeds, the interval is over users, of the last seed."""
    out = [
        result(
            f"{PREFIX}{name}, {short.upper()}",
            [run[f"test.{short}"] for run in runs],
            "",
            interval=[runs[-1][f"test.{short}.{end}"] for end in ("low", "high")],
            validation=[run[f"validation.{short}"] for run in runs],
        )
        for short in MEASURES
    ]
    seconds = [run["seconds"] for run in runs]
    return [*out, result(f"{PREFIX}{name}, seconds of training", seconds, "s", more=False, threads=runs[-1]["threads"])]


def line(name: str, runs: list[dict[str, float]]) -> str:
    """Return a row of the table: mean over seeds, and half of their range."""
    cells = []
    for short in MEASURES:
        values = [r[f"test.{short}"] for r in runs]
        cells.append(f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}")
    seconds = statistics.mean(r["seconds"] for r in runs)
    return f"{name:<32} {'   '.join(cells)}   {len(runs)} seeds, {seconds:,.0f} s a training"


if __name__ == "__main__":
    main()
