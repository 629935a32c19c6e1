"""The teaching project's surface is frozen: its class, its flags, its files."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import preloaded
import pytest
from worlds import write_movielens_archive

from twotower.errors import ConfigError, DataError, RunError
from twotower.legacy import training_script
from twotower.legacy.dssm_trainable import DSSMTrainable

ROOT = Path(__file__).resolve().parents[1]


def frames(n: int = 1500, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray[Any, Any]]:
    """Rows with columns of every type; users like items of their own parity."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 40, n), rng.integers(0, 30, n)
    x = pd.DataFrame(
        {
            "UserID": user, "Gender": np.where(user % 3 == 0, "F", "M"), "weight": (user * 1.7).astype(float),
            "income": (user * 10.0).astype(float), "MovieID": [f"m{i}" for i in item],
            "tags": [[f"t{i % 4}", "all"] for i in item], "poster": [[float(i % 5), 1.0, 2.0, -1.0] for i in item],
        }
    )  # fmt: skip
    return x, ((user + item) % 2 == 0).astype(int)


PARAMS: dict[str, dict[str, Any]] = {
    "UserID": {"belongs": "user", "emb_size": 24},
    "Gender": {"belongs": "user"},
    "weight": {"belongs": "user"},
    "income": {"belongs": "user", "bucket": 5},
    "MovieID": {"belongs": "item"},
    "tags": {"belongs": "item"},
    "poster": {"belongs": "item", "use_vec": True, "vec_len": "4"},
}


