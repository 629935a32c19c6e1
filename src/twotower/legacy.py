"""Interface of the original teaching project: `DSSMTrainable`, and the flags of `main.py`.

Frames hold one row per interaction with the features of both sides. They are split into the distinct users and
the distinct items they name, and then trained like any other dataset.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import polars as pl
import torch
from pydantic import ValidationError

from twotower import runs
from twotower.config.experiment import Config
from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset, assemble_dataset
from twotower.data.datasets import movielens
from twotower.data.pairs import Pairs
from twotower.data.readers import as_frame
from twotower.data.splits import TEST, TRAIN, VALIDATION, Parts, split_interactions
from twotower.data.tables import POSITIVE, check
from twotower.data.times import TIME
from twotower.errors import ConfigError, DataError, RunError, TwoTowerError, did_you_mean
from twotower.escaping import escape_controls
from twotower.evaluation.metrics import auc
from twotower.features.encoders import Encoders
from twotower.features.schema import ROW_IDS, SIDES, Categorical, Feature, MultiHot, Numeric, Schema, Vector
from twotower.reports.terminal import printed_messages
from twotower.runs import Run
from twotower.train.callbacks import Callback
from twotower.train.trainer import Trainer

SEED_USER_COLUMNS = ("UserID", "Gender", "Age", "JobID", "ZipCode")
SEED_ITEM_COLUMNS = ("MovieID", "Title", "Genres", "Year", "ratings_count", "ratings_mean")
LABEL = "label"
_PARAMS = ("belongs", "use_vec", "vec_len", "emb_size", "bucket")


class _EpochPrinter(Callback):
    """Prints one line an epoch."""

    def on_epoch_end(self, history: list[dict[str, Any]]) -> None:
        entry = history[-1]
        found = f", val AUC {entry['validation.auc']:.4f}" if "validation.auc" in entry else ""
        print(f"epoch {entry['epoch']}: train loss {entry['train.loss']:.4f}{found}", flush=True)


class DSSMTrainable:
    """Two towers over the columns of `x`, trained on 0/1 labels `y`, with the teaching project's signature.

    `cols_params[column]` takes `belongs` ('user' or 'item'), `use_vec` (the column holds vectors) with `vec_len`
    (a number, or text such as '128'), `emb_size` (embedding width, 16 if absent) and `bucket` (quantile buckets of
    a float column, which is otherwise standardised). A list column without `use_vec` is multi-hot; everything
    else is categorical, with values rarer than `label_encoder_rate_min` of the rows sharing one embedding.
    Without `cols_params` the columns must be the MovieLens ones of this project.

    With `model_path` the saved model is loaded (its settings and encoders with it) and `test` scores `x`, `y`.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        cols_params: Mapping[str, Mapping[str, Any]] | None = None,
        batch_size: int = 2048,
        shuffle: bool = True,
        val_x: Any = None,
        val_y: Any = None,
        label_encoder_rate_min: float = 0.0001,
        user_dnn_size: Sequence[int] = (64, 32),
        item_dnn_size: Sequence[int] = (64, 32),
        dropout: float = 0.2,
        activation: str = "LeakyReLU",
        model_path: str | os.PathLike[str] | None = None,
        use_senet: bool = False,
        device: str = "cpu",
    ) -> None:
        self._x, self._y = as_frame(x, "x"), _labels(y, "y")
        if self._x.height != len(self._y):
            raise DataError(f"x has {self._x.height} rows and y {len(self._y)}; give one label per row")
        self._device = device
        self.model_path = Path(model_path) if model_path is not None else None
        self._trainer: Trainer | None = None
        self._run: Run | None = None
        if self.model_path is not None:
            self._run = runs.load(self.model_path)
            return
        val = None
        if val_x is not None:
            if val_y is None:
                raise DataError("val_x is given without val_y; give both or neither")
            val = as_frame(val_x, "val_x"), _labels(val_y, "val_y")
        params = _check_params(cols_params, self._x)
        schema = _schema(self._x, params, label_encoder_rate_min)
        self._dataset = _from_rows(schema, self._x, self._y, val)
        tower = {"activation": activation, "dropout": dropout, "senet": {"enabled": bool(use_senet)}}
        _, self._config = parse_config(
            {
                "model": {
                    "pairs": [
                        {
                            "user": tower | {"layers": list(user_dnn_size)},
                            "item": tower | {"layers": list(item_dnn_size)},
                        }
                    ]
                },
                "train": {"batch_size": batch_size, "shuffle": bool(shuffle)},
                "evaluation": {"bootstrap": 0},
            },
            "DSSMTrainable",
        )

    def train(
        self,
        epochs: int = 10,
        val_step: int = 1,
        device: str = "cpu",
        optimizer: str = "Adam",
        lr: float = 1e-5,
        model_path: str | os.PathLike[str] | None = None,
        lr_decay_rate: float = 0,
        lr_decay_step: int = 0,
    ) -> float:
        """Train and keep the weights with the best validation AUC, which is returned.

        Without validation rows a tenth of the training rows is used for validation. `lr_decay_rate` multiplies the
        learning rate every `lr_decay_step` epochs, if both are set. With `model_path` the model is saved to that folder.
        """
        if self._run is not None and self._trainer is None:
            raise RunError(f"this model was loaded from {self.model_path}; make a new DSSMTrainable to train")
        settings: dict[str, Any] = {
            "epochs": epochs,
            "validate_every": val_step,
            "optimizer": optimizer,
            "lr": lr,
            "device": self._choose(device),
        }
        if lr_decay_rate and lr_decay_step:
            settings |= {"schedule": "step", "lr_decay_rate": lr_decay_rate, "lr_decay_epochs": lr_decay_step}
        body = self._config.model_dump()
        body["train"] |= settings
        _, config = parse_config(body, "train")
        with runs.locked(Path(model_path)) if model_path is not None else nullcontext():
            self._trainer, self._run, best = _fit(self._dataset, config)
            if model_path is not None:
                _save(self._run, Path(model_path))
        return best

    def test(self, device: str = "cpu") -> float:
        """Return the AUC over the rows given to the constructor; values never seen in training count as unknown."""
        return score(self._trained(), self._x, self._y, self._choose(device))

    def _choose(self, device: str) -> str:
        """Return the device of a call; 'cpu', the default, means that of the constructor."""
        return _accelerator_or_cpu(device if device != "cpu" else self._device)

    def save_model(self, model_path: str | os.PathLike[str]) -> None:
        """Write the best weights, the encoders and the settings to the folder `model_path`."""
        save(self._trained(), Path(model_path))

    def _trained(self) -> Run:
        if self._run is None:
            raise RunError("nothing is trained yet; call train() first, or give model_path")
        return self._run


