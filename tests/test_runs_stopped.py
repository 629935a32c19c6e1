"""A run that was stopped or killed is read at its best epoch so far, and its training resumes as without the read."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import kill_points
import preloaded
import pytest
from trainers import StopAt
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api, files, runs
from twotower.cli.app import run_command
from twotower.config.toml import dump_config
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.data.split import SplitConfig
from twotower.errors import RunError
from twotower.files import layout
from twotower.retrieval.request import Request
from twotower.train.progress import Callback


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A config and its tables: two epochs of four steps, of which every second is saved."""
    names = ("users", "items", "interactions")
    for name, frame in zip(names, checkerboard(), strict=True):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    config = settings(train={"checkpoint_steps": 2}, data={name: f"{name}.parquet" for name in names})
    (tmp_path / "config.toml").write_text(dump_config(CHECKERBOARD_SCHEMA, config), encoding="utf-8")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def killed(project: Path, step: int) -> Path:
    """The run folder of a training that is killed after a step."""
    command = ("train", project / "config.toml", "--run", project / "run")
    process = preloaded.start(
        *kill_points.program(f"step:{step}"), *command, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=preloaded.PIPE, stderr=preloaded.PIPE,
    )  # fmt: skip
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return project / "run"


def test_a_killed_training_is_evaluated_diagnosed_and_published_and_goes_on_to_the_same_bits(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = killed(project, 7)
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    before = content(run)
    line = f"{run}: stopped after epoch 1 of 2; the best is epoch 1\n"
    capsys.readouterr()
    assert run_command(["evaluate", str(run), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(line)
    metrics = json.loads(said.out)
    loaded = api.load(run)
    # The weights are those that the training has validated.
    assert len(loaded.history) == 1
    validated = {name: v for name, v in loaded.history[0].items() if name in metrics}
    assert len(validated) > 5
    assert validated == pytest.approx({name: metrics[name] for name in validated}, rel=1e-6)
    assert loaded.metrics["train.best_epoch"] == loaded.metrics["train.epochs"] == 1
    assert run_command(["doctor", str(run)]) in (0, 1)
    assert capsys.readouterr().err.startswith(line)
    assert run_command(["publish", str(run), "--store", str(tmp_path / "store"), "--force"]) == 0
    assert line in capsys.readouterr().out
    retriever = api.retriever(tmp_path / "store")
    bundle = retriever.bundle.folder
    assert "; stopped after epoch 1 of 2; the best is epoch 1." in (bundle / "README.md").read_text()
    assert runs.weights_digest(bundle) == loaded.sha256
    assert json.loads((bundle / "metrics.json").read_text()) == metrics | loaded.metrics
    user = loaded.dataset.users.ids[3]
    best = api.recommend(loaded, user, 5).items
    assert [i.id for i in retriever.recommend(Request(user), 5).items] == [i.id for i in best]
    assert content(run) == before
    for folder in (run, whole):
        assert run_command(["train", str(project / "config.toml"), "--run", str(folder), "--resume"]) == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not api.load(run).unfinished


def test_the_best_epoch_is_not_the_last_one(tmp_path: Path) -> None:
    config = settings(train={"epochs": 6, "lr": 0.5})
    with pytest.raises(KeyboardInterrupt):
        api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run", callback=StopAt(4 * 4 + 2))
    loaded = api.load(tmp_path / "run")
    monitor = loaded.config.train.monitor
    scores = [epoch[monitor] for epoch in loaded.history]
    best = 1 + scores.index(max(scores))
    assert best < len(scores) == 4
    assert loaded.unfinished == f"stopped after epoch 4 of 6; the best is epoch {best}"
    assert api.evaluate(loaded)[monitor] == pytest.approx(max(scores), rel=1e-6)


def test_a_training_that_still_runs_says_so(tmp_path: Path) -> None:
    found, refused = list[str](), list[RunError]()

    class Reader(Callback):
        def on_epoch_end(self, history: list[dict[str, float]]) -> None:
            if len(history) == 1:
                loaded = api.load(tmp_path / "run")
                found.append(loaded.unfinished)
                try:
                    api.publish(loaded, tmp_path / "store")
                except RunError as e:
                    refused.append(e)

    config = settings(model={"stacking": True, "cold_item_bias": True})
    api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run", callback=Reader())
    with pytest.raises(
        RunError,
        match=r"the training has not ended \(in training after epoch 1 of 2; .*; let it end, go on: `fit\(config, fol",
    ):
        raise refused[0]
    assert not (tmp_path / "store" / layout.CURRENT).exists()
    lacks = "model.stacking weighs its terms after the last; model.cold_item_bias is fitted after the last"
    assert found == [f"in training after epoch 1 of 2; the best is epoch 1; {lacks}"]


def test_before_the_first_epoch_ends_there_is_nothing_to_read(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = killed(project, 3)
    assert list((run / "checkpoints").glob("step-*"))
    for words in (["evaluate", run], ["doctor", run], ["publish", run, "--store", project / "store"]):
        assert run_command([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(
            f"error: {run}: an unfinished run (metrics.json is missing) without a validated epoch; "
        )
        assert f"twotower train CONFIG --run {run} --resume`" in error
        assert error.count("\n") == 1
    assert not (project / "store").exists()


def test_prepared_data_and_tables_of_another_training(tmp_path: Path) -> None:
    checkerboard()[2].write_parquet(tmp_path / "interactions.parquet")
    data = DataConfig(interactions=str(tmp_path / "interactions.parquet"))
    dataset = prepare.write_prepared(data, CHECKERBOARD_SCHEMA, SplitConfig(kind="last"), tmp_path / "prepared")
    config = settings(split={"kind": "last"})
    with pytest.raises(KeyboardInterrupt):
        api.fit(dataset, CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run", callback=StopAt(8))
    files.remove(tmp_path / "prepared")
    loaded = api.load(tmp_path / "run")
    assert loaded.unfinished
    before = content(tmp_path / "run")
    bundle = api.publish(loaded, tmp_path / "store", force=True)
    assert (bundle.folder / "prepared").is_dir()
    assert content(tmp_path / "run") == before
    state = max((tmp_path / "run" / "checkpoints").glob("step-*")) / "state.json"
    state.write_text(state.read_text().replace(f'"data": "{loaded.dataset.digest}"', '"data": "0"'))
    with pytest.raises(RunError, match="of other data than the tables of .*; train the run again"):
        api.load(tmp_path / "run")
