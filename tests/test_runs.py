"""A run folder stands alone, and a damaged or mixed one is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import kill_points
import numpy as np
import polars as pl
import preloaded
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything, settings

from twotower import api, files, runs
from twotower.cli.app import run_command
from twotower.config.toml import dump_config, load_config
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError, Interrupted, RunError, TwoTowerError
from twotower.features.categorical import CategoricalEncoder
from twotower.features.encoders import Encoders
from twotower.features.sequence import Sequence
from twotower.files.readers import read_json
from twotower.legacy import training

FILES = {
    "config.toml", "metrics.json", "history.jsonl", "model.safetensors", "model.json", "encoders.json",
    "vocabularies.arrow", "users.parquet", "items.parquet", "interactions.parquet", "report.html", "checkpoints",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run") / "everything"
    senet = [{s: {"layers": [8], "senet": {"enabled": True}} for s in ("user", "item")}]
    config = settings(model={"width": 8, "pairs": senet}, negatives={"random": 1}, evaluation={"bootstrap": 20})
    api.fit(everything(), EVERYTHING_SCHEMA, config, folder=folder)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_a_run_folder_holds_what_it_promises_and_nothing_temporary(trained: Path) -> None:
    assert {p.name for p in trained.iterdir()} == FILES


def test_a_loaded_run_gives_the_same_vectors_and_metrics(copy: Path) -> None:
    loaded = runs.load(copy)
    saved = json.loads((copy / "metrics.json").read_text())
    measured = api.evaluate(loaded)
    assert {m: saved[m] for m in measured} == measured
    for key in ("test.auc", "test.gauc", "test.recall@5", "test.ndcg@5", "train.rows_per_second", "train.seconds",
                "baseline.popularity.recall@5", "baseline.bias.auc"):  # fmt: skip
        assert np.isfinite(saved[key]), key
    assert [json.loads(line)["epoch"] for line in (copy / "history.jsonl").read_text().splitlines()] == [1, 2]


def test_the_saved_config_gives_the_same_run(copy: Path, tmp_path: Path) -> None:
    schema, config = load_config(copy / "config.toml")
    assert schema == EVERYTHING_SCHEMA
    assert schema is not None
    again = api.fit(everything(), schema, config, folder=tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (copy / "model.safetensors").read_bytes()
    assert dump_config(schema, config) == (copy / "config.toml").read_text(encoding="utf-8")
    assert again.metrics["test.auc"] == runs.load(copy).metrics["test.auc"]


@pytest.mark.parametrize("name", sorted(FILES - {"checkpoints", "report.html", "metrics.json"}))
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(RunError, match=name):
        runs.load(copy)


def test_an_unfinished_run_says_how_to_finish_it(copy: Path) -> None:
    (copy / "metrics.json").unlink()
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunError, match="unfinished.*without a validated epoch.*resume=True"):
        runs.load(copy)
    with pytest.raises(RunError, match="no run"):
        runs.load(copy / "nowhere")
    (copy.parent / "store" / "bundles").mkdir(parents=True)
    with pytest.raises(RunError, match="a store of bundles, not a run"):
        runs.load(copy.parent / "store")


def test_weights_of_a_version_without_a_part_of_the_model_are_refused(copy: Path) -> None:
    path, about = copy / "model.safetensors", read_json(copy / "model.json")
    data = save_tensors({name: t for name, t in load_tensors(path.read_bytes()).items() if name != "global_bias"})
    path.write_bytes(data)
    (copy / "model.json").write_text(json.dumps(about | {"sha256": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(
        RunError, match=r"lacks global_bias, which the model of config.toml has .*; train the run again"
    ):
        runs.load(copy)


def test_a_file_of_another_run_is_refused(copy: Path, tmp_path: Path) -> None:
    api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "other")
    for name in ("model.safetensors", "encoders.json", "vocabularies.arrow", "config.toml"):
        mixed = Path(shutil.copytree(copy, tmp_path / f"mixed-{name}"))
        shutil.copy(tmp_path / "other" / name, mixed / name)
        with pytest.raises(RunError):
            runs.load(mixed)


def test_encoders_that_do_not_fit_the_weights_are_refused(copy: Path) -> None:
    schema = runs.read_config(copy)[0]
    encoders = Encoders.load(schema, copy)
    known = encoders.by_side["user"]["uid"].stored_vocabulary()
    assert known is not None
    more = known.append(pl.Series(["u999"]))
    encoders.by_side["user"]["uid"] = CategoricalEncoder(more)
    encoders.save(copy)
    with pytest.raises(RunError, match="weights do not fit"):
        runs.load(copy)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("users", lambda f: f.drop("city")),
        ("interactions", lambda f: f.with_columns(f["user"].cast(pl.String))),
        ("interactions", lambda f: f.with_columns(user=pl.lit(None))),
    ],
)
def test_a_table_of_something_else_is_one_line(copy: Path, name: str, change: object) -> None:
    path = copy / f"{name}.parquet"
    change(pl.read_parquet(path)).write_parquet(path)  # type: ignore[operator]
    with pytest.raises(RunError, match=rf"{name}.parquet: damaged"):
        runs.load(copy)


def test_the_report_is_one_offline_page_with_every_section(trained: Path) -> None:
    page = (trained / "report.html").read_text(encoding="utf-8")
    titles = "Test metrics", "Learning curves", "Scores of test pairs", "SENet gates"
    for title in (*titles, "Calibration", "Slices of the test part"):
        assert f"<h2>{title}</h2>" in page
    assert len(page.encode()) < 1_500_000
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert "<link" not in page


# ---- folders of other people


def test_a_folder_with_other_files_is_never_written_to_or_removed(copy: Path, tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    shop.mkdir()
    checkerboard()[2].write_parquet(shop / "interactions.parquet")
    (shop / "config.toml").write_text("mine = true")
    before = {p.name: p.read_bytes() for p in shop.iterdir()}
    ways: tuple[dict[str, Any], ...] = ({}, {"resume": True}, {"overwrite": True})
    for way in ways:
        with pytest.raises(RunError, match="not empty and not a run"):
            api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=shop, **way)
    assert {p.name: p.read_bytes() for p in shop.iterdir()} == before
    (copy / "notes.txt").write_text("mine")
    names = {p.name for p in copy.iterdir()}
    with pytest.raises(RunError, match=r"it holds notes\.txt"):
        api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=copy, overwrite=True)
    assert {p.name for p in copy.iterdir()} == names


def test_resuming_a_complete_run_without_checkpoints_keeps_it(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "model.safetensors").read_bytes()
    schema, config = runs.read_config(copy)
    with pytest.raises(RunError, match="complete run without a checkpoint"):
        api.fit(everything(), schema, config, folder=copy, resume=True)
    assert (copy / "model.safetensors").read_bytes() == before
    assert runs.load(copy).metrics


def test_the_fingerprint_sees_every_feature_and_time(everything_data: Dataset) -> None:
    config = settings()
    first = runs.fingerprint(everything_data, config)["data"]
    users, items, actions = everything()
    for changed in (
        (users.with_columns(pl.col("city").reverse()), items, actions),
        (users, items.with_columns(pl.col("picture").reverse()), actions),
        (users, items, actions.with_columns(pl.col("when").reverse())),
    ):
        data = build_dataset(check(*changed, EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, config.split)
        assert runs.fingerprint(data, config)["data"] != first


def test_a_run_without_a_test_part_says_so(tmp_path: Path) -> None:
    from dataclasses import replace

    done = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(train={"epochs": 1}))
    bare = replace(done, dataset=replace(done.dataset, parts=np.minimum(done.dataset.parts, 1)))
    with pytest.raises(RunError, match="no test part"):
        api.evaluate(bare)


# ---- one process writes, and what was there stays until the new is whole


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A config and its tables: 12 steps in two epochs."""
    for name, frame in zip(("users", "items", "interactions"), checkerboard(), strict=True):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    config = settings(train={"checkpoint_steps": 2})
    data = {n: f"{n}.parquet" for n in ("users", "items", "interactions")}
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    (tmp_path / "config.toml").write_text(dump_config(CHECKERBOARD_SCHEMA, config), encoding="utf-8")
    return tmp_path


