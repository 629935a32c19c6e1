"""Set up the other tools on the same rows, fields and widths as `train_speed.py`.

torch-rechub: its DSSM (temperature 0.1), MatchTrainer and DataGenerator, as its examples use them. Its loader makes a batch row by
row, half of its time, so it is measured as shipped and with a loader process, and the faster one is its row. Adam with `fused` or `foreach` made
neither tool faster (docs/log.md).

RecBole: its DSSM, Trainer and data loaders. Its towers are fixed: batch normalisation and tanh after every layer, the
last included, and BCE on the cosine itself; dropout is set to 0, as ours, and everything else to its defaults
(`recbole.properties`). It is from 2023 and uses names that numpy 2 removed, and ray, only for tuning; `_shim` provides both
and changes nothing else. pandas must be older than 3.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
from measure import tool

from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.data.splits import TEST, TRAIN

FIELDS = {"user": ("user_id", "gender", "age", "occupation"), "item": ("item_id", "genre", "year")}
WIDTH, LAYERS, BATCH = 16, (64, 32), 2048
TOOLS = {"torch-rechub": "torch-rechub", "RecBole": "recbole"}


def is_importable(name: str) -> bool:
    """Return True if a tool can be imported; print a line if not."""
    name = name.partition(",")[0].partition(" @ ")[0]
    module = TOOLS[name].replace("-", "_")
    try:
        if name == "RecBole":
            _shim()
        importlib.import_module(module)
    except ImportError as e:
        print(f"{name} is left out ({e}): make bench-env", file=sys.stderr)
        return False
    return True


def tool_label(name: str) -> str:
    """Return a tool with its version, and its variant, where `name` has one after a comma."""
    name, comma, way = name.partition(",")
    return tool(TOOLS[name]).replace("recbole", "RecBole") + comma + way


def at_best(tried: Mapping[str, list[float]], more: bool) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return peers and their settings from the rounds of "TOOL" (as shipped) and "TOOL @ SETTING".

    The variant with the best median stands for the tool; where several were tried, the tool as shipped is listed beside it.
    """
    ways: dict[str, dict[str, list[float]]] = {}
    for name, values in tried.items():
        base, _, setting = name.partition(" @ ")
        if values:
            ways.setdefault(tool_label(base), {})[setting or "as shipped"] = values
    peers, settings = {}, {}
    for label, given in ways.items():
        best = (max if more else min)(given, key=lambda setting: median(given[setting]))
        peers[label] = given[best]
        if len(given) > 1:
            settings[label] = best
            peers[f"{label}, as shipped"] = given.get("as shipped", [])
    return peers, settings


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of the tools."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- torch-rechub ------------------------------------------------------------------------------------------------


def codes(dataset: Dataset) -> dict[str, Any]:
    """Return the codes of each of FIELDS by the row of its side."""
    columns: dict[str, Any] = {}
    for side in ("user", "item"):
        encoded = dataset.users if side == "user" else dataset.items
        columns |= {name: encoded.columns[name] for name in FIELDS[side]}
    return columns


def rechub_trainer(dataset: Dataset) -> Any:
    """Return torch-rechub's MatchTrainer with a fresh DSSM."""
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.matching import DSSM
    from torch_rechub.trainers import MatchTrainer

    columns = codes(dataset)
    features = {
        side: [SparseFeature(n, vocab_size=int(columns[n].max()) + 1, embed_dim=WIDTH) for n in FIELDS[side]]
        for side in ("user", "item")
    }
    params = {"dims": list(LAYERS), "activation": "relu"}
    model = DSSM(features["user"], features["item"], user_params=params, item_params=params, temperature=0.1)
    return MatchTrainer(model, mode=0, optimizer_params={"lr": 1e-3}, n_epoch=1, device="cpu")


def rechub_loader(dataset: Dataset, part: int = TRAIN, workers: int = 0) -> Any:
    """Return torch-rechub's loader of a part with `workers` processes; the train part is shuffled."""
    from torch_rechub.utils.data import DataGenerator

    pairs, columns = dataset.part(part), codes(dataset)
    x = {name: columns[name][pairs.user] for name in FIELDS["user"]}
    x |= {name: columns[name][pairs.item] for name in FIELDS["item"]}
    y = pairs.positive.astype("float32")
    shuffled, ordered, _ = DataGenerator(x, y).generate_dataloader(
        x_val=x, y_val=y, x_test=x, y_test=y, batch_size=BATCH, num_workers=workers
    )
    return shuffled if part == TRAIN else ordered


# ---- RecBole -----------------------------------------------------------------------------------------------------


