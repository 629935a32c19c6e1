"""A second training on all rows: the same as one that is given what the first has chosen, to the bit."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import kill_points
import numpy as np
import polars as pl
import preloaded
import pytest
import torch
from closed_form_worlds import courses, groups
from trainers import StopAt, same, weights
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api, runs
from twotower.cli.app import run_command
from twotower.config.experiment import Config
from twotower.config.scorers import with_scorers
from twotower.config.toml import dump_config, load_config, parse_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, VALIDATION
from twotower.data.tables import check
from twotower.data.whole import whole_of
from twotower.errors import ConfigError
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.train.progress import Callback
from twotower.train.refit import Refit
from twotower.train.trainer import Trainer

TIMES = SplitConfig(kind="time", test=0.1, validation=0.1)


def trained(data: Dataset, config: Config) -> Trainer:
    trainer = Trainer(data, config)
    trainer.run()
    return trainer


def refit_of(first: Trainer) -> Refit:
    again = Refit(first, whole_of(first.dataset), None, Callback())
    again.run()
    return again


def board(split: SplitConfig = TIMES) -> Dataset:
    return build_dataset(check(*checkerboard(), CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, split)


def test_it_equals_a_training_of_all_rows_for_the_best_epoch() -> None:
    config = settings(train={"epochs": 4, "lr": 0.3, "refit": True})
    first = trained(board(), config)
    assert 0 < first.best.epoch < 4, "the best epoch must not be the last, or the test tells nothing"
    again = refit_of(first)
    assert again.progress.epoch == first.best.epoch
    given = config.train.model_copy(update={"epochs": first.best.epoch, "refit": False})
    alone = trained(replace(whole_of(board()), is_whole=False), config.model_copy(update={"train": given}))
    assert same(weights(again), weights(alone))
    assert len(again.dataset.train) == len(board().pairs)


def test_a_schedule_is_as_long_as_in_the_first_training() -> None:
    config = settings(train={"epochs": 4, "lr": 0.3, "refit": True, "schedule": "cosine"})
    first = trained(board(), config)
    again = refit_of(first)
    halfway = again.objective.steps_per_epoch * 2
    assert again.optimizer.learning_rate(halfway) == pytest.approx(0.15)


def mixed(data: Dataset, scorers: list[dict[str, Any]], epochs: int) -> tuple[Dataset, Config]:
    """Data with the features of the scorers, and a config; without epochs the scorers are the model."""
    sections: dict[str, Any] = {
        "scorers": scorers, "narrow": {"width": 12}, "evaluation": {"k": [5], "bootstrap": 0},
        "train": {"epochs": epochs, "refit": True, "device": "cpu", "monitor": "validation.recall@5"},
    }  # fmt: skip
    if epochs:
        sections |= {"loss": {"kind": "softmax"}}
    sections["model"] = {"similarity": "dot"} | ({"width": 8, "pairs": [{}]} if epochs else {})
    schema, config = with_scorers(data.schema, parse_config(sections)[1])
    return build_dataset(check(None, None, log_of(data), schema), schema, data.split), config


def log_of(data: Dataset) -> pl.DataFrame:
    names = np.array(["train", "validation", "test"])[data.parts]
    ids = {"user_id": data.users.ids.gather(data.pairs.user), "item_id": data.items.ids.gather(data.pairs.item)}
    return pl.DataFrame(ids | {"part": names})


@pytest.mark.parametrize("epochs", [0, 2])
def test_closed_forms_are_solved_on_all_rows_with_the_chosen_values_and_weights(epochs: int) -> None:
    plain = groups(
        schema=Schema(features=(Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")))
    )
    scorers = [{"kind": "ease", "width": 24}, {"kind": "ials", "width": 16}]
    data, config = mixed(plain, scorers, epochs)
    first = trained(data, config)
    again = refit_of(first)
    weighted = {form.pair: weight for form, weight in first.solved}
    assert any(weighted.values())
    assert first.model.narrow is not None
    assert again.model.narrow is not None
    assert again.model.narrow.width == first.model.narrow.width
    # Its vectors come from all rows: a user whose only rows were held out has some.
    seen = again.dataset.seen_items.lengths
    assert seen.sum() == len(np.unique(data.pairs.user.astype(np.int64) * len(data.items) + data.pairs.item))
    measured = runs.Run(None, config, again.dataset, again.model.eval(), {}, [])
    scores = measured.factors().catalogue_scores(torch.arange(len(again.dataset.users)).numpy())
    own = scores.gather(1, torch.from_numpy(data.test.item.astype(np.int64))[None].expand(len(scores), -1))
    of_pairs = scores[data.test.user.astype(np.int64), data.test.item.astype(np.int64)].mean()
    assert of_pairs > own.mean() + 0.5 * scores.std(), "rows of the test part are learned"


def test_stacking_and_the_priors_are_those_of_the_first_training() -> None:
    config = settings(train={"refit": True}, model={"stacking": True, "bias": True})
    first = trained(board(), config)
    again = refit_of(first)
    assert first.stacked
    assert first.stacked.baselines
    assert torch.equal(again.model.term_weights, first.model.term_weights)
    assert torch.equal(again.model.global_bias, first.model.global_bias)


def test_new_values_of_the_held_out_rows_are_known() -> None:
    users, _, log = checkerboard()
    newest = log.sort("at").tail(60).with_columns(item_id=pl.lit(30, pl.Int64))
    schema = CHECKERBOARD_SCHEMA
    data = build_dataset(
        check(users, None, pl.concat([log, newest.with_columns(at=pl.col("at") + 5000)]), schema), schema, TIMES
    )
    row = data.items.ids.to_list().index(30)
    before, after = (np.asarray(one.items.columns["item_id"]) for one in (data, whole_of(data)))
    assert before[row] == 0
    assert after[row] != 0


def test_a_dataset_and_its_tables_make_the_same_whole() -> None:
    data = courses(50)
    tables = check(
        None,
        data.items.frame,
        pl.DataFrame(
            {
                "user_id": data.users.ids.gather(data.pairs.user),
                "item_id": data.items.ids.gather(data.pairs.item),
                "t": data.times,
            }
        ),
        data.schema,
    )
    assert whole_of(data).digest == build_dataset(tables, data.schema, data.split, whole=True).digest


def test_without_a_validation_part_there_is_no_chosen_epoch() -> None:
    with pytest.raises(
        ConfigError, match=r"train.refit trains for the epochs that validation chooses, and the split has"
    ):
        Trainer(board(SplitConfig(kind="time", test=0.1, validation=0.0)), settings(train={"refit": True}))


# ---- a run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    names = ("users", "items", "interactions")
    for name, frame in zip(names, checkerboard(), strict=True):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    train = {"checkpoint_steps": 2, "refit": True, "batch_size": 128}
    config = settings(train=train, split=TIMES.model_dump(include={"kind", "test", "validation"}),
        data={name: f"{name}.parquet" for name in names})  # fmt: skip
    (tmp_path / "config.toml").write_text(dump_config(CHECKERBOARD_SCHEMA, config), encoding="utf-8")
    return tmp_path


def train(project: Path, run: str, *more: str) -> int:
    return run_command(["train", str(project / "config.toml"), "--run", str(project / run), *more])


def test_a_run_publishes_the_model_of_all_rows_and_is_measured_by_the_other(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(project, "run") == 0
    run = api.load(project / "run")
    again = runs.published(run)
    assert (run.dataset.parts == TEST).any()
    assert not again.dataset.parts.any()
    assert run.sha256 != again.sha256
    assert api.evaluate(run)["test.auc"] == pytest.approx(run.metrics["test.auc"])
    assert again.metrics["test.auc"] == run.metrics["test.auc"]
    store = project / "store"
    assert run_command(["publish", str(project / "run"), "--store", str(store)]) == 0
    manifest = api.retriever(store).bundle.manifest
    n, newest = len(run.dataset.pairs), int(run.dataset.times.max())
    assert (manifest.learned.rows, manifest.learned.until) == (manifest.remembered.rows, manifest.remembered.until)
    assert (manifest.learned.rows, manifest.learned.until) == (n, newest)
    assert manifest.model == again.sha256
    capsys.readouterr()
    assert run_command(["evaluate", str(store)]) == 0
    said = capsys.readouterr()
    assert f"knows all {n:,} rows of its log: nothing is left to measure" in said.out + said.err
    # A training without a refit takes its place whole.
    tables, schema = api.read(*config_of(project))
    api.fit(tables, schema, settings(split={"kind": "time"}), folder=project / "run", overwrite=True)
    assert not (project / "run" / "refit").exists()


@pytest.mark.parametrize("step", [3, 17, 18, 20])
def test_a_killed_training_or_refit_goes_on_to_the_same_bits(project: Path, step: int) -> None:
    assert train(project, "whole") == 0
    command = ("train", project / "config.toml", "--run", project / "run")
    point = f"step:{step}"
    process = preloaded.start(
        *kill_points.program(point), *command, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=preloaded.PIPE, stderr=preloaded.PIPE,
    )  # fmt: skip
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert train(project, "run", "--resume") == 0
    whole, run = (api.load(project / name) for name in ("whole", "run"))
    assert run.sha256 == whole.sha256
    assert runs.published(run).sha256 == runs.published(whole).sha256


@pytest.mark.system
def test_a_training_with_a_refit_that_is_killed_at_random_ends_by_the_same_command(project: Path) -> None:
    points, refits = kill_points.random_points(lambda: train(project, "whole", "--resume")), 0
    whole = api.load(project / "whole")
    for point in points:
        words = ["train", project / "config.toml", "--run", project / f"run-{point}", "--resume"]
        process = preloaded.start(
            *kill_points.program(str(point)), *words, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=preloaded.PIPE, stderr=preloaded.PIPE,
        )  # fmt: skip
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        refits += (project / f"run-{point}" / "refit").exists()
        assert run_command([*map(str, words)]) == 0
        run = api.load(project / f"run-{point}")
        assert (run.sha256, runs.published(run).sha256) == (whole.sha256, runs.published(whole).sha256), point
    assert 0 < refits < 10, "kills of both trainings"


def test_an_interrupted_refit_goes_on_where_it_stopped(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables, schema = api.read(*config_of(project))
    config = config_of(project)[0]
    whole = api.fit(tables, schema, config, folder=project / "whole")
    first = int(whole.metrics["train.steps"])
    with pytest.raises(KeyboardInterrupt):
        api.fit(tables, schema, config, folder=project / "run", callback=StopAt(first + 5))
    state = max((project / "run" / "refit" / "checkpoints").glob("step-*"))
    assert json.loads((state / "state.json").read_text())["progress"]["step"] == 4
    run = api.fit(tables, schema, config, folder=project / "run", resume=True)
    assert runs.published(run).sha256 == runs.published(whole).sha256


def test_prepared_data_are_trained_again_in_memory(project: Path) -> None:
    config, schema = config_of(project)
    prepared = api.prepare_folder(config, schema, project / "prepared")
    run = api.fit(prepared, schema, config, folder=project / "run")
    again = runs.published(run)
    assert len(again.dataset.train) == len(run.dataset.pairs) == 1200
    assert (run.dataset.parts == VALIDATION).any()
    assert again.dataset.encoders.digest == whole_of(prepared).encoders.digest


def config_of(project: Path) -> tuple[Config, Schema]:
    schema, config = load_config(project / "config.toml")
    assert schema
    return config, schema