def start(project: Path, until: str, *options: str) -> preloaded.Process:
    """Start a training that ends at a point."""
    command = ("train", project / "config.toml", "--run", project / "run", *options)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return preloaded.start(
        *kill_points.program(until), *command, env=environment, stdout=preloaded.PIPE, stderr=preloaded.PIPE
    )


def stopped(project: Path, *options: str) -> preloaded.Process:
    """Start a training and wait until it stands still after its fifth step."""
    process = start(project, "step:5:hang", *options)
    process.wait_stopped()
    return process


def again(project: Path, *options: str) -> int:
    arguments = ["train", str(project / "config.toml"), "--run", str(project / "run"), *options]
    return run_command(arguments)


def consistent(folder: Path) -> float:
    """The learning rate that config.toml, the checkpoints and the metrics of a run agree on."""
    loaded = runs.load(folder)
    states = [json.loads(p.read_text()) for p in (folder / "checkpoints").glob("step-*/state.json")]
    assert {s["fingerprint"]["train.lr"] for s in states} == {loaded.config.train.lr}
    measured = api.evaluate(loaded)
    assert {m: loaded.metrics[m] for m in measured} == measured
    return loaded.config.train.lr


def test_fault_G8_a_second_training_in_a_folder_is_told_the_first_and_ends(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = stopped(project)
    try:
        living = project / "run" / f".users.parquet.{first.pid}.tmp"
        living.write_bytes(b"half")
        before = {p: p.stat().st_mtime_ns for p in (project / "run").rglob("*")}
        for options in ([], ["--resume"], ["--resume", "--set", "train.lr=0.5"], ["--resume", "--override"]):
            assert again(project, *options) == 2
            error = capsys.readouterr().err
            assert f"run: another training is running (pid {first.pid} on {os.uname().nodename})" in error
            assert error.count("\n") == 1
        with pytest.raises(RunError, match=f"another training is running .pid {first.pid} on"):
            api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=project / "run", overwrite=True)
        with pytest.raises(RunError, match=f"another training is running .pid {first.pid} on"):
            training.save(api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings()), project / "run")
        assert {p: p.stat().st_mtime_ns for p in (project / "run").rglob("*")} == before
        living.unlink()
    finally:
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate()
    assert first.returncode == 0, errors
    assert consistent(project / "run") == 0.02
    assert {p.name for p in (project / "run").iterdir()} == FILES
    assert again(project, "--resume") == 0, "nobody is in the way of what comes after"


