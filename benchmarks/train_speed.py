"""Measure training speed beside torch-rechub and RecBole in one process: rows per second of one epoch of ML-1M.

    make bench-env && TWOTOWER_DATA=path/to/ml-1m.zip .venv-bench/bin/python benchmarks/train_speed.py

Same work for all: four user and three item fields of width 16, towers 64-32, cosine, BCE on the shown pairs of
the train part, Adam, batch 2048, fp32, the same threads. The time of an epoch is from shuffling to the last update,
validation excluded. Rounds alternate, so other load slows all tools; the table shows medians and ranges. The limit is the time of the towers' matrix products alone, every row through both.
The script then measures the seconds from the archive on disk to a test AUC of 0.80, without the start of the interpreter.

The other tools and their settings are in peers.py: torch-rechub's own trainer, loader and DSSM as its examples set them
up, and RecBole's, whose towers have batch normalisation and tanh besides and no temperature. A tool that is not
installed is left out.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import polars as pl
import torch
from measure import finish, options, product_rate, result
from peers import (
    BATCH,
    FIELDS,
    LAYERS,
    WIDTH,
    at_best,
    is_importable,
    quiet,
    recbole_dssm,
    rechub_loader,
    rechub_trainer,
)

from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.datasets import movielens
from twotower.data.splits import TEST
from twotower.data.tables import check
from twotower.evaluation.metrics.auc import auc
from twotower.features.categorical import Categorical
from twotower.train.trainer import Trainer

# Multiply-adds of both towers and the dot product, forward and backward (3 x forward), two flops each.
FLOPS_PER_ROW = 2 * 3 * sum(n * WIDTH * 64 + 64 * 32 for n in (4, 3)) + 2 * 3 * 32


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--goal", type=float, default=0.80, help="test AUC to reach; 0 skips this measurement")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    dataset = prepare_movielens()
    rows = len(dataset.train)
    epochs = {"twotower": twotower_epoch} | {name: epoch for name, epoch in PEERS.items() if is_importable(name)}
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    products = []
    for number in range(chosen.rounds):
        for name, epoch in epochs.items():
            rates[name].append(rows / epoch(dataset, number))
        products.append(product_rate())
    ours = rates.pop("twotower")
    peers, settings = at_best(rates, more=True)
    results = [
        result(
            "train_speed: training",
            ours,
            "rows/s",
            peers=peers,
            settings=settings,
            floor=statistics.median(products) / FLOPS_PER_ROW,
            threads=chosen.threads,
        )
    ]
    if chosen.goal:
        took = seconds_to(chosen.goal)
        if took is None:
            print(f"test AUC {chosen.goal} was not reached", file=sys.stderr)
        else:
            results.append(
                result(f"train_speed: from the archive to test AUC {chosen.goal:.2f}", took, "s", more=False)
            )
    finish(results, chosen)


def prepare_movielens() -> Dataset:
    raw = movielens.load("ml-1m")
    items = raw.items.with_columns(genre=pl.col("genres").list.first())
    features = tuple(
        Categorical(name=name, side=side) for side in ("user", "item") for name in FIELDS[side]
    )  # fmt: skip
    schema = movielens.SCHEMA.model_copy(update={"features": features})
    return build_dataset(check(raw.users, items, raw.interactions, schema), schema, parse_config({})[1].split)


def twotower_trainer(dataset: Dataset, seed: int, device: str = "cpu", precision: str = "fp32") -> Trainer:
    """Return the package's trainer with a fresh model."""
    _, config = parse_config(
        {
            "model": {"width": WIDTH, "bias": False, "unknown_rate": 0.0,
                      "pairs": [{s: {"layers": list(LAYERS), "activation": "ReLU"} for s in ("user", "item")}]},
            "train": {"batch_size": BATCH, "device": device, "precision": precision, "seed": seed},
        }
    )  # fmt: skip
    return Trainer(dataset, config)


def twotower_epoch(dataset: Dataset, seed: int) -> float:
    """Return the seconds of one epoch of the package's trainer."""
    trainer = twotower_trainer(dataset, seed)
    started = time.perf_counter()
    epoch = trainer.objective.sampler.epoch(0)
    for number in range(trainer.objective.steps_per_epoch):
        trainer.step(epoch, number)
    return time.perf_counter() - started


def rechub_epoch(dataset: Dataset, seed: int, workers: int = 0) -> float:
    """Return the seconds of one epoch of torch-rechub's own trainer, loader and model."""
    trainer, loader = rechub_trainer(dataset), rechub_loader(dataset, workers=workers)
    with quiet():
        started = time.perf_counter()
        trainer.train_one_epoch(loader)
        return time.perf_counter() - started


def recbole_epoch(dataset: Dataset, seed: int) -> float:
    """Return the seconds of one epoch of RecBole's own trainer, loader and model."""
    with recbole_dssm(dataset) as (trainer, train, _, _), quiet():
        started = time.perf_counter()
        trainer._train_epoch(train, seed)
        return time.perf_counter() - started


PEERS: dict[str, Callable[[Dataset, int], float]] = {
    "torch-rechub": rechub_epoch,
    "torch-rechub @ num_workers=1": partial(rechub_epoch, workers=1),
    "RecBole": recbole_epoch,
}


def seconds_to(goal: float) -> float | None:
    """Return the seconds from the archive to the first epoch whose test AUC reaches `goal`; the time of the test is excluded."""
    spent = 0.0
    started = time.perf_counter()
    dataset = prepare_movielens()
    _, config = parse_config(
        {"train": {"batch_size": 8192, "lr": 0.01, "epochs": 20, "device": "cpu"}, "model": {"bias": True}}
    )
    trainer = Trainer(dataset, config)
    for number in range(config.train.epochs):
        epoch = trainer.objective.sampler.epoch(number)
        for step in range(trainer.objective.steps_per_epoch):
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
