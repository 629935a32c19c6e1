"""From tables of any make to recommendations."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from suggestion_worlds import log
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything, settings

import twotower
from twotower import api
from twotower.cli.app import run_command
from twotower.config.experiment import Config
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.data.dataset import build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError, DataError, TwoTowerError
from twotower.features.numeric import Numeric
from twotower.features.schema import EventRule
from twotower.retrieval.retriever import stored_history
from twotower.runs import Run
from twotower.train.progress import Callback, EpochRecord


def arrow(frame: pl.DataFrame) -> pa.Table:
    return pa.table({c: pa.array(frame[c].to_list()) for c in frame.columns})


def pandas(frame: pl.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({c: frame[c].to_list() for c in frame.columns})


@pytest.mark.parametrize("make", [pandas, arrow, lambda f: f.lazy(), lambda f: f.to_dict(as_series=False)])
def test_frames_of_every_make_give_the_same_model(make: Any) -> None:
    config = settings(train={"epochs": 1})
    expected = twotower.fit(everything(), EVERYTHING_SCHEMA, config).metrics["test.auc"]
    users, items, actions = everything()
    assert twotower.fit((make(users), make(items), make(actions)), EVERYTHING_SCHEMA, config).metrics["test.auc"] == (
        expected
    )


def test_interactions_alone_are_enough() -> None:
    _, _, actions = checkerboard()
    done = twotower.fit(actions, CHECKERBOARD_SCHEMA, settings())
    assert (
        done.metrics["test.auc"]
        == twotower.fit((None, None, actions), CHECKERBOARD_SCHEMA, settings()).metrics["test.auc"]
    )
    assert len(done.dataset.users) == 40
    assert len(done.dataset.items) == 30


@pytest.fixture(scope="module")
def suggested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A file of clicks, and the run of `twotower suggest` and `twotower train`."""
    folder = tmp_path_factory.mktemp("suggested")
    clicks, config = folder / "clicks.csv", folder / "mine.toml"
    log(40, 8, 0.0, 20).drop("timestamp").write_csv(clicks)
    assert run_command(["suggest", str(clicks), "-o", str(config)]) == 0
    assert run_command(["train", str(config), "--run", str(folder / "run"), "--threads", "1"]) == 0
    return clicks, twotower.load(folder / "run")


@pytest.mark.parametrize("make", ["path", pytest.param("frame", marks=pytest.mark.system)])
def test_a_table_alone_is_trained_as_suggest_says(make: str, suggested: tuple[Path, Run], tmp_path: Path) -> None:
    clicks, expected = suggested
    tables: Any = clicks if make == "path" else pl.read_csv(clicks)
    run = twotower.fit(tables, folder=tmp_path / "run")
    assert run.dataset.schema == expected.dataset.schema
    assert run.config.model_copy(update={"data": expected.config.data}) == expected.config
    assert (run.config.data == expected.config.data) == (make == "path")
    assert run.sha256 == expected.sha256
    assert {k: v for k, v in run.metrics.items() if k[:6] != "train."} == (
        {k: v for k, v in expected.metrics.items() if k[:6] != "train."}
    )


@pytest.mark.system
def test_a_folder_alone_is_trained_with_all_its_tables(tmp_path: Path) -> None:
    for name, frame in zip(("users", "items", "interactions"), everything(), strict=True):
        frame.select(c for c, t in frame.schema.items() if not t.is_nested()).write_csv(tmp_path / f"{name}.csv")
    run = twotower.fit(tmp_path, time="when")
    assert {f.side for f in run.dataset.schema.features} == {"user", "item"}
    assert run.config.data.users.endswith("users.csv")


def test_a_stream_alone_is_read_once_and_gives_the_columns_of_its_items() -> None:
    clicks = log(80, 8, 0.0, 30).drop("timestamp").with_columns(brand=pl.format("b{}", pl.col("item_id") % 5))
    stream = pa.RecordBatchReader.from_stream(clicks)
    run = twotower.fit(stream, overrides=["train.seed=3", "evaluation.bootstrap=0"])
    assert run.config.train.seed == 3
    assert "brand" in {feature.name for feature in run.dataset.schema.side("item")}


