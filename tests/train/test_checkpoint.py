"""A training resumes from its checkpoints exactly, and damaged or foreign ones are passed over or named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import kill_points
import polars as pl
import preloaded
import pytest
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor
from trainers import StopAt, same, weights
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything, settings

from twotower import api, runs
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import RunError
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric
from twotower.features.sequence import Sequence
from twotower.train import checkpoint
from twotower.train.checkpoint import Checkpoint, TensorBlocks, join_states, load_states, write_tensors
from twotower.train.progress import Callback
from twotower.train.trainer import Trainer


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(everything_data: Dataset) -> None:
    def train(seed: int) -> dict[str, torch.Tensor]:
        trainer = Trainer(everything_data, settings(train={"seed": seed}, negatives={"random": 2}))
        trainer.run()
        return weights(trainer)

    assert same(train(1), train(1))
    assert not same(train(1), train(2))


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_a_run_stopped_at_any_step_ends_in_the_same_weights(everything_data: Dataset, folder: Path, stop: int) -> None:
    config = settings(
        model={"width": 8, "pairs": [{s: {"layers": [8], "dropout": 0.3} for s in ("user", "item")}]},
        train={"epochs": 3, "batch_size": 300, "checkpoint_steps": 1, "ema_decay": 0.9, "schedule": "cosine"},
        negatives={"random": 1},
    )
    whole = Trainer(everything_data, config)
    expected = whole.run()
    with pytest.raises(KeyboardInterrupt):
        Trainer(everything_data, config, folder, StopAt(stop)).run()
    again = Trainer(everything_data, config, folder)
    assert again.resume() is (stop > 1)  # the step that crashes is not saved yet
    got = again.run()
    assert same(weights(whole), weights(again))
    assert drop_times(got.history) == drop_times(expected.history)


def drop_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in h.items() if k not in ("train.seconds", "validation.seconds")} for h in history]


def earlier_data() -> Dataset:
    """`everything` with sequences that can be had at every moment."""
    extra = Sequence(name="seen", side="user", pooling="decay", share_embedding=False)
    features = (*(f for f in EVERYTHING_SCHEMA.features if f.name not in ("fans", "disliked")), extra)
    schema = EVERYTHING_SCHEMA.model_copy(update={"features": features})
    return build_dataset(check(*everything(), schema), schema, SplitConfig(kind="last"))


@pytest.mark.parametrize("stop", [2, 4, 5, 6, 9])
@pytest.mark.parametrize("history_scope", ["leave_batch_out", "causal"])
def test_a_run_with_memory_and_mined_candidates_stopped_at_any_step_ends_in_the_same_weights(
    everything_data: Dataset, folder: Path, history_scope: str, stop: int
) -> None:
    data = earlier_data() if history_scope == "causal" else everything_data
    config = settings(
        model={"width": 8, "pairs": [{s: {"layers": [8], "dropout": 0.3} for s in ("user", "item")}]},
        loss={"kind": "softmax"},
        train={"epochs": 3, "batch_size": 100, "checkpoint_steps": 1, "ema_decay": 0.9, "history_scope": history_scope},
        negatives={
            "uniform": 20, "popularity": 20, "cross_batch_memory": 150, "disliked": 1,
            "hard": {"n": 2, "ranks": [2, 9], "ratio": 30, "every": 3}, "attribute": "brand",
        },
    )  # fmt: skip
    whole = Trainer(data, config)
    expected = whole.run()
    assert whole.objective.state().keys() == {
        *(f"cross_batch_memory/{name}" for name in ("items", "vectors", "draws")), "hard/windows",
    }  # fmt: skip
    assert whole.objective.steps_per_epoch in (4, 5)
    with pytest.raises(KeyboardInterrupt):
        Trainer(data, config, folder, StopAt(stop)).run()
    again = Trainer(data, config, folder)
    assert again.resume()
    assert len(again.objective.state()["cross_batch_memory/items"]) == min(150, 100 * again.progress.step)
    got = again.run()
    assert same(weights(whole), weights(again))
    assert drop_times(got.history) == drop_times(expected.history)
    assert same(whole.objective.state(), again.objective.state())


def test_what_an_overriding_resume_no_longer_asks_for_is_not_restored(everything_data: Dataset, folder: Path) -> None:
    negatives = {"cross_batch_memory": 150, "hard": {"n": 2, "ranks": [1, 3], "ratio": 10}}
    options = {"loss": {"kind": "softmax"}, "train": {"epochs": 2, "batch_size": 100}}
    Trainer(everything_data, settings(negatives=negatives, **options), folder).run()  # type: ignore[arg-type]
    again = Trainer(everything_data, settings(**options), folder)  # type: ignore[arg-type]
    assert again.resume(override=True)
    assert not again.objective.state()


def _write_config(tmp_path: Path, config: Config) -> Path:
    for name, frame in zip(("users", "items", "interactions"), checkerboard(), strict=True):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    data = {n: f"{n}.parquet" for n in ("users", "items", "interactions")}
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    from twotower.config.toml import dump_config

    path = tmp_path / "config.toml"
    path.write_text(dump_config(CHECKERBOARD_SCHEMA, config), encoding="utf-8")
    return path


def _train_process(
    path: Path, target: Path, *options: str, until: str | None = None
) -> subprocess.CompletedProcess[str]:
    program = kill_points.program(until) if until else ["-m", "twotower"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return preloaded.run(*program, "train", path, "--run", target, *options, env=environment)


@pytest.mark.parametrize("steps", [(1, 9), pytest.param((4, 5, 6, 7), marks=pytest.mark.system)])
def test_fault_B1_kill_at_any_step_then_resume_is_bit_equal(steps: tuple[int, ...], tmp_path: Path) -> None:
    config = settings(
        model={"width": 8, "pairs": [{s: {"layers": [8], "dropout": 0.2} for s in ("user", "item")}]},
        train={"epochs": 2, "batch_size": 100, "checkpoint_steps": 2, "lr": 0.02},
        negatives={"random": 1},
    )
    path = _write_config(tmp_path, config)
    assert _train_process(path, tmp_path / "whole").returncode == 0
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for step in steps:
        target = tmp_path / f"killed{step}"
        killed = _train_process(path, target, until=f"step:{step}")
        assert killed.returncode == -signal.SIGKILL
        assert not (target / "metrics.json").exists()
        resumed = _train_process(path, target, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert ("resuming after step" in resumed.stdout) is (step > 1)
        assert (target / "model.safetensors").read_bytes() == expected


def test_fault_B1_kill_inside_a_checkpoint_write_leaves_the_one_before(
    board: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    config = settings(train={"epochs": 1, "batch_size": 64, "checkpoint_steps": 1})
    trainer = Trainer(board, config, folder)
    epoch = trainer.objective.sampler.epoch(0)
    trainer.step(epoch, 0)
    trainer._save()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    trainer.step(epoch, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            trainer._save()
    found = Checkpoint.newest(folder)
    assert found is not None
    assert found.step == 1
    assert not [m for m in messages if not m.startswith(("train.precision", "train.batch_size"))]


def test_fault_B2_sigterm_finishes_the_step_saves_and_exits_143(tmp_path: Path) -> None:
    config = settings(train={"epochs": 10_000, "batch_size": 64, "lr": 0.001})
    path = _write_config(tmp_path, config)
    process = preloaded.start(
        "-m", "twotower", "train", path, "--run", tmp_path / "run", stdout=preloaded.PIPE, stderr=preloaded.PIPE
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "--resume" in errors
    assert time.monotonic() - started < 10
    found = Checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert f"after step {found.step}" in errors


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "state"])
def test_fault_B3_a_damaged_newest_checkpoint_falls_back_and_says_so(
    board: Dataset, folder: Path, damage: str, messages: list[str]
) -> None:
    trainer = Trainer(board, settings(train={"epochs": 1, "batch_size": 100}), folder)
    epoch = trainer.objective.sampler.epoch(0)
    for number in (0, 1):
        trainer.step(epoch, number)
        trainer._save()
    newest = folder / "step-000000002"
    tensors = newest / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)
    elif damage == "truncate":
        tensors.write_bytes(data[: len(data) // 2])
    elif damage == "delete":
        tensors.unlink()
    else:
        (newest / "state.json").write_text("{")
    again = Trainer(board, settings(train={"epochs": 1, "batch_size": 100}), folder)
    assert again.resume()
    assert again.progress.step == 1
    assert any("falling back" in line and "step-000000002" in line for line in messages)


@pytest.mark.parametrize("written", [None, 2, "two"])
def test_a_checkpoint_of_another_format_is_refused_by_its_number(
    board: Dataset, folder: Path, written: int | str | None
) -> None:
    config = settings(train={"epochs": 1, "batch_size": 100})
    trainer = Trainer(board, config, folder)
    epoch = trainer.objective.sampler.epoch(0)
    for batch in (0, 1):
        trainer.step(epoch, batch)
        trainer._save()
    path = folder / "step-000000002" / "state.json"
    state = json.loads(path.read_text())
    assert state.pop("format") == checkpoint.FORMAT
    path.write_text(json.dumps(state | {"format": written} if written else state))
    with pytest.raises(RunError, match=rf"step-000000002 has format {written!r}, and this version reads format 5"):
        Trainer(board, config, folder).resume()


def test_fault_B5_resume_with_a_change_is_refused_with_the_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = checkerboard()
    config = settings(train={"epochs": 1})
    folder = tmp_path / "run"
    api.fit(tables, CHECKERBOARD_SCHEMA, config, folder=folder)
    changed = settings(train={"epochs": 1, "lr": 0.5})
    with pytest.raises(RunError, match=r"train.lr: 0.02 then, 0.5 now.*`override=True`"):
        api.fit(tables, CHECKERBOARD_SCHEMA, changed, folder=folder, resume=True)
    fewer = (*tables[:2], tables[2].head(900))
    with pytest.raises(RunError, match="data: "):
        api.fit(fewer, CHECKERBOARD_SCHEMA, config, folder=folder, resume=True)
    longer = settings(train={"epochs": 3})
    done = api.fit(tables, CHECKERBOARD_SCHEMA, longer, folder=folder, resume=True, override=True)
    assert [h["epoch"] for h in done.history] == [1, 2, 3]
    assert "although the run has changed (train.epochs" in caplog.text
    assert "may be training rows of the epochs before" not in caplog.text


@pytest.mark.parametrize("what", ["data", "split"])
def test_rows_that_earlier_epochs_may_have_learned_and_now_test_are_told(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users, items, log = checkerboard()
    folder, sections = tmp_path / "run", dict[str, Any]()
    api.fit((users, items, log), CHECKERBOARD_SCHEMA, settings(train={"epochs": 1}), folder=folder)
    if what == "data":
        log = log.with_columns(liked=1 - pl.col("liked"))
    else:
        sections["split"] = {"seed": 5}
    longer = settings(train={"epochs": 2}, **sections)
    api.fit((users, items, log), CHECKERBOARD_SCHEMA, longer, folder=folder, resume=True, override=True)
    assert "may be training rows of the epochs before, so their metrics may be too high; start a new run" in caplog.text


def test_fault_B5_weights_are_not_taken_over_for_other_ids_and_the_best_is_measured_anew(tmp_path: Path) -> None:
    users, items, log = checkerboard()
    config, folder = settings(train={"epochs": 12, "lr": 0.05}), tmp_path / "run"
    first = api.fit((users, items, log), CHECKERBOARD_SCHEMA, config, folder=folder)
    renamed = pl.col("item_id").replace({old: 10_000 - old for old in range(30)})
    others = (users, items.with_columns(renamed), log.with_columns(renamed))
    for override in (False, True):
        with pytest.raises(RunError, match="users, items or values of the data differ .*start a new run"):
            api.fit(others, CHECKERBOARD_SCHEMA, config, folder=folder, resume=True, override=override)
    turned = (users, items, log.with_columns(liked=1 - pl.col("liked")))
    found = api.fit(turned, CHECKERBOARD_SCHEMA, config, folder=folder, resume=True, override=True)
    assert first.metrics["validation.auc"] > 0.9
    assert found.metrics["validation.auc"] == pytest.approx(1 - first.metrics["validation.auc"], abs=1e-6)
    longer = settings(train={"epochs": 24, "lr": 0.05})
    done = api.fit(turned, CHECKERBOARD_SCHEMA, longer, folder=folder, resume=True, override=True)
    assert done.metrics["train.best_epoch"] > 12, "later epochs are compared with the best as it is on the data of now"


def test_fault_B5_codes_are_those_of_the_fields_that_a_model_has(tmp_path: Path) -> None:
    users, items, log = checkerboard()
    users = users.with_columns(group=pl.col("user_id") % 2)
    items = items.with_columns(price=pl.col("item_id") * 1.5, kind=pl.col("item_id") % 2)
    features = (
        Categorical(name="group", side="user"), Categorical(name="kind", side="item"),
        Numeric(name="price", side="item", buckets=4),
    )  # fmt: skip
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": features})
    config, folder = settings(train={"epochs": 1}), tmp_path / "run"
    api.fit((users, items, log), schema, config, folder=folder)
    more = (pl.concat([users, users.head(1).with_columns(user_id=pl.lit(99, pl.Int64))]), items, log)
    api.fit(more, schema, config, folder=folder, resume=True, override=True)
    other = (users, items.with_columns(pl.col("price") * -1000), log)
    with pytest.raises(RunError, match="users, items or values of the data differ"):
        api.fit(other, schema, config, folder=folder, resume=True, override=True)


def test_another_evaluation_measures_the_best_weights_anew(board: Dataset, tmp_path: Path) -> None:
    config = settings(train={"epochs": 1})
    first = Trainer(board, config, tmp_path)
    first.checkpoints.fingerprint = runs.fingerprint(board, config)
    first.run()
    for evaluation, is_new in (({}, False), ({"max_users": 9}, True)):
        config = settings(train={"epochs": 1}, evaluation=evaluation)
        trainer = Trainer(board, config, tmp_path)
        trainer.checkpoints.fingerprint = runs.fingerprint(board, config)
        trainer.resume()
        assert trainer.checkpoints.has_changed == is_new


def test_fault_B8_no_code_of_a_checkpoint_is_ever_run() -> None:
    source = Path(runs.__file__).parent
    for path in source.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for call in ("torch.load(", "pickle.load", "import pickle", "yaml.load", 'eval("', "exec("):
            assert call not in text, f"{path.name}: {call}"


def test_fault_B9_a_folder_that_cannot_be_written_fails_before_training(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    steps: list[int] = []

    class Count(Callback):
        def on_step_end(self, done: int, total: int, loss: float) -> None:
            steps.append(done)

    with pytest.raises(RunError, match="cannot be written"):
        api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=blocked / "run", callback=Count())
    assert not steps


def test_fault_B9_a_full_disk_at_a_checkpoint_keeps_the_old_one_and_leaves_no_rubbish(
    board: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(board, settings(train={"epochs": 1, "batch_size": 100}), folder)
    epoch = trainer.objective.sampler.epoch(0)
    trainer.step(epoch, 0)
    trainer._save()

    def full(path: Path, tensors: Any) -> str:
        path.write_bytes(b"the beginning")
        raise OSError(28, "No space left on device")

    trainer.step(epoch, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(RunError, match="No space left"):
            trainer._save()
    assert [p.name for p in folder.iterdir()] == ["step-000000001"]
    trainer._save()
    assert (folder / "step-000000002").is_dir()


def test_resume_without_a_checkpoint_starts(tmp_path: Path, messages: list[str]) -> None:
    done = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "run", resume=True)
    assert len(done.history) == 2
    assert any("starting" in line for line in messages)


def test_a_finished_run_is_not_trained_over(tmp_path: Path) -> None:
    api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "run")
    before = json.loads((tmp_path / "run" / "metrics.json").read_text())
    with pytest.raises(RunError, match="holds a run already"):
        api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == before


def test_a_checkpoint_is_the_file_that_safetensors_would_write(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(5, 3),
        "a": torch.tensor(2.0),
        "n": torch.arange(7),
        "d": torch.tensor(-torch.inf, dtype=torch.float64),
        "é": torch.zeros(2, 0),
    }
    tensors |= {"i": torch.arange(6, dtype=torch.int32).view(2, 3).T}
    blocks = TensorBlocks((5, 3), (tensors["b"][i : i + 2] for i in range(0, 5, 2)))
    write_tensors(tmp_path / "t", {**tensors, "b": blocks})
    assert (tmp_path / "t").read_bytes() == save_tensors({n: t.contiguous() for n, t in tensors.items()})


class Part:
    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def state(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.tensors = state


def test_states_are_joined_and_given_back_also_of_parts_within_parts() -> None:
    one = Part(a=torch.ones(1), **{"inner/b": torch.zeros(2)})
    joined = join_states({"one": one, "two": Part(a=torch.ones(3))})
    assert joined.keys() == {"one/a", "one/inner/b", "two/a"}
    again, other = Part(), Part(a=torch.ones(9))
    load_states({"one": again, "other": other}, joined)
    assert again.tensors.keys() == {"a", "inner/b"}
    assert not other.tensors, "a part without tensors in the state is told so"