@pytest.mark.parametrize("rates", [("0.02", "0.02", "0.02"), ("0.02", "0.03", "0.04")], ids=["same", "other"])
def test_fault_G8_of_three_at_once_one_is_done(project: Path, rates: tuple[str, ...]) -> None:
    options = [["--resume", "--set", f"train.lr={rate}"] for rate in rates]
    processes = [start(project, "step:5:hang", *o) for o in options]
    for process in processes:
        process.wait_stopped(or_ended=True)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    errors = [process.communicate()[1] for process in processes]
    codes = [process.wait() for process in processes]
    assert sorted(codes) == [0, 2, 2], errors
    done = codes.index(0)
    assert consistent(project / "run") == float(rates[done])
    told = [error for error, code in zip(errors, codes, strict=True) if code]
    assert all(f"another training is running (pid {processes[done].pid} on" in error for error in told)


def test_fault_G8_a_training_that_was_killed_is_in_nobodys_way(project: Path) -> None:
    killed = stopped(project)
    killed.kill()
    killed.communicate()
    left = project / "run" / ".lock"
    assert left.read_text().split()[:2] == ["training", str(killed.pid)]
    assert again(project, "--resume") == 0
    assert consistent(project / "run") == 0.02
    assert {p.name for p in (project / "run").iterdir()} == FILES


def test_a_lock_left_in_a_copy_or_in_an_empty_folder_is_in_nobodys_way(copy: Path, tmp_path: Path) -> None:
    (copy / ".lock").write_text(f"training {os.getpid()} elsewhere -\n")
    assert api.load(copy).metrics
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").write_text("training 1 elsewhere -\n")
    api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "empty")
    assert {p.name for p in (tmp_path / "empty").iterdir()} == FILES


def replaced(folder: Path, **sections: dict[str, object]) -> runs.Run:
    return api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(**sections), folder=folder, overwrite=True)


def test_fault_G8_a_run_that_is_replaced_while_it_is_read_or_published_is_not_mixed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(folder, train={"epochs": 1})
    read, calls = runs.read_config, list[Path]()

    def overtaken(place: Path, trust: bool) -> Any:
        found = read(place, trust)
        if not calls:
            calls.append(place)
            replaced(folder, train={"epochs": 2})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(runs, "read_config", overtaken)
        loaded = runs.load(folder)
    assert (loaded.config.train.epochs, loaded.metrics["train.epochs"], len(loaded.history)) == (2, 2.0, 2)

    copyfile = shutil.copyfile

    def late(source: Path, to: Path) -> None:
        copyfile(source, to)
        if source.name == "config.toml":  # then a run of the same weights, measured otherwise
            replaced(folder, train={"epochs": 2}, evaluation={"k": [3]})

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", late)
        with pytest.raises(RunError, match="another run has replaced it; load the run again"):
            api.publish(loaded, tmp_path / "store")
    assert not list((tmp_path / "store" / "bundles").iterdir())
    api.publish(runs.load(folder), tmp_path / "store")


