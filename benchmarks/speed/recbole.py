"""RecBole on the rows of peers.py, as peers.toml describes it."""

import importlib
import logging
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl

from benchmarks.lib.machine import timed
from benchmarks.lib.report import declared
from benchmarks.lib.worlds import FIELDS
from benchmarks.speed.rechub import codes
from benchmarks.speed.tools import quiet
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.data.splits import TEST
from twotower.features.side import SIDES

SETTINGS: dict[str, dict[str, Any]] = declared(__file__)


def need() -> None:
    shim()
    importlib.import_module("recbole")


def training(dataset: Dataset, folder: Path) -> float:
    with dssm(dataset) as (trainer, train), quiet():
        return timed(lambda: trainer._train_epoch(train, 0))


def evaluation(dataset: Dataset, folder: Path) -> float:
    with dssm(dataset, ranked=True) as (trainer, test), quiet():
        return timed(lambda: trainer.evaluate(test, load_best_model=False))


@contextmanager
def dssm(dataset: Dataset, ranked: bool = False) -> Iterator[tuple[Any, Any]]:
    """Yield a trainer of DSSM and its training rows, or, `ranked`, its rows of the test positives."""
    test, validation = dataset.part(TEST), dataset.validation
    liked = Pairs(test.user[test.positive], test.item[test.positive], test.positive[test.positive])
    parts = {"train": dataset.train, "validation": validation, "test": liked if ranked else test}
    named = {"user_id": "user", "item_id": "item"} | ({} if ranked else {"label": "positive"})
    tables = {part: pl.DataFrame({c: getattr(pairs, n) for c, n in named.items()}) for part, pairs in parts.items()}
    tables = {part: table.cast({pl.Boolean: pl.Float32}) for part, table in tables.items()}
    columns = codes(dataset)
    columns |= {name: np.arange(len(columns[name])) for name in ("user_id", "item_id")}
    sides: dict[str, pl.DataFrame] = {side: pl.DataFrame({n: columns[n] for n in FIELDS[side]}) for side in SIDES}
    labelled = SETTINGS["labelled"] | {"train_neg_sample_args": None}
    labelled["eval_args"] = labelled["eval_args"] | {"group_by": None}
    settings = SETTINGS["dssm"] | (SETTINGS["ranked"] | {"eval_batch_size": 2**18} if ranked else labelled)
    with trained("DSSM", tables, sides, **settings) as (trainer, train, rows):
        yield trainer, rows if ranked else train


@contextmanager
def trained(
    model: str, parts: Mapping[str, pl.DataFrame], sides: Mapping[str, pl.DataFrame], **settings: Any
) -> Iterator[tuple[Any, Any, Any]]:
    """Yield (trainer, train, test) of a model on tables in its format, in a temporary folder.

    `parts` are train, validation and test with user_id, item_id and, if labelled, label; `sides` are user and item.
    """
    shim()
    with tempfile.TemporaryDirectory() as folder, chdir(folder), mock.patch.object(sys, "argv", sys.argv[:1]):
        # It writes logs where it runs, and reads the command line.
        base = Path(folder) / "films"
        base.mkdir()
        for name, frame in ({f"{part}.inter": frame for part, frame in parts.items()} | dict(sides)).items():
            # Its format: tabs, and the type of each column in its name.
            typed = {column: f"{column}:{'float' if column == 'label' else 'token'}" for column in frame.columns}
            frame.rename(typed).write_csv(base / f"films.{name}", separator="\t")
        columns = {"inter": next(iter(parts.values())).columns} | {side: f.columns for side, f in sides.items()}
        given: dict[str, Any] = {"data_path": folder, "checkpoint_dir": folder, "benchmark_filename": list(parts)}
        given |= {"load_col": columns, "use_gpu": False, "show_progress": False, "state": "ERROR"} | settings
        with quiet():
            config, data, helpers = (importlib.import_module(f"recbole.{name}") for name in ("config", "data", "utils"))
            config = config.Config(model=model, dataset="films", config_dict=given)
            logging.getLogger().setLevel(logging.ERROR)
            helpers.init_seed(config["seed"], True)
            train, _, test = data.data_preparation(config, data.create_dataset(config))
            made = helpers.get_model(config["model"])(config, train._dataset)
            trainer = helpers.get_trainer(config["MODEL_TYPE"], config["model"])(config, made)
        yield trainer, train, test


def shim() -> None:
    """Provide the names that RecBole 1.2 needs and numpy 2 lacks, and an empty ray module."""
    old = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_, "float": float, "bool": np.bool_}
    for name, new in old.items():
        if name not in vars(np):
            setattr(np, name, new)
    if "ray" not in sys.modules:
        ray, tune = types.ModuleType("ray"), types.ModuleType("ray.tune")
        ray.tune = tune  # type: ignore[attr-defined]
        sys.modules |= {"ray": ray, "ray.tune": tune}