def test_overrides_are_for_what_is_suggested() -> None:
    with pytest.raises(ConfigError, match="`overrides` are settings for what is suggested"):
        twotower.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), overrides=["train.lr=0.1"])


def test_what_a_training_without_a_schema_cannot_tell_is_an_error(tmp_path: Path) -> None:
    users, items, actions = checkerboard()
    checked = check(users, items, actions, CHECKERBOARD_SCHEMA)
    bad: tuple[tuple[Any, Config | None, type[TwoTowerError], str], ...] = (
        (actions, settings(), ConfigError, "schema is missing: a config goes with one; pass it too, or leave out both"),
        (checked, None, ConfigError, "schema is missing: checked tables have one"),
        ((users, actions), None, DataError, r"found \(DataFrame, DataFrame\), expected one table of interactions"),
        ((users, items, None), None, DataError, r"found \(DataFrame, DataFrame, None\), expected one table"),
    )
    for tables, config, error, words in bad:
        with pytest.raises(error, match=words):
            twotower.fit(tables, config=config, folder=tmp_path / "run")
        assert not (tmp_path / "run" / "config.toml").exists()


def test_clicks_without_a_label_train_against_random_negatives() -> None:
    users, items, actions = checkerboard()
    clicks = actions.filter(pl.col("liked") == 1).drop("liked")
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"label": ""})
    config = settings(negatives={"random": 3}, train={"epochs": 20, "batch_size": 64, "monitor": "validation.recall@5"})
    done = twotower.fit((users, items, clicks), schema, config)
    # A user is left with a few unseen liked items among 15 + those of the other colour.
    assert done.metrics["test.recall@5"] > 2 * done.metrics["baseline.popularity.recall@5"]


def test_recommendations_are_new_to_the_user_best_first_and_never_fewer_than_remain() -> None:
    users, items, actions = checkerboard()
    keep = actions.filter((pl.col("user_id") != 3) | (pl.col("item_id") < 25))
    done = twotower.fit((users, items, keep), CHECKERBOARD_SCHEMA, settings(train={"epochs": 20, "batch_size": 64}))
    best = twotower.recommend(done, 3, k=10).items
    assert {r.id for r in best} == {"25", "26", "27", "28", "29"}
    assert [r.score for r in best] == sorted((r.score for r in best), reverse=True)
    assert {r.id for r in best[:3]} == {"25", "27", "29"}, "an odd user likes odd items"
    row = done.dataset.users.ids.to_list().index(3)
    factors = done.factors()
    item = done.dataset.items.ids.to_list().index(int(best[0].id))
    assert best[0].score == pytest.approx(float(factors.users[row] @ factors.items[item]), abs=1e-6)


