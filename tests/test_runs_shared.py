"""Runs that other hosts load through a bucket."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api
from twotower.cli.app import run_command
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.data.split import SplitConfig
from twotower.engines.engine import LocalEngine
from twotower.errors import ConfigError, RunError
from twotower.files.object_stores import ObjectClient
from twotower.files.urls import Url
from twotower.runs import Run
from twotower.runs.shared import KEPT_SECONDS, RunCopy, SharedRun, run_digests


def trained(folder: Path, prepared: Path | None = None) -> Run:
    """A run of tables in memory, or of a dataset that is prepared in a folder."""
    _, items, actions = checkerboard()
    config = settings(train={"epochs": 1}, split={"kind": "last"})
    if prepared is None:
        return api.fit((None, items, actions), CHECKERBOARD_SCHEMA, config, folder=folder)
    actions.write_parquet(prepared.with_name("interactions.parquet"))
    data = DataConfig(interactions=str(prepared.with_name("interactions.parquet")))
    dataset = prepare.write_prepared(data, CHECKERBOARD_SCHEMA, SplitConfig(kind="last"), prepared)
    return api.fit(dataset, CHECKERBOARD_SCHEMA, config, folder=folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A run in a folder that a test may change."""
    assert made.folder
    shutil.copytree(made.folder, tmp_path / "run")
    return replace(made, folder=tmp_path / "run")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/twotower/runs"


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["in memory", "prepared"])
def test_a_host_without_the_folder_loads_the_run_through_the_bucket(
    kind: str, run: Run, bucket: str, tmp_path: Path
) -> None:
    if kind == "prepared":
        run = trained(tmp_path / "other", tmp_path / "prepared")
    assert run.folder
    files = content(run.folder)
    expected = api.evaluate(run)
    copy = RunCopy.of(run, f"{bucket}/runs")
    shutil.move(run.folder, tmp_path / "elsewhere")
    found = copy.load()
    assert run_digests(found) == run_digests(run)
    assert found.dataset.digest == run.dataset.digest
    assert api.evaluate(found) == expected
    assert copy.shared
    kept = content(copy.shared.copy)
    assert kept == {path: data for path, data in files.items() if path in kept}
    assert files.keys() - kept.keys() == {
        path for path in files if path == "report.html" or path.startswith("checkpoints/")
    }


def test_an_unfinished_run_has_its_checkpoints_with_it(bucket: str, tmp_path: Path) -> None:
    _, items, actions = checkerboard()
    config = settings(train={"epochs": 2, "checkpoint_steps": 1}, split={"kind": "last"})
    api.fit((None, items, actions), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run")
    for name in ("metrics.json", "model.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    unfinished = api.load(tmp_path / "run")
    assert unfinished.unfinished
    copy = RunCopy.of(unfinished, f"{bucket}/runs")
    shutil.rmtree(tmp_path / "run")
    found = copy.load()
    assert (found.unfinished, run_digests(found)) == (unfinished.unfinished, run_digests(unfinished))


def test_a_run_that_is_there_is_neither_put_nor_fetched_again(run: Run, bucket: str, cache: Path) -> None:
    url = Url.parse(f"{bucket}/runs")

    def listed() -> dict[str, float]:
        return {o.key: o.changed for o in ObjectClient(url).list(url.key)}

    copy = RunCopy.of(run, str(url))
    copy.load()
    before, fetched = listed(), {p: p.stat().st_mtime_ns for p in cache.glob("*/**/*") if p.is_file()}
    assert before
    again = RunCopy.of(run, str(url))
    again.load()
    assert again == copy
    assert listed() == before
    assert {p: p.stat().st_mtime_ns for p in cache.glob("*/**/*") if p.is_file()} == fetched


@pytest.mark.parametrize("damage", ["another byte", "cut", "gone"])
def test_a_damaged_copy_is_fetched_again_and_a_damaged_object_refused(damage: str, run: Run, bucket: str) -> None:
    shared = RunCopy.of(run, f"{bucket}/runs").shared
    assert shared
    path = shared.fetch() / "model.safetensors"
    whole = path.read_bytes()
    broken = {"another byte": whole[:-1] + bytes([whole[-1] ^ 1]), "cut": whole[:-1], "gone": b""}[damage]
    path.write_bytes(broken)
    if damage == "gone":
        path.unlink()
    shared.fetch()
    assert path.read_bytes() == whole
    path.unlink()
    client, key = ObjectClient(shared.at), (shared.at / path.name).key
    client.write(key, broken)
    with pytest.raises(
        RunError, match=rf"^{shared.at}/model.safetensors: damaged.*; remove {shared.at}, then call again"
    ):
        shared.fetch()
    assert not [p for p in shared.copy.iterdir() if p.name.endswith((".safetensors", ".tmp"))]
    client.delete([key])
    with pytest.raises(RunError, match=r"model.safetensors: no such file"):
        shared.fetch()


def test_a_run_that_is_replaced_while_it_is_put_is_refused(
    run: Run, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.folder
    upload = ObjectClient.upload

    def replacing(client: ObjectClient, key: str, path: Path) -> None:
        upload(client, key, path)
        (path.parent / "metrics.json").touch()

    monkeypatch.setattr(ObjectClient, "upload", replacing)
    with pytest.raises(RunError, match="another run has replaced it; load the run again"):
        SharedRun.put(run.folder, f"{bucket}/runs", unfinished=False)


def test_copies_that_nobody_uses_go_and_others_stay(run: Run, bucket: str, cache: Path) -> None:
    shared = RunCopy.of(run, f"{bucket}/runs").shared
    assert shared
    for name, age in (("0" * 32, KEPT_SECONDS + 60), ("1" * 32, KEPT_SECONDS - 3600)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    shared.fetch()
    assert sorted(p.name for p in cache.iterdir() if p.is_dir()) == sorted(["1" * 32, shared.at.name])


def test_a_run_without_a_folder_on_a_host_says_what_to_do(run: Run, tmp_path: Path) -> None:
    copy = RunCopy.of(run)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    with pytest.raises(
        RunError, match=r"run: is not there on .*; have the run at this path on every host, or .*`share`"
    ):
        copy.load()


@pytest.mark.parametrize("share", ["shared", "https://host/runs", "s3:runs"])
def test_a_place_that_is_no_bucket_is_refused(share: str, run: Run) -> None:
    with pytest.raises(ConfigError, match=f"`share` is '{share}', expected a prefix in an object store"):
        RunCopy.of(run, share)


@pytest.mark.parametrize("verb", ["embed", "evaluate"])
def test_an_engine_that_does_not_use_the_place_refuses_it(
    verb: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.folder
    words = [verb, str(run.folder), "--share", "s3://bucket/runs", "--engine", LocalEngine.name]
    words += [str(run.folder / "items.parquet"), "--out", str(tmp_path / "out")] if verb == "embed" else []
    assert run_command(words) == 2
    assert (
        "error: --share is 's3://bucket/runs', and engine 'local' loads the run in no other" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