def _shim() -> None:
    """Provide the names that RecBole 1.2 needs and numpy 2 lacks, and an empty ray module."""
    old = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_, "float": float, "bool": np.bool_}
    for name, new in old.items():
        if name not in vars(np):
            setattr(np, name, new)
    if "ray" not in sys.modules:
        ray, tune = types.ModuleType("ray"), types.ModuleType("ray.tune")
        ray.tune = tune  # type: ignore[attr-defined]
        sys.modules |= {"ray": ray, "ray.tune": tune}


@contextmanager
def recbole(
    model: str, parts: Mapping[str, pl.DataFrame], sides: Mapping[str, pl.DataFrame], **settings: Any
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Yield (trainer, train, validation, test) of RecBole on tables in its format, in a temporary folder.

    `parts` are train, validation and test with user_id, item_id and, for a labelled one, label; `sides` are user and item.
    """
    _shim()
    where, arguments = Path.cwd(), sys.argv
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "films"
        base.mkdir()
        for name, frame in {f"{part}.inter": frame for part, frame in parts.items()}.items():
            _atomic(frame, base / f"films.{name}")
        for side, frame in sides.items():
            _atomic(frame, base / f"films.{side}")
        given: dict[str, Any] = {
            "data_path": folder,
            "benchmark_filename": list(parts),
            "checkpoint_dir": folder,
            "load_col": {"inter": next(iter(parts.values())).columns}
            | {side: frame.columns for side, frame in sides.items()},
            "use_gpu": False,
            "show_progress": False,
            "state": "ERROR",
        } | settings
        os.chdir(folder)  # it writes logs where it runs
        sys.argv = arguments[:1]  # which it reads, too
        try:
            with quiet():
                config = importlib.import_module("recbole.config").Config(
                    model=model, dataset="films", config_dict=given
                )
                logging.getLogger().setLevel(logging.ERROR)
                helpers, data = importlib.import_module("recbole.utils"), importlib.import_module("recbole.data")
                helpers.init_seed(config["seed"], True)
                train, validation, test = data.data_preparation(config, data.create_dataset(config))
                made = helpers.get_model(config["model"])(config, train._dataset)
                trainer = helpers.get_trainer(config["MODEL_TYPE"], config["model"])(config, made)
            yield trainer, train, validation, test
        finally:
            os.chdir(where)
            sys.argv = arguments


def _atomic(frame: pl.DataFrame, path: Path) -> None:
    """Write a table in RecBole's format: tabs, and the type of each column in its name."""
    renamed = frame.rename({name: f"{name}:{'float' if name == 'label' else 'token'}" for name in frame.columns})
    renamed.write_csv(path, separator="\t")


DSSM = {"embedding_size": WIDTH, "mlp_hidden_size": list(LAYERS), "dropout_prob": 0.0, "train_batch_size": BATCH}
LABELLED = {
    "train_neg_sample_args": None,
    "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "RO", "group_by": None, "mode": "labeled"},
    "metrics": ["AUC"],
    "valid_metric": "AUC",
}
RANKED = {
    "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "RO", "group_by": "user", "mode": "full"},
    "metrics": ["Recall", "MRR", "NDCG", "Hit"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    # What it does by default, but for DSSM, which by default is trained on labels.
    "train_neg_sample_args": {
        "distribution": "uniform",
        "sample_num": 1,
        "alpha": 1.0,
        "dynamic": False,
        "candidate_num": 0,
    },
}


def sides(dataset: Dataset) -> dict[str, pl.DataFrame]:
    """Return FIELDS of users and items, with rows as ids."""
    columns = codes(dataset)
    return {
        side: pl.DataFrame(
            {n: np.arange(len(columns[n])) if n == f"{side}_id" else columns[n] for n in FIELDS[side]},
        )
        for side in ("user", "item")
    }


def interactions(pairs: Pairs, label: bool) -> pl.DataFrame:
    """Return pairs of rows in RecBole's columns."""
    frame = pl.DataFrame({"user_id": pairs.user, "item_id": pairs.item})
    return frame.with_columns(label=pl.Series(pairs.positive.astype(np.float32))) if label else frame


@contextmanager
def recbole_dssm(dataset: Dataset, ranked: bool = False) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Set up RecBole's DSSM on the parts of a dataset: training on labelled pairs, or ranking the test positives."""
    test, validation = dataset.part(TEST), dataset.validation
    liked = Pairs(test.user[test.positive], test.item[test.positive], test.positive[test.positive])
    parts = {"train": dataset.train, "validation": validation, "test": liked if ranked else test}
    tables = {name: interactions(pairs, not ranked) for name, pairs in parts.items()}
    settings = DSSM | ({**RANKED, "eval_batch_size": 2**18} if ranked else {**LABELLED, "LABEL_FIELD": "label"})
    with recbole("DSSM", tables, sides(dataset), **settings) as made:
        yield made