# ---- rows with the features of both sides -> dataset -------------------------------------------------------------


def _labels(y: Any, what: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    try:
        values = np.asarray(y, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise DataError(f"{what}: labels are not numbers; give 0 and 1") from None
    bad = ~np.isin(values, (0.0, 1.0))
    if bad.any():
        raise DataError(f"{what}: found label {values[bad][0]:g}, expected 0 or 1")
    if not len(values) or values.all() or not values.any():
        raise DataError(f"{what}: labels are of one class only; AUC and training need both 0 and 1")
    return values.astype(bool)


def _check_params(given: Mapping[str, Mapping[str, Any]] | None, x: pl.DataFrame) -> dict[str, dict[str, Any]]:
    if given is None:
        known = dict.fromkeys(SEED_USER_COLUMNS, "user") | dict.fromkeys(SEED_ITEM_COLUMNS, "item")
        strange = [c for c in x.columns if c not in known]
        if strange:
            raise ConfigError(
                f"cols_params is missing and column '{strange[0]}' is not one of {', '.join(known)}; "
                "say for each column whether it belongs to 'user' or 'item'"
            )
        given = {c: {"belongs": known[c]} for c in x.columns}
    for column, params in given.items():
        if column not in x.columns:
            raise DataError(f"cols_params: no column '{column}' in x{did_you_mean(column, x.columns)}")
        for key in params:
            if key not in _PARAMS:
                raise ConfigError(
                    f"cols_params['{column}']: unknown key '{key}'{did_you_mean(key, _PARAMS)} (allowed: {', '.join(_PARAMS)})"
                )
        if params.get("belongs") not in ("user", "item"):
            raise ConfigError(
                f"cols_params['{column}']: belongs is {params.get('belongs')!r}, expected 'user' or 'item'"
            )
    return {c: dict(p) for c, p in given.items()}


def _whole_number(params: dict[str, Any], key: str, column: str) -> int:
    """Return a whole number from a number or its text, 0 if absent. Raises ConfigError."""
    value = params.get(key) or 0
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or (key == "bucket" and number == 1):
        raise ConfigError(f"cols_params['{column}']: {key} is {value!r}, expected a whole number of at least 2")
    return number


def _schema(x: pl.DataFrame, params: dict[str, dict[str, Any]], rate_min: float) -> Schema:
    """Build the schema; rows have no ids, so the row numbers are the ids."""
    features: list[Feature] = []
    for column, p in params.items():
        dtype = x[column].dtype
        common: dict[str, Any] = {"name": column, "side": p["belongs"], "width": _whole_number(p, "emb_size", column)}
        nested = isinstance(dtype, pl.List | pl.Array)
        if _boolean(p.get("use_vec", False)):
            features.append(Vector(**common, length=_whole_number(p, "vec_len", column)))
        elif nested:
            features.append(MultiHot(**common, min_rate=rate_min))
        elif dtype.is_float() or p.get("bucket"):
            features.append(Numeric(**common, buckets=_whole_number(p, "bucket", column)))
        else:
            features.append(Categorical(**common, min_rate=rate_min))
    for side in SIDES:
        if not any(f.side == side for f in features):
            raise ConfigError(f"cols_params: no column belongs to '{side}'; each tower needs at least one")
    try:
        return Schema(user_id=ROW_IDS["user"], item_id=ROW_IDS["item"], features=tuple(features))
    except ValidationError as e:
        raise ConfigError(f"cols_params: {e.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _distinct_rows(x: pl.DataFrame, columns: list[str]) -> tuple[pl.DataFrame, np.ndarray[Any, np.dtype[np.int32]]]:
    """Return the distinct rows of some columns, and for every row of `x` the index of its distinct row."""
    part = x.select(columns)
    keys = part.with_columns(pl.col(c).arr.to_list() for c, t in part.schema.items() if isinstance(t, pl.Array))
    groups = keys.with_row_index("__at").group_by(columns, maintain_order=True).agg(pl.col("__at"))
    at = groups["__at"].explode().to_numpy()
    number = np.repeat(np.arange(groups.height, dtype=np.int32), groups["__at"].list.len().to_numpy())
    rows = np.empty(x.height, np.int32)
    rows[at] = number
    return part[groups["__at"].list.first().to_list()], rows


def _from_rows(
    schema: Schema,
    x: pl.DataFrame,
    y: np.ndarray[Any, Any],
    val: tuple[pl.DataFrame, np.ndarray[Any, Any]] | None,
) -> Dataset:
    """Return the dataset of the distinct users and items of training and validation rows, with encoders fitted on the
    training rows."""
    columns = [f.source for f in schema.features]
    if val is not None:
        if missing := [c for c in columns if c not in val[0].columns]:
            raise DataError(f"val_x: no column '{missing[0]}'{did_you_mean(missing[0], val[0].columns)}")
        parts = np.repeat(np.array([TRAIN, VALIDATION], np.int8), [x.height, val[0].height])
        x = pl.concat([x.select(columns), val[0].select(columns)], how="vertical_relaxed")
        y = np.concatenate([y, val[1]])
    else:
        # A tenth of each class, so that both parts hold both classes.
        parts = np.zeros(x.height, np.int8)
        order = np.random.RandomState(2022).permutation(x.height)
        for label in (False, True):
            labelled = order[y[order] == label]
            if len(labelled) < 2:
                raise DataError(
                    f"y: only {len(labelled)} rows are labelled {int(label)}; give more rows, or val_x and val_y"
                )
            parts[labelled[: max(1, len(labelled) // 10)]] = VALIDATION
    return _dataset(schema, x, y, parts)


def _dataset(
    schema: Schema, x: pl.DataFrame, y: np.ndarray[Any, Any], parts: Parts, encoders: Encoders | None = None
) -> Dataset:
    frames, rows = {}, {}
    for side in SIDES:
        frame, rows[side] = _distinct_rows(x, [f.source for f in schema.side(side)])
        frames[side] = frame.with_columns(pl.Series(schema.id_column(side), np.arange(frame.height)))
    train = parts == TRAIN
    if encoders is None:
        counts = {s: np.bincount(rows[s][train], minlength=frames[s].height) for s in SIDES}
        encoders = Encoders.fit(schema, frames, counts)
    return assemble_dataset(encoders, frames["user"], frames["item"], Pairs(rows["user"], rows["item"], y), parts, None)


def _fit(dataset: Dataset, config: Config) -> tuple[Trainer, Run, float]:
    with printed_messages():
        trainer = Trainer(dataset, config, None, _EpochPrinter())
        trained = trainer.run()
    best = max(h["validation.auc"] for h in trained.history if "validation.auc" in h)
    metrics = trained.metrics | {"validation.auc": best}
    return trainer, Run(None, config, dataset, trained.model.eval(), metrics, trained.history), best


def save(trained: Run, folder: Path) -> None:
    """Write a run folder, which `DSSMTrainable(model_path=…)` and `main.py` read."""
    with runs.locked(folder):
        _save(trained, folder)


def _save(trained: Run, folder: Path) -> None:
    place = runs.writing_folder(folder)
    runs.start_run(place, trained.dataset, trained.config)
    runs.save_run(place, replace(trained, folder=folder))
    runs.replace_run(folder)


def score(trained: Run, x: pl.DataFrame, y: np.ndarray[Any, Any], device: str) -> float:
    """Return the AUC of a model over rows with the features of both sides."""
    schema = trained.dataset.schema
    for feature in schema.features:
        if feature.source not in x.columns:
            raise DataError(
                f"x: no column '{feature.source}'{did_you_mean(feature.source, x.columns)}; the model was trained on it"
            )
    rows = _dataset(schema, x, y, np.zeros(len(y), np.int8), trained.dataset.encoders)
    factors = replace(trained, dataset=rows, model=trained.model.to(device)).factors()
    return auc(factors.scores(rows.pairs), rows.pairs.positive)


def _boolean(value: Any) -> bool:
    """Return a boolean from a boolean or its text; 'False' means False. Raises ConfigError."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "y", "on"):
        return True
    if text in ("false", "0", "no", "n", "off", "none", ""):
        return False
    raise ConfigError(f"found {value!r}, expected True or False")


def _accelerator_or_cpu(name: str) -> str:
    """Return the torch device for a name of the teaching project: 'gpu' is an accelerator, or the CPU without one."""
    if name == "cpu":
        return "cpu"
    if name not in ("auto", "gpu", "cuda", "mps"):
        raise ConfigError(f"device {name!r} is not known (allowed: cpu, gpu)")
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    print(f"device '{name}': no GPU here, going on on the CPU", flush=True)
    return "cpu"


# ---- main.py -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `main.py`: train on, or test with, the frames that `data_processing.py` writes. Returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        settings = vars(options)
        if options.whether_train == "train":
            _train_command(settings)
        else:
            _test_command(settings)
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
            return _boolean(text)
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
    add(
        "--encode_min",
        type=float,
        default=0.0,
        help="values rarer than this share of the rows share one embedding",
    )
    add(
        "--neg_sampling",
        type=int,
        default=5,
        help="random negatives for each positive, beside the observed ones",
    )
    add("--use_senet", type=boolean, default=True, metavar="True|False", help="weigh the features with SENet")
    return parser


SEED_PARAMS: dict[str, dict[str, Any]] = {
    "UserID": {"belongs": "user"},
    "Gender": {"belongs": "user"},
    "Age": {"belongs": "user"},
    "JobID": {"belongs": "user"},
    "MovieID": {"belongs": "item"},
    "Genres": {"belongs": "item"},
    "Year": {"belongs": "item"},
    "ratings_count": {"belongs": "item", "bucket": 20},
    "ratings_mean": {"belongs": "item"},
}


def _train_command(options: dict[str, Any]) -> None:
    folder = Path(options["data_path"])
    train, val = (_feature_file(folder, name) for name in ("train", "val"))
    schema = _schema(train, SEED_PARAMS, options["encode_min"])
    dataset = _from_rows(schema, train, _labels(train[LABEL], "train"), (val, _labels(val[LABEL], "val")))
    tower = {"layers": [64, 32], "dropout": options["dropout"], "senet": {"enabled": options["use_senet"]}}
    _, config = parse_config(
        {
            "model": {"pairs": [{"user": tower, "item": tower}]},
            "negatives": {"random": options["neg_sampling"]},
            "train": {
                "epochs": options["epochs"],
                "batch_size": options["batch_size"],
                "lr": options["lr"],
                "optimizer": options["optimizer"],
                "device": _accelerator_or_cpu(options["device"]),
            },
            "evaluation": {"bootstrap": 0},
        },
        "main.py",
    )
    print(dataset.describe())
    with runs.locked(Path(options["model_path"])):
        _, trained, best = _fit(dataset, config)
        _save(trained, Path(options["model_path"]))
    print(f"best val AUC {best:.4f}; model saved to {options['model_path']}")


def _test_command(options: dict[str, Any]) -> None:
    trained = runs.load(Path(options["model_path"]))
    test = _feature_file(Path(options["data_path"]), "test")
    value = score(trained, test, _labels(test[LABEL], "test"), _accelerator_or_cpu(options["device"]))
    print(f"Test AUC: {value:.4f}")


def _feature_file(folder: Path, name: str) -> pl.DataFrame:
    path = folder / f"{name}.parquet"
    if not path.exists():
        raise DataError(f"{path}: no such file; run data_process/movie_len/data_processing.py first")
    frame = as_frame(path, name)
    if missing := [c for c in (*SEED_PARAMS, LABEL) if c not in frame.columns]:
        raise DataError(f"{path}: no column '{missing[0]}'; run data_process/movie_len/data_processing.py again")
    return frame


# ---- data_download.py and data_processing.py ---------------------------------------------------------------------


def download(root: Path) -> int:
    """Run `data_download.py`: fetch MovieLens 1M into `root`/dataset/ml-1m. Returns the exit code."""
    try:
        with printed_messages():
            tables = movielens.load("ml-1m")
        movielens.save(tables, root / "dataset" / "ml-1m")
    except TwoTowerError as e:
        print(escape_controls(f"error: {e}"), file=sys.stderr)
        return e.exit_code
    print(f"MovieLens 1M is in {root / 'dataset' / 'ml-1m'}")
    return 0


def process(root: Path) -> int:
    """Run `data_processing.py`: write features and splits of `root`/dataset/ml-1m into its folder `feature`. Returns the
    exit code."""
    try:
        source, target = root / "dataset" / "ml-1m", root / "dataset" / "ml-1m" / "feature"
        paths = [source / f"{n}.parquet" for n in ("users", "items", "interactions")]
        if not all(p.exists() for p in paths):
            raise DataError(f"{source}: users, items and interactions are not there; run data_download.py first")
        users, items, actions = (as_frame(p, p.stem) for p in paths)
        sizes = write_features(users, items, actions, target)
    except TwoTowerError as e:
        print(escape_controls(f"error: {e}"), file=sys.stderr)
        return e.exit_code
    print(f"{target}: " + ", ".join(f"{n:,} {name} rows" for name, n in sizes.items()))
    return 0


def write_features(users: pl.DataFrame, items: pl.DataFrame, actions: pl.DataFrame, target: Path) -> dict[str, int]:
    """Write train.parquet, val.parquet and test.parquet, one row per rating with the features of both sides.

    The split is random with seed 2022: 80/20, then 90/10. `ratings_count` and `ratings_mean` are of the train part.
    """
    tables = check(users, items, actions, movielens.SCHEMA)
    actions = tables.interactions
    parts = split_interactions(np.zeros(actions.height, np.int32), None, Config().split)
    train = actions.filter(parts == TRAIN)
    counted = train.group_by("item_id").agg(
        ratings_count=pl.len().cast(pl.Float64), ratings_mean=pl.col("rating").mean()
    )
    rows = (
        actions.with_columns(part=pl.Series(parts), label=pl.col(POSITIVE).cast(pl.Int8))
        .join(tables.users, on="user_id", how="left", maintain_order="left")
        .join(tables.items, on="item_id", how="left", maintain_order="left")
        .join(counted, on="item_id", how="left", maintain_order="left")
        .with_columns(pl.col("ratings_count").fill_null(0.0))
        .rename(
            {"user_id": "UserID", "gender": "Gender", "age": "Age", "occupation": "JobID", "zip": "ZipCode",
             "item_id": "MovieID", "title": "Title", "year": "Year", "genres": "Genres", "rating": "Rating",
             "timestamp": "Timestamp"}
        )
        .drop(POSITIVE, TIME, strict=False)
    )  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, part in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        frame = rows.filter(pl.col("part") == part).drop("part")
        temporary = target / f".{name}.parquet.tmp"
        frame.write_parquet(temporary)
        os.replace(temporary, target / f"{name}.parquet")
        sizes[name] = frame.height
    return sizes
