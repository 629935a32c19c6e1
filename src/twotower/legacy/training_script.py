"""`main.py`: train DSSM on MovieLens features, or test a saved model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from twotower import runs
from twotower.config.toml import parse_config
from twotower.data.reading.readers import as_frame
from twotower.errors import ConfigError, DataError, TwoTowerError
from twotower.escaping import escape_controls
from twotower.legacy.column_params import ColumnParams, parse_boolean, schema_of
from twotower.legacy.interaction_rows import LabelledRows, check_labels, dataset_of
from twotower.legacy.training import accelerator_or_cpu, fit, save_locked, score
from twotower.runs.folder import locked

LABEL = "label"
COLUMNS = [
    ColumnParams("UserID", {"belongs": "user"}),
    ColumnParams("Gender", {"belongs": "user"}),
    ColumnParams("Age", {"belongs": "user"}),
    ColumnParams("JobID", {"belongs": "user"}),
    ColumnParams("MovieID", {"belongs": "item"}),
    ColumnParams("Genres", {"belongs": "item"}),
    ColumnParams("Year", {"belongs": "item"}),
    ColumnParams("ratings_count", {"belongs": "item", "bucket": 20}),
    ColumnParams("ratings_mean", {"belongs": "item"}),
]
"""Columns of a feature file that the model reads."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `main.py`: train on, or test with, the frames that `data_processing.py` writes. Returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        if options.whether_train == "train":
            _train(options)
        else:
            _test(options)
    except TwoTowerError as e:
        print(escape_controls(f"error: {e}"), file=sys.stderr)
        return e.exit_code
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    def boolean(text: str) -> bool:
        try:
            return parse_boolean(text)
        except ConfigError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    parser = _Parser(
        description="DSSM on MovieLens: train, then test.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data_path", default="dataset/ml-1m/feature", help="folder that data_processing.py wrote")
    add("--model_path", default="checkpont", help="folder of the model")
    add("--whether_train", default="train", choices=("train", "test"), help="train, or test a saved model")
    add("--epochs", type=int, default=10, help="passes over the training rows")
    add("--batch_size", type=int, default=2048, help="pairs a step")
    add("--dropout", type=float, default=0.0, help="share of hidden units dropped in training")
    add("--lr", type=float, default=0.001, help="learning rate")
    add("--optimizer", default="Adam", help="Adam, AdamW, SGD or Adagrad")
    add("--device", default="gpu", help="cpu or gpu; without a GPU the CPU does it")
    add("--encode_min", type=float, default=0.0, help="values rarer than this share of the rows share one embedding")
    add("--neg_sampling", type=int, default=5, help="random negatives for each positive, added to the observed ones")
    add("--use_senet", type=boolean, default=True, metavar="True|False", help="weigh the features with SENet")
    return parser


def _train(options: argparse.Namespace) -> None:
    train, val = (_feature_file(Path(options.data_path), name) for name in ("train", "val"))
    schema = schema_of(train.x, COLUMNS, options.encode_min)
    dataset = dataset_of(schema, train, val)
    tower = {"layers": [64, 32], "dropout": options.dropout, "senet": {"enabled": options.use_senet}}
    _, config = parse_config(
        {
            "model": {"pairs": [{"user": tower, "item": tower}]},
            "negatives": {"random": options.neg_sampling},
            "train": {
                "epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr,
                "optimizer": options.optimizer, "device": accelerator_or_cpu(options.device),
            },
            "evaluation": {"bootstrap": 0},
        },
        "main.py",
    )  # fmt: skip
    print(dataset.describe())
    with locked(Path(options.model_path)):
        trained, best = fit(dataset, config)
        save_locked(trained, Path(options.model_path))
    print(f"best val AUC {best:.4f}; model saved to {options.model_path}")


def _test(options: argparse.Namespace) -> None:
    trained = runs.load(Path(options.model_path))
    test = _feature_file(Path(options.data_path), "test")
    print(f"Test AUC: {score(trained, test, accelerator_or_cpu(options.device)):.4f}")


def _feature_file(folder: Path, name: str) -> LabelledRows:
    path = folder / f"{name}.parquet"
    if not path.exists():
        raise DataError(f"{path}: no such file; run data_process/movie_len/data_processing.py first")
    frame = as_frame(path, name)
    if missing := [c for c in (*(p.column for p in COLUMNS), LABEL) if c not in frame.columns]:
        raise DataError(f"{path}: no column '{missing[0]}'; run data_process/movie_len/data_processing.py again")
    return LabelledRows(frame, check_labels(frame[LABEL], name))
