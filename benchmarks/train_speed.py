"""Training speed beside torch-rechub, in one process and one run: rows per second of one epoch of MovieLens 1M.

    make bench-env && TWOTOWER_DATA=path/to/ml-1m.zip .venv-bench/bin/python benchmarks/train_speed.py

Same work for both: four user and three item fields of width 16, towers 64-32, cosine, BCE on the observed pairs of
the train part, Adam, batch 2048, fp32, the same threads. An epoch counts from shuffling to the last update,
validation excluded. Rounds alternate, so that a busy machine slows both; the table shows medians and ranges.
Then the seconds from the archive on disk to a test AUC of 0.80, everything included but the interpreter's start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import polars as pl
import torch

from twotower.config import parse
from twotower.data import movielens
from twotower.data.dataset import Dataset, prepare
from twotower.data.splits import TEST
from twotower.data.tables import check
from twotower.evaluation import auc
from twotower.schema import Categorical
from twotower.train.trainer import Trainer

FIELDS = {"user": ("user_id", "gender", "age", "occupation"), "item": ("item_id", "genre", "year")}
BATCH, WIDTH, LAYERS = 2048, 16, (64, 32)
# Multiply-adds of both towers and the dot product, forward and backward (3 x forward), two flops each.
FLOPS_PER_ROW = 2 * 3 * sum(n * WIDTH * 64 + 64 * 32 for n in (4, 3)) + 2 * 3 * 32


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--json", action="store_true", help="print JSON only")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    dataset = prepare_movielens()
    rows = len(dataset.train)
    ours, theirs, products = [], [], []
    for number in range(chosen.rounds):
        ours.append(rows / twotower_epoch(dataset, number))
        theirs.append(rows / rechub_epoch(dataset))
        products.append(matrix_product_rate())
    result = {
        "threads": chosen.threads,
        "rows": rows,
        "twotower.rows_per_second": spread(ours),
        "torch_rechub.rows_per_second": spread(theirs),
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "matrix_product.gflops": spread([p / 1e9 for p in products]),
        "floor.rows_per_second": statistics.median(products) / FLOPS_PER_ROW,
        "seconds_to_auc_0.80": seconds_to(0.80),
        "torch": torch.__version__,
    }
    if chosen.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        print(f"{name:<32} {value}")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def prepare_movielens() -> Dataset:
    raw = movielens.load("ml-1m", say=lambda line: print(line, file=sys.stderr))
    items = raw.items.with_columns(genre=pl.col("genres").list.first())
    features = tuple(
        Categorical(name=name, side=side) for side in ("user", "item") for name in FIELDS[side]
    )  # fmt: skip
    schema = movielens.SCHEMA.model_copy(update={"features": features})
    return prepare(check(raw.users, items, raw.interactions, schema), schema, parse({})[1].split)


def twotower_epoch(dataset: Dataset, seed: int) -> float:
    """Seconds of one epoch of our trainer."""
    _, config = parse(
        {
            "model": {"width": WIDTH, "bias": False, "unknown_rate": 0.0,
                      "pairs": [{s: {"layers": list(LAYERS), "activation": "ReLU"} for s in ("user", "item")}]},
            "train": {"batch_size": BATCH, "device": "cpu", "seed": seed},
        }
    )  # fmt: skip
    trainer = Trainer(dataset, config)
    started = time.perf_counter()
    epoch = trainer.sampler.epoch(0)
    for number in range(trainer.steps_per_epoch):
        trainer.step(epoch, number)
    return time.perf_counter() - started


def rechub_epoch(dataset: Dataset) -> float:
    """Seconds of one epoch of torch-rechub's own trainer, loader and model, as its examples set them up."""
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.matching import DSSM
    from torch_rechub.trainers import MatchTrainer
    from torch_rechub.utils.data import DataGenerator

    pairs = dataset.train
    columns: dict[str, Any] = {}
    features: dict[str, list[Any]] = {"user": [], "item": []}
    for side, row in (("user", pairs.user), ("item", pairs.item)):
        encoded = dataset.users if side == "user" else dataset.items
        for name in FIELDS[side]:
            codes: Any = encoded.columns[name]
            columns[name] = codes[row]
            features[side].append(SparseFeature(name, vocab_size=int(codes.max()) + 1, embed_dim=WIDTH))
    params = {"dims": list(LAYERS), "activation": "relu"}
    model = DSSM(features["user"], features["item"], user_params=params, item_params=params, temperature=0.1)
    loader, _, _ = DataGenerator(columns, pairs.positive.astype("float32")).generate_dataloader(
        x_val=columns, y_val=pairs.positive, x_test=columns, y_test=pairs.positive, batch_size=BATCH
    )
    trainer = MatchTrainer(model, mode=0, optimizer_params={"lr": 1e-3}, n_epoch=1, device="cpu")
    with redirect_stderr(StringIO()):
        started = time.perf_counter()
        trainer.train_one_epoch(loader)
        return time.perf_counter() - started


def matrix_product_rate(size: int = 2048, seconds: float = 0.5) -> float:
    """Flops per second of a large fp32 product with the present threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ b
        n += 1
    return n * 2 * size**3 / (time.perf_counter() - started)


def seconds_to(goal: float) -> float | None:
    """Seconds from the archive to the first epoch whose test AUC reaches `goal`; the test itself is not counted."""
    spent = 0.0
    started = time.perf_counter()
    dataset = prepare_movielens()
    _, config = parse(
        {"train": {"batch_size": 8192, "lr": 0.01, "epochs": 20, "device": "cpu"}, "model": {"bias": True}}
    )
    trainer = Trainer(dataset, config)
    for number in range(config.train.epochs):
        epoch = trainer.sampler.epoch(number)
        for step in range(trainer.steps_per_epoch):
            trainer.step(epoch, step)
        at = time.perf_counter() - started - spent
        testing = time.perf_counter()
        pairs = dataset.part(TEST)
        found = auc(trainer.factors().scores(pairs), pairs.positive)
        spent += time.perf_counter() - testing
        if found >= goal:
            return round(at, 2)
    return None


if __name__ == "__main__":
    main()