def test_the_signatures_are_the_teaching_projects() -> None:
    def shape(function: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    none = inspect.Parameter.empty
    assert shape(DSSMTrainable) == [
        ("x", none), ("y", none), ("cols_params", None), ("batch_size", 2048), ("shuffle", True), ("val_x", None),
        ("val_y", None), ("label_encoder_rate_min", 0.0001), ("user_dnn_size", (64, 32)), ("item_dnn_size", (64, 32)),
        ("dropout", 0.2), ("activation", "LeakyReLU"), ("model_path", None), ("use_senet", False), ("device", "cpu"),
    ]  # fmt: skip
    assert shape(DSSMTrainable.train) == [
        ("self", none), ("epochs", 10), ("val_step", 1), ("device", "cpu"), ("optimizer", "Adam"), ("lr", 1e-5),
        ("model_path", None), ("lr_decay_rate", 0), ("lr_decay_step", 0),
    ]  # fmt: skip
    assert shape(DSSMTrainable.test) == [("self", none), ("device", "cpu")]
    assert shape(DSSMTrainable.save_model) == [("self", none), ("model_path", none)]


def test_the_flags_and_their_defaults_are_the_teaching_projects() -> None:
    given = {a.dest: a.default for a in training_script._parser()._actions if a.dest != "help"}
    assert given == {
        "data_path": "dataset/ml-1m/feature", "model_path": "checkpont", "whether_train": "train", "epochs": 10,
        "batch_size": 2048, "dropout": 0.0, "lr": 0.001, "optimizer": "Adam", "device": "gpu", "encode_min": 0.0,
        "neg_sampling": 5, "use_senet": True,
    }  # fmt: skip


@pytest.mark.parametrize("senet", [False, True])
def test_it_learns_saves_loads_and_tests_to_the_same_auc(tmp_path: Path, senet: bool) -> None:
    x, y = frames()
    val_x, val_y = frames(400, 1)
    model = DSSMTrainable(x, y, PARAMS, batch_size=100, val_x=val_x, val_y=val_y, use_senet=senet, dropout=0.0)
    best = model.train(epochs=20, lr=0.01, model_path=tmp_path / "model")
    assert best > 0.9
    test_x, test_y = frames(400, 2)
    loaded = DSSMTrainable(test_x, test_y, PARAMS, model_path=str(tmp_path / "model"))
    assert loaded.test() > 0.9
    again = DSSMTrainable(val_x, val_y, model_path=tmp_path / "model")
    assert again.test() == pytest.approx(best, abs=1e-9), "the best validation AUC is what is saved"


def test_rows_are_learned_by_their_weights(tmp_path: Path) -> None:
    x, y = frames(600)
    twice = pd.concat([x.assign(weight=1.5), x.assign(weight=0)], ignore_index=True)
    labels = np.concatenate([y, 1 - y])  # those of weight 0 are wrong
    params = PARAMS | {"weight": {"belongs": "weight"}}
    model = DSSMTrainable(twice, labels, params, batch_size=100, dropout=0.0)
    assert model.train(epochs=12, lr=0.01, model_path=tmp_path / "model") > 0.8
    test_x, test_y = frames(400, 2)
    assert DSSMTrainable(test_x.drop(columns="weight"), test_y, model_path=tmp_path / "model").test() > 0.8
    with pytest.raises(DataError, match=r"x: weight 'weight' has 600 values that are neither 0 nor from 1e-06 to"):
        DSSMTrainable(twice.assign(weight=twice["weight"] - 1), labels, params)


def test_values_never_seen_in_training_count_as_unknown(tmp_path: Path) -> None:
    x, y = frames()
    DSSMTrainable(x, y, PARAMS, batch_size=100).train(epochs=1, lr=0.01, model_path=tmp_path)
    strange = x.head(50).assign(UserID=99_999, MovieID="never", Gender="X")
    value = DSSMTrainable(strange, y[:50], model_path=tmp_path).test()
    assert 0 <= value <= 1


def test_each_argument_changes_the_outcome() -> None:
    x, y = frames(600)

    def outcome(init: dict[str, Any] | None = None, fit: dict[str, Any] | None = None) -> tuple[float, int]:
        arguments: dict[str, Any] = {"cols_params": PARAMS, "batch_size": 100} | (init or {})
        model = DSSMTrainable(x, y, **arguments)
        training: dict[str, Any] = {"epochs": 3, "val_step": 3, "lr": 0.01} | (fit or {})
        model.train(**training)
        trained = model._trained()
        validations = sum("validation.auc" in h for h in trained.history)
        return sum(float(p.detach().abs().sum()) for p in trained.model.parameters()), validations

    base = outcome()
    assert outcome() == base
    for init in (
        {"batch_size": 50},
        {"shuffle": False},
        {"label_encoder_rate_min": 0.03},
        {"user_dnn_size": (32, 32)},
        {"item_dnn_size": (16, 32)},
        {"dropout": 0.5},
        {"activation": "Tanh"},
        {"use_senet": True},
        {"cols_params": PARAMS | {"UserID": {"belongs": "user", "emb_size": 8}}},
        {"cols_params": PARAMS | {"income": {"belongs": "user"}}},
        {"cols_params": PARAMS | {"poster": {"belongs": "item"}}},
        {"cols_params": PARAMS | {"weight": {"belongs": "weight"}}},
    ):
        assert outcome(init) != base, init
    for fit in (
        {"epochs": 1},
        {"optimizer": "SGD"},
        {"lr": 0.02},
        {"val_step": 1},
        {"lr_decay_rate": 0.1, "lr_decay_step": 1},
    ):
        assert outcome(None, fit) != base, fit


def test_mistakes_are_clear() -> None:
    x, y = frames(200)
    for error, words, arguments in (
        (DataError, "one label per row", (x, y[:10], PARAMS)),
        (DataError, "expected 0 or 1", (x, y + 1, PARAMS)),
        (DataError, "one class", (x, np.ones(200), PARAMS)),
        (DataError, "no column 'Gendr'.*Gender", (x, y, {"Gendr": {"belongs": "user"}})),
        (ConfigError, "belongs is 'film'", (x, y, {"UserID": {"belongs": "film"}})),
        (ConfigError, "unknown key 'embsize'.*emb_size", (x, y, {"UserID": {"belongs": "user", "embsize": 3}})),
        (ConfigError, "cols_params is missing and column 'weight'", (x, y)),
    ):
        with pytest.raises(error, match=words):
            DSSMTrainable(*arguments)
    with pytest.raises(ConfigError, match="Activation|activation"):
        DSSMTrainable(x, y, PARAMS, activation="Swishy")
    with pytest.raises(RunError, match="nothing is trained"):
        DSSMTrainable(x, y, PARAMS).test()
    with pytest.raises(RunError, match="no run"):
        DSSMTrainable(x, y, PARAMS, model_path="nowhere/at/all")


@pytest.fixture(scope="module")
def seed_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the commands, with the data downloaded (from a local archive) and processed."""
    root = tmp_path_factory.mktemp("seed")
    shutil.copy(ROOT / "main.py", root)
    shutil.copytree(ROOT / "data_process", root / "data_process")
    zipped = write_movielens_archive(root / "ml-1m.zip")
    for script in ("data_download.py", "data_processing.py"):
        run_python(root / "data_process" / "movie_len", script, TWOTOWER_DATA=str(zipped))
    return root


def run_python(folder: Path, *arguments: str, code: int = 0, **env: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    done = preloaded.run(*arguments, cwd=folder, env=environment)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_scripts_write_the_splits_with_the_projects_names(seed_project: Path) -> None:
    folder = seed_project / "dataset" / "ml-1m" / "feature"
    train, val, test = (pl.read_parquet(folder / f"{n}.parquet") for n in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (648, 72, 180)
    columns = {"UserID", "Gender", "Age", "JobID", "MovieID", "ratings_count", "ratings_mean", "Genres", "label"}
    assert columns <= set(train.columns)
    assert ((train["Rating"] > 3).cast(pl.Int8) == train["label"]).all()
    # Statistics of a film come from training rows alone, wherever the film stands.
    counts = dict(train.group_by("MovieID").len().iter_rows())
    means = dict(train.group_by("MovieID").agg(pl.col("Rating").mean()).iter_rows())
    for frame in (train, val, test):
        for film, count, mean in frame.select("MovieID", "ratings_count", "ratings_mean").iter_rows():
            assert count == counts.get(film, 0)
            assert mean == pytest.approx(means[film]) if film in means else mean is None


def test_main_trains_and_tests(seed_project: Path) -> None:
    command = (
        "main.py --data_path dataset/ml-1m/feature --model_path checkpont --whether_train {} --epochs 10 "
        "--batch_size 64 --dropout 0.0 --lr 0.01 --optimizer Adam --device gpu --encode_min 0.0 --neg_sampling 5 "
        "--use_senet {}"
    )
    trained = run_python(seed_project, *command.format("train", "True").split())
    assert "no GPU here" in trained or "cuda" in trained
    shown = run_python(seed_project, *command.format("test", "True").split())
    value = float(shown.split("Test AUC:")[1].split()[0])
    assert value > 0.9
    once = command.replace("checkpont", "plain").replace("--epochs 10", "--epochs 1")
    run_python(seed_project, *once.format("train", "False").split())
    gates = (seed_project / "plain" / "model.json").read_text()
    assert '"enabled": true' not in gates
    assert '"enabled": true' in (seed_project / "checkpont" / "model.json").read_text()


def test_few_rows_without_validation_rows_are_split_by_class_or_refused() -> None:
    x, y = frames(40)
    assert 0 <= DSSMTrainable(x, y, PARAMS, batch_size=8).train(epochs=1) <= 1
    with pytest.raises(DataError, match="only 1 rows are labelled 1"):
        DSSMTrainable(x.head(3), np.array([0, 1, 0]), PARAMS)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"UserID": {"belongs": "user"}}, "no column belongs to 'item'"),
        (PARAMS | {"UserID": {"belongs": "user", "emb_size": "abc"}}, "emb_size is 'abc'"),
        (
            PARAMS | {"weight": {"belongs": "weight", "bucket": 5}},
            "a column of weights has no other keys; leave them out",
        ),
        (
            PARAMS | {key: {"belongs": "weight"} for key in ("weight", "income")},
            "'weight' and 'income' are both weights",
        ),
    ],
)
def test_parameters_that_cannot_be_are_config_errors(params: dict[str, dict[str, Any]], words: str) -> None:
    x, y = frames(60)
    with pytest.raises(ConfigError, match=words):
        DSSMTrainable(x, y, params)