def test_a_dataset_of_another_split_or_schema_is_refused(tmp_path: Path) -> None:
    schema = CHECKERBOARD_SCHEMA
    data = build_dataset(check(*checkerboard(), schema), schema, SplitConfig(kind="last"))
    config = settings(train={"epochs": 1})
    with pytest.raises(
        ConfigError, match=r"made with another \[split\] \(kind\); pass its schema, and its split in the config"
    ):
        api.fit(data, schema, config, folder=tmp_path / "run")
    config = config.model_copy(update={"split": data.split})
    with pytest.raises(ConfigError, match=r"made with another \[schema\] \(positive_above\)"):
        api.fit(data, schema.model_copy(update={"positive_above": 4}), config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = api.fit(data, config=config, folder=tmp_path / "run")
    assert run.dataset is data
    assert api.load(tmp_path / "run").metrics == run.metrics


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return twotower.fit(
        everything(), EVERYTHING_SCHEMA, settings(train={"epochs": 1}), folder=tmp_path_factory.mktemp("rated") / "run"
    )


def test_a_list_of_users_gets_one_frame_of_the_answers_to_each(rated: Run) -> None:
    users = ["u5", "nobody", "u2", "u5"]
    frame = twotower.recommend(rated, users, 3)
    assert frame.columns == ["user_id", "rank", "item_id", "title", "score", "source"]
    rows = list(frame.iter_rows())
    for place, user in enumerate(users):
        answer = twotower.recommend(rated, user, 3)
        items = [
            (user, rank, item.id, item.title, item.score, answer.source) for rank, item in enumerate(answer.items, 1)
        ]
        assert rows[3 * place : 3 * place + 3] == items
    for make in (tuple, iter, pl.Series, np.array, pd.Series, pd.array):
        assert twotower.recommend(rated, make(users), 3).equals(frame)
    assert twotower.recommend(rated, [], 3).columns == frame.columns


def test_unknown_users_get_the_popular_items_of_the_store(rated: Run, tmp_path: Path) -> None:
    twotower.publish(rated, tmp_path / "store", force=True)
    served = twotower.retriever(tmp_path / "store").recommend(twotower.Request("nobody"), 4)
    mine = twotower.recommend(rated, "nobody", 4)
    assert (mine.items, mine.source) == (served.items, "popular")
    assert twotower.recommend(rated, 10**20, 4).items == served.items
    assert twotower.recommend(rated, "nobody", 999).truncated


@pytest.mark.parametrize("user", [None, 3.0, True, b"u5", [1.5], [None], [["u5"]]])
def test_what_is_no_id_is_an_error(user: Any, rated: Run) -> None:
    with pytest.raises(DataError, match="user_id"):
        twotower.recommend(rated, user)


@pytest.mark.parametrize("k", [0, -1])
def test_a_k_below_one_is_an_error(k: int, rated: Run) -> None:
    with pytest.raises(DataError, match=f"k is {k}"):
        twotower.recommend(rated, "u5", k=k)


def test_recent_lists_liked_training_items_latest_first(rated: Run) -> None:
    titles = api.recent_titles(rated, "u5", 50)
    data = rated.dataset
    row = data.users.ids.to_list().index("u5")
    mine = (data.pairs.user == row) & data.pairs.positive & (data.parts == 0)
    order = np.argsort(-data.times[mine])
    assert titles == [f"Item {data.items.ids[int(i)][1:]}" for i in data.pairs.item[mine][order]]


@pytest.fixture(scope="module")
def with_inputs(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame], Run]:
    """Tables whose events are bought, skipped or inputs, and a run of them."""
    users, items, log = checkerboard(20, 16)
    mean = Numeric(name="share", side="item", statistic="mean")
    rules = {"buy": EventRule(), "skip": EventRule(target="negative"), "view": EventRule(target="input")}
    events = {"label": "", "event": "type", "events": rules, "features": (*CHECKERBOARD_SCHEMA.features, mean)}
    tables = users, items, log.with_columns(type=np.random.default_rng(2).choice(list(rules), len(log)))
    schema, folder = CHECKERBOARD_SCHEMA.model_copy(update=events), tmp_path_factory.mktemp("inputs")
    return tables, twotower.fit(tables, schema, settings(train={"epochs": 1}), folder=folder / "run")


def test_inputs_are_no_likes(with_inputs: tuple[tuple[pl.DataFrame, ...], Run], tmp_path: Path) -> None:
    (_, _, log), run = with_inputs
    types = {str(i): t for u, i, t in log.select("user_id", "item_id", "type").iter_rows() if u == 3}
    titles = api.recent_titles(run, 3, 99)
    assert titles
    assert {types[title] for title in titles} == {"buy"}
    api.publish(run, tmp_path / "store", force=True)
    history = stored_history(api.retriever(tmp_path / "store"), "3", 99)
    assert {e.liked for e in history} == {True, False, None}
    assert all(e.liked is {"buy": True, "skip": False, "view": None}[types[e.id]] for e in history)