class Snapshots:
    """Copies of a folder as a kill would leave it, at every point of its writing."""

    def __init__(self, folder: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.to, self.taken = folder, to, list[Path]()
        rename = os.replace

        def replace(a: Any, b: Any) -> None:
            self.take()
            rename(a, b)

        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(files, "hooks", self)

    def point(self, name: str) -> None:
        if not name.startswith("step:"):
            self.take()

    def take(self) -> None:
        self.taken.append(Path(shutil.copytree(self.folder, self.to / str(len(self.taken)))))


@pytest.mark.parametrize(
    "way", [{"resume": True, "override": True}, {"overwrite": True}], ids=["override", "overwrite"]
)
def test_fault_G12_a_kill_at_any_point_leaves_the_old_run_or_the_new(
    way: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(lr: float, to: Path = folder, **more: Any) -> runs.Run:
        changed = settings(train={"epochs": 2, "lr": lr, "checkpoint_steps": 3})
        return api.fit(checkerboard(), CHECKERBOARD_SCHEMA, changed, folder=to, **more)

    def state(of: Path) -> tuple[float, str, dict[str, float]]:
        loaded = runs.load(of)
        return loaded.config.train.lr, loaded.sha256, loaded.metrics

    fit(0.02)
    if "resume" in way:  # from the middle
        shutil.rmtree(max((folder / "checkpoints").glob("step-*")))
    old = state(folder)
    with monkeypatch.context() as patch:
        snapshots = Snapshots(folder, tmp_path / "killed", patch)
        fit(0.5, **way)
    new = state(folder)
    assert new[0] == 0.5
    assert {p.name for p in folder.iterdir()} == FILES
    found = [state(snapshot) for snapshot in snapshots.taken]
    turn = found.index(new)
    assert found == [old] * turn + [new] * (len(found) - turn)
    assert turn > 20
    assert len(found) - turn > 10
    for snapshot in [*snapshots.taken[2:turn:40], *snapshots.taken[turn::20]]:  # and it goes on from there
        fit(0.5, snapshot, **way)
        assert state(snapshot)[:2] == new[:2]
        assert {p.name for p in snapshot.iterdir()} == FILES


def test_fault_G12_killed_with_override_the_complete_run_stays_and_the_new_one_goes_on(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert again(project) == 0
    before = {p.name: p.read_bytes() for p in (project / "run").iterdir() if p.is_file()}
    options = ["--resume", "--override", "--set", "train.lr=0.5", "--set", "train.epochs=4"]
    killed = start(project, "step:13", *options)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert {p.name: p.read_bytes() for p in (project / "run").iterdir() if p.name in before} == before
    assert consistent(project / "run") == 0.02
    capsys.readouterr()
    assert again(project, *options) == 0
    assert "resuming after step 12" in capsys.readouterr().out
    assert consistent(project / "run") == 0.5
    assert {p.name for p in (project / "run").iterdir()} == FILES


def test_fault_B2_a_signal_ends_the_evaluation_and_the_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(arguments)

    reached = list[object]()
    monkeypatch.setattr("twotower.api.evaluate_model", interrupted)
    with pytest.raises(
        Interrupted, match=r"in the evaluation; a checkpoint is written; go on: `fit\(.*resume=True"
    ) as stop:
        api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=folder)
    assert stop.value.exit_code == 128 + signal.SIGINT
    assert not reached
    assert not (folder / "metrics.json").exists()
    monkeypatch.undo()
    done = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=folder, resume=True)
    assert len(done.history) == 2


def test_damaged_checkpoints_are_in_no_new_ones_way(folder: Path) -> None:
    replaced(folder, train={"epochs": 3})
    (folder / "metrics.json").unlink()
    for path in (folder / "checkpoints").glob("step-*/state.json"):
        path.write_text("{")
    done = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=folder, resume=True)
    assert len(done.history) == 2
    names = {int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").iterdir()}
    assert max(names) == done.metrics["train.steps"], "and not those of the longer training before"


def test_fault_G24_what_killed_trainings_left_goes_with_the_next(
    folder: Path, tmp_path: Path, messages: list[str]
) -> None:
    replaced(folder)
    checkpoints = folder / "checkpoints"
    newest = max(checkpoints.glob("step-*"))
    os.replace(newest, checkpoints / f".{newest.name}.7.old")  # killed between two renames
    (checkpoints / ".step-000000001.7.tmp").mkdir()
    (checkpoints / ".step-000000001.7.tmp" / "tensors.safetensors").write_bytes(b"half")
    for name in (".model.safetensors.7.tmp", ".metrics.json.4194303.tmp"):
        (folder / name).write_bytes(b"half")
    (folder / ".next").mkdir()
    (folder / ".next" / ".config.toml.7.tmp").write_bytes(b"half")
    (folder / ".notes.7.tmp").write_text("of somebody else")
    api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=folder, resume=True)
    assert f"resuming after step {int(newest.name.removeprefix('step-'))}" in messages
    assert {p.name for p in folder.iterdir()} == {*FILES, ".notes.7.tmp"}
    assert not [p for p in folder.rglob(".*") if p.name != ".notes.7.tmp"]


# ---- damaged files


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on prepared data."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("streamed")
    checkerboard()[2].write_parquet(folder / "interactions.parquet")
    met = Sequence(name="met", side="user", interactions="all")
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": (*CHECKERBOARD_SCHEMA.features, met)})
    data = DataConfig(interactions=str(folder / "interactions.parquet"))
    dataset = prepare.write_prepared(data, schema, SplitConfig(kind="last"), folder / "prepared")
    api.fit(dataset, schema, settings(train={"epochs": 1}, split={"kind": "last"}), folder=folder / "run")
    return folder / "run"


def saved(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def damages(data: bytes, name: str) -> dict[str, bytes | None]:
    """A file's damaged contents; None is a folder in its place."""
    found: dict[str, bytes | None] = {
        "empty": b"", "half": data[: len(data) // 2], "random": np.random.default_rng(0).bytes(len(data)),
        "zeros": bytes(len(data)), "a folder": None,
    }  # fmt: skip
    if name.endswith((".json", ".jsonl")):
        found |= {text: text.encode() for text in ("[]", "null", "1", '"x"', "[" * 100_000, '{"a": {"b": []}}')}
        found["other types"] = re.sub(rb"(?<=: )(-?[\d.]+|\{)", b'[], "x": \\1', data)
    if name.endswith(".toml"):
        found |= {"other types": data.replace(b"= ", b"= [[]] # "), "no schema": b"", "a key": b"[train]\nepoch = 3\n"}
    if name.endswith(".npy"):
        array = np.load(io.BytesIO(data))
        found |= {
            "objects": saved(np.array([{}, None], object)), "one": saved(np.array(3)), "text": saved(array.astype(str)),
            "cubes": saved(array.reshape(1, 1, -1)),
        }  # fmt: skip
    if name.endswith(".parquet"):
        frame, file = pl.read_parquet(io.BytesIO(data)), {}
        for kind, other in (
            ("no columns", frame.select()),
            ("lists", frame.select(pl.all().implode().over(pl.lit(1)))),
        ):
            file[kind] = io.BytesIO()
            other.write_parquet(file[kind])
        found |= {kind: f.getvalue() for kind, f in file.items()}
    return found


def read_everywhere(folder: Path, name: str, out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What is said, by command, of a run with a damaged file: nothing or a line of error that names the file."""
    said = {}
    items = out / "items.parquet"
    everything()[1].write_parquet(items)
    arguments: dict[str, list[object]] = {
        "evaluate": [], "doctor": [], "compare": [folder], "embed": [items, "--out", out / "vectors"],
        "publish": ["--store", out / "store"],
    }  # fmt: skip
    for verb, more in arguments.items():
        code = run_command([verb, str(folder), *map(str, more)])
        error = capsys.readouterr().err
        assert (code == 2) is bool(error), (verb, error)
        assert error.count("\n") <= 1
        assert not error or (error.startswith("error: ") and str(folder) in error), error
        said[verb] = error
    return said


@pytest.mark.parametrize(
    "name",
    ["config.toml", "model.safetensors", "model.json", "encoders.json", "vocabularies.arrow", "users.parquet",
     "items.parquet",
     "interactions.parquet", "metrics.json", "history.jsonl"],
)  # fmt: skip
def test_fault_G18_a_damaged_file_of_a_run_is_a_line_that_names_it(
    name: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (copy / name).read_bytes()
    for number, (kind, data) in enumerate(damages(whole, name).items()):
        files.remove(copy / name)
        (copy / name).mkdir() if data is None else (copy / name).write_bytes(data)
        if number:
            with pytest.raises(
                RunError if name != "config.toml" else TwoTowerError, match=re.escape(str(copy))
            ) as error:
                runs.load(copy)
            found = {"": str(error.value)}
        else:
            found = read_everywhere(copy, name, tmp_path, capsys)
        for verb, said in found.items():
            assert name in said or "table" in said, (kind, verb, said)
        files.remove(copy / name)


@pytest.mark.parametrize(
    "name",
    ["prepared.json", "encoders.json", "vocabularies.arrow", "users.parquet",
     "items.parquet", "arrays/user.npy", "arrays/positive.npy",
     "arrays/user.1.values.npy", "arrays/user.1.offsets.npy", "arrays/item.0.npy"],
)  # fmt: skip
def test_fault_G18_a_damaged_file_of_a_prepared_run_is_a_line_that_names_it(
    name: str, streamed: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(streamed, tmp_path / "copy"))
    path = copy / "prepared" / name
    for kind, data in damages(path.read_bytes(), name).items():
        files.remove(path)
        path.mkdir() if data is None else path.write_bytes(data)
        with pytest.raises(RunError) as error:
            api.evaluate(runs.load(copy))
        assert path.name in str(error.value), (kind, error.value)


def test_fault_G26_a_run_folder_that_names_code_imports_nothing_unless_it_is_trusted(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, ran = "code_of_a_stranger", tmp_path / "ran"
    (tmp_path / f"{module}.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(
        config.replace("branches = []", f'branches = [{{ kind = "{module}:Mine" }}]', 1), encoding="utf-8"
    )
    where = f"{copy / 'config.toml'}: model.pairs.0.user.branches.0.kind: kind '{module}:Mine' is code outside twotower"
    with pytest.raises(ConfigError, match=f"^{re.escape(where)}.*pass `trust=True`$"):
        runs.load(copy)
    table, out = str(tmp_path / "items.csv"), str(tmp_path / "out")
    again = str(copy / "config.toml")
    for command in (
        ["evaluate", str(copy)], ["doctor", str(copy)], ["compare", str(copy), str(copy)],
        ["embed", str(copy), table, "--out", out], ["publish", str(copy), "--store", out],
        ["train", again, "--run", str(copy), "--resume"], ["train", again, "--run", out],
    ):  # fmt: skip
        assert run_command(command) == 2
        assert capsys.readouterr().err == f"error: {where}, and {module} is not imported; import it, or pass --trust\n"
        assert not ran.exists()
    assert run_command(["evaluate", str(copy), "--trust"]) == 2
    assert f"'{module}:Mine' is no " in capsys.readouterr().err
    assert ran.exists()
    sys.modules.pop(module)
    ran.unlink()
    (tmp_path / "own.toml").write_text((copy / "config.toml").read_text(encoding="utf-8"), encoding="utf-8")
    assert (
        run_command(["train", str(tmp_path / "own.toml"), "--run", str(copy), "--resume"]) == 2
    )  # one's own needs none
    assert f"'{module}:Mine' is no " in capsys.readouterr().err
    assert ran.exists()
    sys.modules.pop(module)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_fault_G18_damaged_checkpoints_are_passed_over_or_named(
    name: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema, config = runs.read_config(copy)
    newest, before = sorted((copy / "checkpoints").iterdir(), reverse=True)
    files.remove(before)
    whole = (newest / name).read_bytes()
    cases = damages(whole, name)
    if name == "state.json":
        state = json.loads(whole)
        for key, value in (("step", "x"), ("fingerprint", []), ("progress", {"epoch": "x"}), ("progress", {"x": 1})):
            cases[f"{key} {value}"] = json.dumps(state | {key: value}).encode()
    without_format = ('{"a": {"b": []}}', "other types")
    for kind, data in cases.items():
        wrong = (
            "has format"
            if name == "state.json" and kind in without_format
            else "state.json( is|:) damaged|a complete run without a checkpoint"
        )
        files.remove(newest / name)
        (newest / name).mkdir() if data is None else (newest / name).write_bytes(data)
        with pytest.raises(RunError, match=wrong) as error:
            api.fit(everything(), schema, config, folder=copy, resume=True)
        assert str(copy) in str(error.value), kind
    assert runs.load(copy).metrics