def test_a_mean_of_the_label_leaves_inputs_out(
    with_inputs: tuple[tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame], Run], tmp_path: Path
) -> None:
    tables, run = with_inputs
    train, column = run.dataset.train, run.dataset.schema.statistics()[0].source
    found = run.dataset.items.frame[column].to_list()
    for row, share in enumerate(found):
        mine = (train.item == row) & (train.weight > 0)
        assert 0 < np.count_nonzero(mine) < np.count_nonzero(train.item == row)
        assert share == pytest.approx(train.positive[mine].mean())
    paths = {name: tmp_path / f"{name}.parquet" for name in ("users", "items", "interactions")}
    for path, table in zip(paths.values(), tables, strict=True):
        table.write_parquet(path)
    given = DataConfig.model_validate({name: str(path) for name, path in paths.items()})
    disk = prepare.write_prepared(given, run.dataset.schema, run.config.split, tmp_path / "out")
    assert disk.items.ids.to_list() == run.dataset.items.ids.to_list()
    assert disk.items.frame[column].to_list() == pytest.approx(found)


def test_reading_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"data\.interactions is missing"):
        api.read(Config(), CHECKERBOARD_SCHEMA)
    with pytest.raises(DataError, match=r"x\.csv: no such file"):
        api.read(Config(data=DataConfig(interactions="x.csv")), None)


def test_nothing_to_learn_is_said_before_anything_is_written(tmp_path: Path) -> None:
    users, items, actions = checkerboard()
    clicks = actions.filter(pl.col("liked") == 1)
    auc: dict[str, object] = {"monitor": "validation.auc"}
    for label, config, error, words in (
        (
            "liked",
            settings(),
            DataError,
            r"as 'liked' is above schema.positive_above = 0, .*set negatives.random = 5, or loss",
        ),
        ("", settings(train=auc), ConfigError, r"one class only; use train.monitor = 'validation.recall@5'"),
    ):
        schema = CHECKERBOARD_SCHEMA.model_copy(update={"label": label})
        with pytest.raises(error, match=words):
            twotower.fit((users, items, clicks), schema, config, folder=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_training_is_silent_but_in_a_notebook(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(**options: Any) -> list[str]:
        twotower.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(train={"epochs": 1}), **options)
        return capsys.readouterr().out.splitlines()

    assert said() == []
    shell = SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert said(callback=Callback()) == []
    assert [line for line in said() if line.startswith(("phase", "epoch "))][:2] == [
        "phase 1 of 3: reading", "phase 2 of 3: epochs",
    ]  # fmt: skip
    del shell.kernel  # IPython on a terminal
    assert said() == []


class StopAfterAnEpoch(Callback):
    """Raises after the first epoch, as a crash would."""

    def on_epoch_end(self, history: list[EpochRecord]) -> None:
        raise KeyboardInterrupt


def test_a_run_that_goes_on_with_another_evaluation_is_measured_by_it(tmp_path: Path) -> None:
    """Steps of next to nothing leave the first epoch, which was measured by the earlier settings, the best."""

    def config(**evaluation: Any) -> Config:
        return settings(train={"lr": 1e-12, "epochs": 2}, evaluation={"bootstrap": 0} | evaluation)

    with pytest.raises(KeyboardInterrupt):
        api.fit(
            checkerboard(), CHECKERBOARD_SCHEMA, config(k=[10]), folder=tmp_path / "run", callback=StopAfterAnEpoch()
        )
    chosen = config(k=[5], max_users=20)
    done = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, chosen, folder=tmp_path / "run", resume=True)
    assert done.metrics["train.best_epoch"] == 1
    measured = {name: value for name, value in api.evaluate(done).items() if name.startswith("validation.")}
    assert {name: value for name, value in done.metrics.items() if name.startswith("validation.")} == pytest.approx(
        measured
    )
    assert "validation.recall@5" in measured
