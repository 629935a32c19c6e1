"""Bulk embedding in shards: kills, restarts, damage, and what a reader gets."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import kill_points
import numpy as np
import polars as pl
import preloaded
import psutil
import pytest
import torch
from messages import collected_messages
from object_server import ObjectServer
from ray_worlds import running_ray
from version_worlds import CITY_SCHEMA, leaking_city
from wire import Wire
from worlds import checkerboard, settings

from twotower import api, files
from twotower.cli.app import run_command
from twotower.data.tables import check
from twotower.embedding.folder import EmbeddingsFolder, part_names
from twotower.embedding.shards import EmbeddingWork
from twotower.errors import ConfigError, DataError, RunError
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.files.object_stores import ObjectClient
from twotower.files.shard_folders import DiskFolder
from twotower.files.urls import Url
from twotower.runs import Run

SCHEMA = Schema(
    label="liked",
    time="at",
    time_unit="order",
    features=(
        Categorical(name="user_id", side="user"),
        Categorical(name="item_id", side="item"),
        Numeric(name="weight", side="item"),
        MultiHot(name="kinds", side="item", separator="|"),
    ),
)
SHARDS = 6  # of `table`, by 100 rows: 100, 100, 50; none; 100, 30; 37


def items(first: int, n: int, ids: Callable[[pl.Expr], pl.Expr] = lambda e: e) -> pl.DataFrame:
    rows = pl.Series("item_id", np.arange(first, first + n))
    kinds = pl.concat_str(pl.lit("k"), pl.col("item_id") % 5, pl.lit("|k"), pl.col("item_id") % 3)
    frame = pl.DataFrame(rows).with_columns(weight=(pl.col("item_id") * 0.37).sin(), kinds=kinds)
    return frame.with_columns(ids(pl.col("item_id")))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    users, _, actions = checkerboard()
    config = settings(train={"epochs": 1}, model={"width": 8})
    return api.fit(
        check(users, items(0, 30), actions, SCHEMA), SCHEMA, config, folder=tmp_path_factory.mktemp("run") / "run"
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uneven files, an empty one, a text, and files of another program that are none of the table."""
    folder = tmp_path_factory.mktemp("table")
    items(0, 250).write_parquet(folder / "a.parquet", row_group_size=64)
    items(0, 0).write_parquet(folder / "b.parquet")
    items(250, 130).write_parquet(folder / "c.parquet")
    (folder / "d.csv.gz").write_bytes(gzip.compress(items(380, 37).write_csv().encode()))
    (folder / "_SUCCESS").touch()
    (folder / ".c.parquet.crc").touch()
    return folder


@pytest.fixture(scope="module")
def whole(run: Run, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of `table`."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert api.embed(run, "item", table, out, shard_rows=100) == 417
    return out


def start(run: Run, table: Path, out: Path, fail: int | None = None) -> preloaded.Process:
    """Start a process that embeds `table`, and dies in shard `fail`."""
    assert run.folder is not None
    program = ["-m", "twotower"] if fail is None else kill_points.program(f"shard:{fail}")
    return preloaded.start(
        *program, "embed", run.folder, table, "--out", out, "--shard-rows", "100", "--threads", "1",
        stdout=preloaded.PIPE, stderr=preloaded.PIPE,
    )  # fmt: skip


def ended(process: preloaded.Process) -> tuple[int, str]:
    """Return the exit code, and what was said."""
    said = process.communicate(timeout=120)
    return process.wait(), "".join(said)


def again(run: Run, table: Path | str, out: Path, **options: Any) -> list[str]:
    with collected_messages() as lines:
        api.embed(run, "item", table, out, **{"shard_rows": 100} | options)
    return lines


def state(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every shard's files: another one for whatever is written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("*-*")}


def same(out: Path, wanted: Path) -> None:
    """The same bytes in all shards, the list, and nothing half made."""
    names = {n for i in range(SHARDS) for n in part_names(i)} | {"embedding.json", "work"}
    assert {p.name for p in out.iterdir()} == names
    assert {p.name for p in (out / "work").iterdir()} == {
        *(f"done-{i:05d}.json" for i in range(SHARDS)), "plan.json", "lock",
    }  # fmt: skip
    for name in names - {"work"}:
        assert (out / name).read_bytes() == (wanted / name).read_bytes(), name


def read(out: Path, rows: int = 65_536) -> tuple[pl.Series, np.ndarray[Any, Any]]:
    blocks = list(EmbeddingsFolder(out).blocks(rows))
    return pl.concat([ids for ids, _ in blocks]), np.concatenate([block for _, block in blocks])


# ---- what is written


def test_one_shard_has_the_vectors_that_several_have(run: Run, table: Path, whole: Path, tmp_path: Path) -> None:
    """To float rounding: a row stands in blocks of other sizes."""
    items(0, 417).write_parquet(tmp_path / "t.parquet")
    assert api.embed(run, "item", tmp_path / "t.parquet", tmp_path / "out") == 417
    ids, vectors = read(tmp_path / "out")
    found_ids, found = read(whole)
    assert found_ids.equals(ids)
    assert ids.to_list() == list(range(417))
    assert len(np.unique(vectors, axis=0)) > 400
    np.testing.assert_allclose(found, vectors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[:30], run.factors().items.numpy(), rtol=1e-5, atol=1e-6)


def test_the_command_makes_the_same_bytes(run: Run, table: Path, whole: Path, tmp_path: Path) -> None:
    code, said = ended(start(run, table, tmp_path / "out"))
    assert code == 0, said
    same(tmp_path / "out", whole)
    assert len(re.findall(r"items embedded, [\d,]+ a second, shard \d of 6", said)) == SHARDS
    assert "417 items in 6 shards have vectors" in said


def test_torchrun_is_refused(
    run: Run, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert run_command(["embed", str(run.folder), str(table), "--out", str(tmp_path / "out")]) == 2
    assert "WORLD_SIZE=2: embed is one process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("spark", "`engine` is 'spark', allowed are local, ray, ray://HOST:PORT"),
        ("local://host:1", "`engine` is 'local://host:1', allowed are local, ray, ray://HOST:PORT"),
    ],
)
def test_an_unknown_engine_is_refused(engine: str, said: str, run: Run, table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        api.embed(run, "item", table, tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists()


# ---- kills


def test_a_killed_call_is_gone_on_with(run: Run, table: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said = ended(start(run, table, out, fail=3))
    assert code == -signal.SIGKILL, said
    before = state(out)
    assert before.keys() == {n for i in range(3) for n in part_names(i)}
    assert list((out / "work").glob("twotower-shard-00003-*"))
    with pytest.raises(RunError, match=r"not all vectors are written yet \(embedding.json is missing\)"):
        EmbeddingsFolder(out)
    code, said = ended(start(run, table, out))
    assert code == 0, said
    assert len(re.findall(r", shard \d of 6", said)) == SHARDS - 3
    assert {name: s for name, s in state(out).items() if name in before} == before
    same(out, whole)


def make(out: Path, plan: dict[str, Any], number: int = 3) -> list[int]:
    """Every step of writing shards, without a tower: gives those that were made."""

    def write(i: int, folder: Path) -> dict[str, Any]:
        vectors, ids = part_names(i)
        np.save(folder / vectors, np.full((2, 3), i, np.float32))
        (folder / ids).write_bytes(bytes([i]))
        return {"rows": 2, "width": 3, "id": "Int64"}

    with EmbeddingWork.begin(DiskFolder(out), plan, False) as work:
        shards = [work.make(i, partial(write, i)) for i in range(number)]
        work.finish("dot", [shard.record for shard in shards])
    return [shard.number for shard in shards if shard.is_new]


def plan_of(**changes: Any) -> dict[str, Any]:
    plan = {"side": "item", "model": "m", "schema": "s", "precision": "fp32", "shard_rows": 2}
    return plan | {"table": [["a.parquet", 9, 1, 6]]} | changes


def kill_everywhere(folder: str, stride: int) -> None:
    made_whole, point, done = Path(folder) / "whole", 0, False
    make(made_whole, plan_of())
    while not done:
        point += stride
        out = Path(folder) / str(point)
        done, _ = kill_points.in_a_fork(partial(make, out, plan_of()), point)
        before = state(out)
        finished = {n for p in (out / "work").glob("done-*.json") for n in json.loads(p.read_text())["files"][0][:1]}
        made = make(out, plan_of())
        assert len(made) == 3 - len(finished)
        assert {n: state(out)[n] for n in finished} == {n: before[n] for n in finished}
        assert not [p for p in (*out.iterdir(), *(out / "work").iterdir()) if p.name.endswith(".tmp")]
        assert (out / "embedding.json").read_bytes() == (made_whole / "embedding.json").read_bytes()
        assert EmbeddingsFolder(out).width == 3
    print(point)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.system)])
def test_a_kill_between_any_two_steps_leaves_shards_that_are_whole_or_not_there(stride: int, tmp_path: Path) -> None:
    assert preloaded.number_told(__file__, f"kill_everywhere({str(tmp_path)!r}, {stride})") > 20


def test_a_folder_into_which_another_call_writes_is_refused(run: Run, table: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = rf"another call is running \(pid {os.getpid()} on .*\); let it end, or stop it"
    with EmbeddingWork.begin(DiskFolder(out), plan_of(), False):
        for overwrite in (False, True):
            with pytest.raises(RunError, match=said):
                again(run, table, out, overwrite=overwrite)
    again(run, table, out, overwrite=True)
    same(out, whole)


def test_a_host_that_sees_another_folder_is_refused(tmp_path: Path) -> None:
    with EmbeddingWork.begin(DiskFolder(tmp_path / "out"), plan_of(), False) as work:
        work.check_seen()
        EmbeddingWork(DiskFolder(tmp_path / "out"), plan_of()).check_seen()
        for elsewhere in (
            EmbeddingWork(DiskFolder(tmp_path / "other"), plan_of()),
            EmbeddingWork(DiskFolder(tmp_path / "out"), plan_of(side="user")),
        ):
            with pytest.raises(RunError, match="sees another folder of that name"):
                elsewhere.check_seen()


def test_a_task_of_a_killed_call_writes_nothing_into_the_folder_of_another(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(folder: Path) -> dict[str, Any]:
        with EmbeddingWork.begin(DiskFolder(out), plan_of(model="another"), True):
            folder.mkdir()  # which the other call has removed
            (folder / part_names(0)[0]).write_bytes(b"of the killed call")
            return {"rows": 1, "width": 1, "id": "Int64"}

    with EmbeddingWork.begin(DiskFolder(out), plan_of(), False) as killed:
        pass
    with pytest.raises(RunError, match="or one of another call"):
        killed.make(0, write)
    assert {p.name for p in out.rglob("*")} == {"work", "plan.json", "lock"}


# ---- engines


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with running_ray():
        yield


@pytest.mark.system  # Ray starts
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_ray_makes_the_bytes_that_this_process_makes(
    precision: str, ray: None, run: Run, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of paths that are relative, too."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(table, "table")
    lines = again(run, "table", Path("out"), engine="ray", precision=precision)
    again(run, "table", Path("local"), precision=precision)
    assert len([line for line in lines if "items embedded" in line]) == SHARDS
    same(Path("out"), Path("local"))


@pytest.mark.system
def test_fault_C18_one_engine_goes_on_where_the_other_was_killed(
    ray: None, run: Run, table: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said = ended(start(run, table, out, fail=3))
    assert code == -signal.SIGKILL, said
    before = state(out)
    assert len(before) == 2 * 3
    lines = again(run, table, out, engine="ray")
    assert len([line for line in lines if "items embedded" in line]) == SHARDS - 3
    assert {name: s for name, s in state(out).items() if name in before} == before
    same(out, whole)
    flipped(out / "part-00002.npy")
    lines = again(run, table, out, engine="ray")
    assert len([line for line in lines if "items embedded" in line]) == 1
    assert "shard 3 was damaged and is made again" in lines
    same(out, whole)
    before = state(out)
    assert again(run, table, out, engine="ray") == [f"417 items in 6 shards have vectors: {out}"]
    assert state(out) == before


@pytest.mark.system
def test_fault_C18_a_killed_call_of_ray_ends_its_processes_and_is_gone_on_with(
    run: Run, table: Path, tmp_path: Path
) -> None:
    out, again_out = tmp_path / "out", tmp_path / "whole"
    words = ["--shard-rows", "3", "--threads", "2", "--engine", "ray"]
    with preloaded.start("-m", "twotower", "embed", run.folder, table, "--out", out, *words) as call:
        until = time.monotonic() + 300
        while len(list(out.glob("work/done-*.json"))) < 3:
            assert call.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        processes = psutil.Process(call.pid).children(recursive=True)
        call.kill()
    assert call.returncode == -signal.SIGKILL
    assert processes
    assert not psutil.wait_procs(processes, timeout=120)[1]
    before, finished = state(out), len(list(out.glob("work/done-*.json")))
    recorded = {p.stem.removeprefix("done-") for p in out.glob("work/done-*.json")}
    before = {name: s for name, s in before.items() if re.findall(r"-(\d+)", name)[0] in recorded}
    lines = again(run, table, out, shard_rows=3)
    again(run, table, again_out, shard_rows=3)
    shards = len(list(again_out.glob("work/done-*.json")))
    assert 3 <= finished < shards
    assert len([line for line in lines if "items embedded" in line]) == shards - finished
    assert {name: s for name, s in state(out).items() if name in before} == before
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == {
        p.name: p.read_bytes() for p in again_out.iterdir() if p.is_file()
    }


@pytest.mark.system
def test_errors_of_a_process_of_ray_are_those_of_this_one(
    ray: None, run: Run, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(table, tmp_path / "table")
    items(0, 9).with_columns(item_id=pl.Series([*range(8), None])).write_parquet(tmp_path / "table" / "c.parquet")
    said = []
    for engine in ("local", "ray"):
        words = ["embed", run.folder, tmp_path / "table", "--out", tmp_path / engine, "--shard-rows", "100"]
        assert run_command([*map(str, words), "--engine", engine, "--threads", "2"]) == 2
        said.append(capsys.readouterr().err)
        assert not (tmp_path / engine / "embedding.json").exists()
    assert said[0].startswith("error: ")
    assert said[0].count("\n") == 1
    assert said[0] == said[1]


def test_a_run_without_a_folder_is_refused_before_anything_is_written(run: Run, table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the run has no folder from which other processes load it"):
        again(Run(None, run.config, run.dataset, run.model, {}, []), table, tmp_path / "out", engine="ray", threads=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.system
def test_a_run_that_changed_is_refused(ray: None, run: Run, table: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds another model than when the call began"):
        again(replace(run, sha256="0" * 64), table, tmp_path / "other", engine="ray")


# ---- what changes between two calls


def test_a_second_call_makes_nothing(run: Run, table: Path, whole: Path) -> None:
    before = state(whole)
    assert again(run, table, whole) == [f"417 items in 6 shards have vectors: {whole}"]
    assert state(whole) == before


def other_rows(table: Path) -> None:
    items(250, 131).write_parquet(table / "c.parquet")


def touched(table: Path) -> None:
    os.utime(table / "a.parquet", ns=(1, 1))


OTHER_TABLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "rows": (other_rows, r"of another table \(c.parquet has changed\)"),
    "time": (touched, r"of another table \(a.parquet has changed\)"),
    "gone": (lambda t: (t / "b.parquet").unlink(), r"of another table \(b.parquet is missing\)"),
    "new": (lambda t: items(0, 2).write_parquet(t / "e.parquet"), r"of another table \(e.parquet is new\)"),
}


@pytest.mark.parametrize("name", OTHER_TABLES)
def test_another_table_is_refused_until_asked_for(
    name: str, run: Run, table: Path, whole: Path, tmp_path: Path
) -> None:
    change, message = OTHER_TABLES[name]
    shutil.copytree(table, tmp_path / "table")
    out = tmp_path / "out"
    again(run, tmp_path / "table", out)
    before = state(out)
    change(tmp_path / "table")
    with pytest.raises(RunError, match=message + "; choose another folder, or start over with `overwrite=True`") as e:
        again(run, tmp_path / "table", out)
    assert "\n" not in str(e.value)
    assert state(out) == before
    again(run, tmp_path / "table", out, overwrite=True)
    again(run, tmp_path / "table", tmp_path / "fresh")
    ids, vectors = read(out)
    fresh_ids, fresh = read(tmp_path / "fresh")
    assert ids.equals(fresh_ids)
    assert np.array_equal(vectors, fresh)


def test_another_model_side_schema_precision_or_cut_is_refused(run: Run, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    again(run, table, out)
    before = state(out)
    other = Run(None, run.config, run.dataset, run.model, {}, [])
    schema = replace(run.dataset, schema=SCHEMA.model_copy(update={"positive_above": 0.5}))
    users = pl.DataFrame({"user_id": range(300)})
    users.write_parquet(tmp_path / "users.parquet")
    for given, options, message in (
        (other, {}, "its vectors are of another model"),
        (replace(run, dataset=schema), {}, "its vectors are of another schema"),
        (run, {"precision": "fp16"}, r"its vectors are of another `precision` \(fp32 then, fp16 now\)"),
        (run, {"shard_rows": 90}, r"of another `shard_rows` \(100 then, 90 now\)"),
    ):
        with pytest.raises(RunError, match=message):
            again(given, table, out, **options)
    with pytest.raises(RunError, match=r"of another `side` \(item then, user now\)"):
        api.embed(run, "user", tmp_path / "users.parquet", out, shard_rows=100)
    assert state(out) == before
    api.embed(run, "user", tmp_path / "users.parquet", out, overwrite=True)
    assert {p.name for p in out.iterdir()} == {*part_names(0), "embedding.json", "work"}
    assert EmbeddingsFolder(out).about["side"] == "user"


def test_vectors_of_items_that_lack_what_a_bundle_knows_of_their_rows_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users, _, actions = checkerboard()
    config = settings(
        train={"epochs": 1, "monitor": "validation.recall@5"}, model={"recent_popularity": True}, evaluation={"k": [5]},
        loss={"kind": "softmax"}, negatives={"uniform": 5},
    )  # fmt: skip
    run = api.fit((users, items(0, 30), actions), SCHEMA, config, folder=tmp_path / "run")
    items(0, 30).write_parquet(tmp_path / "items.parquet")
    for weight, told in ((0.0, False), (1.0, True)):
        caplog.clear()
        with torch.no_grad():
            run.model.recent_popularity.numbers.zero_()
            run.model.recent_popularity.numbers[:2] = torch.tensor([1.0, weight])
        with caplog.at_level("WARNING", "twotower"):
            api.embed(run, "item", tmp_path / "items.parquet", tmp_path / f"out{weight}")
        assert ("the model ranks by what is popular lately" in caplog.text) == told


def test_a_plan_without_a_finished_shard_gives_way_to_another(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    table, out, other = tmp_path / "t.parquet", tmp_path / "out", Run(None, run.config, run.dataset, run.model, {}, [])
    items(0, 150).with_columns(item_id=pl.Series([None, *range(149)])).write_parquet(table)
    with pytest.raises(DataError, match="1 missing ids"):
        again(run, table, out)
    items(0, 150).with_columns(item_id=pl.Series([*range(149), None])).write_parquet(table)
    with monkeypatch.context() as patched:
        patched.setattr(files, "hooks", kill_points.At("shard.file", stop))
        with pytest.raises(KeyboardInterrupt):
            again(run, table, out)
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == ["lock", "plan.json"]
    with pytest.raises(DataError, match="1 missing ids"):
        again(other, table, out)
    assert state(out).keys() == {*part_names(0)}
    with pytest.raises(RunError, match="of another model"):
        again(run, table, out)
    items(0, 150).write_parquet(table)
    with pytest.raises(RunError, match="of another table"):
        again(other, table, out)


def test_an_empty_table_leaves_the_vectors_of_another_as_they_are(run: Run, tmp_path: Path) -> None:
    table, out = tmp_path / "t.parquet", tmp_path / "out"
    items(0, 50).write_parquet(table)
    again(run, table, out)
    before = state(out)
    items(0, 0).write_parquet(table)
    with pytest.raises(DataError, match="the table has no rows"):
        again(run, table, out, overwrite=True)
    assert state(out) == before


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of a vector": lambda out: flipped(out / "part-00002.npy"),
    "cut short": lambda out: os.truncate(out / "ids-00002.parquet", 10),
    "gone": lambda out: (out / "part-00002.npy").unlink(),
    "a record": lambda out: (out / "work" / "done-00002.json").write_text("{"),
    "a record of something else": lambda out: (out / "work" / "done-00002.json").write_text('{"rows": 1}'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shard_is_made_again_and_no_other(
    name: str, run: Run, table: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = state(out)
    DAMAGE[name](out)
    lines = again(run, table, out)
    assert len([line for line in lines if "items embedded" in line]) == 1
    assert any("shard 3 was damaged" in line for line in lines) != name.startswith("a record")
    same(out, whole)
    assert {n for n, s in state(out).items() if s != before[n]} == {*part_names(2)}


# ---- tables


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ((pl.Int64, pl.String), pl.String),
        ((pl.UInt64, pl.Int64), pl.UInt64),
        ((pl.Int64, pl.UInt64, pl.String), pl.String),
    ],
)
def test_an_id_that_is_no_integer_makes_all_ids_text(
    kinds: tuple[Any, ...], wanted: Any, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    values: list[Any] = []
    for i, kind in enumerate(kinds):
        ids = [
            f"x{n}" if kind == pl.String else n + (2**63 if kind == pl.UInt64 else 0) for n in range(10 * i, 10 * i + 7)
        ]
        values += ids
        frame = items(0, 7).with_columns(item_id=pl.Series(ids, dtype=kind))
        frame.write_parquet(tmp_path / "t" / f"{i}.parquet")
    out = tmp_path / "out"
    again(run, tmp_path / "t", out, shard_rows=4)
    found, _ = read(out)
    assert found.dtype == wanted
    assert found.to_list() == ([str(v) for v in values] if wanted == pl.String else values)
    for path in out.glob("ids-*"):
        assert pl.read_parquet_schema(path) == {"id": wanted}
    before = state(out)
    assert len(again(run, tmp_path / "t", out, shard_rows=4)) == 1
    assert state(out) == before


def test_ids_that_no_type_of_integers_holds_are_a_data_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for name, ids in (("a", pl.Series([-1, 2])), ("b", pl.Series([3, 2**63], dtype=pl.UInt64))):
        items(0, 2).with_columns(item_id=ids).write_parquet(tmp_path / "t" / f"{name}.parquet")
    with pytest.raises(DataError, match="some ids are negative and some are from"):
        again(run, tmp_path / "t", tmp_path / "out")


def test_numbers_with_a_decimal_comma_give_the_vectors_of_those_with_a_point(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.folder is not None
    items(0, 40).write_csv(tmp_path / "points.csv", separator=";")
    items(0, 40).write_csv(tmp_path / "commas.csv", separator=";", decimal_comma=True)
    again(run, tmp_path / "points.csv", tmp_path / "points", separator=";")
    words = [
        "embed",
        str(run.folder),
        str(tmp_path / "commas.csv"),
        "--out",
        str(tmp_path / "commas"),
        "--threads",
        "1",
    ]
    assert run_command([*words, "--separator", ";", "--decimal", ","]) == 0
    for name in part_names(0):
        assert (tmp_path / "commas" / name).read_bytes() == (tmp_path / "points" / name).read_bytes()
    assert run_command([*words, "--separator", ";"]) == 2, "a comma is no part of a number unless it is said"
    assert run_command([*words, "--decimal", ","]) == 2
    assert "--decimal is ',', which reads files whose values no comma separates" in capsys.readouterr().err
    assert run_command([*words, "--decimal", "'"]) == 2
    items(0, 4).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="`decimal` tells how text files are read, and the table is Parquet; leave it"):
        again(run, tmp_path / "a.parquet", tmp_path / "out", decimal=",")


def test_shards_of_numbers_with_another_decimal_mark_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for name in ("a", "b"):
        items(0, 4).with_columns(weight=pl.lit(2)).write_csv(tmp_path / "t" / f"{name}.csv", separator=";")
    again(run, tmp_path / "t", tmp_path / "out", separator=";")
    with pytest.raises(
        RunError, match="of another `separator`, `decimal`, `columns` ..';'. then, .'decimal comma', ';'. now"
    ):
        again(run, tmp_path / "t", tmp_path / "out", separator=";", decimal=",")


@pytest.mark.parametrize(("name", "shards"), [("c.parquet", 4), ("a.parquet", SHARDS)])
def test_fault_C12_a_table_that_changes_while_it_is_embedded_ends_the_job(
    name: str, shards: int, run: Run, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file changes while its second shard is made, or after its last one was."""
    copy, out = Path(shutil.copytree(table, tmp_path / "table")), tmp_path / "out"
    monkeypatch.setattr(files, "hooks", kill_points.At("shard:4", lambda: os.utime(copy / name, ns=(1, 1))))
    with pytest.raises(
        DataError,
        match=rf"{name}: was changed while it was read; when it is complete, call again with `overwrite=True`",
    ):
        again(run, copy, out)
    assert len(list(out.glob("part-*"))) == shards
    assert not (out / "embedding.json").exists()
    with pytest.raises(RunError, match=rf"of another table \({name} has changed\).*`overwrite=True`"):
        again(run, copy, out)


def test_files_are_named_one_by_one_by_a_folder_or_by_a_pattern(
    run: Run, table: Path, whole: Path, tmp_path: Path
) -> None:
    again(run, f"{table}/[a-d].*", tmp_path / "out")
    same(tmp_path / "out", whole)
    shutil.copytree(table, tmp_path / "deep" / "one")
    again(run, str(tmp_path / "deep" / "*" / "*.parquet"), tmp_path / "three")
    assert len(EmbeddingsFolder(tmp_path / "three")) == 380
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.md").touch()
    for source, message in (
        (tmp_path / "empty", "no file found"),
        (f"{tmp_path}/*.nothing", "no file found"),
        (tmp_path / "deep", r"found the folder one in it; name all files, as in '.*/deep/\*/\*.parquet'"),
        (tmp_path / "odd", "found a '.md' file"),
        (tmp_path / "gone", "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            again(run, source, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_table_without_rows_is_an_error_and_a_text_without_rows_is_not(run: Run, table: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for name in "ab":
        items(0, 0).write_csv(tmp_path / "t" / f"{name}.csv")
    for _ in range(2):
        with pytest.raises(DataError, match="the table has no rows"):
            again(run, tmp_path / "t", tmp_path / "none")
    items(0, 0).write_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match="the table has no rows"):
        again(run, tmp_path / "e.parquet", tmp_path / "none")
    items(0, 5).write_csv(tmp_path / "t" / "c.csv")
    again(run, tmp_path / "t", tmp_path / "out")
    assert len(again(run, tmp_path / "t", tmp_path / "out")) == 1
    assert read(tmp_path / "out")[0].to_list() == list(range(5))


def test_a_column_that_one_file_lacks_is_said_before_anything_is_made(run: Run, table: Path, tmp_path: Path) -> None:
    shutil.copytree(table, tmp_path / "t")
    items(0, 9).drop("kinds").write_parquet(tmp_path / "t" / "z.parquet")
    with pytest.raises(DataError, match="no column 'kinds'"):
        again(run, tmp_path / "t", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_stays_as_it_is(run: Run, table: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"not a folder of vectors \(it holds letter.txt\)"):
            again(run, table, tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("out", "said"), [("t/out", "the next call would read it as items"), ("t", "lies in the table")]
)
def test_a_folder_within_the_table_is_refused_at_once(
    run: Run, table: Path, tmp_path: Path, out: str, said: str
) -> None:
    shutil.copytree(table, tmp_path / "t")
    before = sorted((tmp_path / "t").rglob("*"))
    with pytest.raises(RunError, match=said):
        again(run, tmp_path / "t", tmp_path / out, overwrite=True)
    assert sorted((tmp_path / "t").rglob("*")) == before


# ---- a bucket


def copy_of(url: str, to: Path) -> Path:
    """Copy the objects below a URL to a folder, as `aws s3 cp --recursive` does."""
    at = Url.parse(url)
    client = ObjectClient(at)
    for found in client.list(at.key):
        path = to / found.key.removeprefix(f"{at.key}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.read(found.key, 10**9).data)
    return to


def test_a_bucket_holds_the_files_of_a_disk(run: Run, table: Path, whole: Path, bucket: str, tmp_path: Path) -> None:
    assert run.folder is not None
    words = ["embed", str(run.folder), str(table), "--out", f"{bucket}/out", "--shard-rows", "100", "--threads", "1"]
    assert run_command(words) == 0
    found = copy_of(f"{bucket}/out", tmp_path / "found")
    for name in {p.name for p in whole.iterdir()} - {"work"}:
        assert (found / name).read_bytes() == (whole / name).read_bytes(), name
    assert len(EmbeddingsFolder(found)) == 417
    ObjectClient(Url.parse(bucket)).delete(["out/ids-00002.parquet"])
    lines = again(run, table, Path(f"{bucket}/out"))
    assert [line for line in lines if "was damaged" in line] == ["shard 3 was damaged and is made again"]
    assert len([line for line in lines if "items embedded" in line]) == 1
    assert lines[-1].endswith(f"have vectors: {bucket}/out")
    again_found = copy_of(f"{bucket}/out", tmp_path / "again")
    assert (again_found / "embedding.json").read_bytes() == (whole / "embedding.json").read_bytes()
    with pytest.raises(RunError, match=r"of another `shard_rows` \(100 then, 90 now\)"):
        again(run, table, Path(f"{bucket}/out"), shard_rows=90)
    with pytest.raises(ConfigError, match=r"an address, and vectors are read from a disk; copy its files"):
        EmbeddingsFolder(f"{bucket}/out")


@pytest.mark.system  # the link takes seconds
def test_a_bucket_behind_a_slow_link_holds_the_same_files(
    run: Run, table: Path, whole: Path, bucket: str, s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece of 8 kB comes 20 ms later, at 300 kB a second; table and vectors are in the bucket."""
    for path in table.iterdir():
        ObjectClient(Url.parse(bucket)).write(f"items/{path.name}", path.read_bytes())
    wire = Wire(int(s3.address.rpartition(":")[2]), delay=0.02, rate=300_000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.uri)
    again(run, f"{bucket}/items", Path(f"{bucket}/out"))
    assert wire.passed > sum(path.stat().st_size for path in whole.glob("part-*"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.address)
    wire.close()
    found = copy_of(f"{bucket}/out", tmp_path / "found")
    for name in {p.name for p in whole.iterdir()} - {"work", "embedding.json"}:
        assert (found / name).read_bytes() == (whole / name).read_bytes(), name


def test_ids_of_a_bucket_get_one_type(run: Run, bucket: str, tmp_path: Path) -> None:
    """One shard has whole numbers, the other text."""
    (tmp_path / "t").mkdir()
    items(0, 5).write_parquet(tmp_path / "t" / "a.parquet")
    again(run, tmp_path / "t", Path(f"{bucket}/one"))
    assert EmbeddingsFolder(copy_of(f"{bucket}/one", tmp_path / "one")).about["id"] == "Int64"
    items(0, 2, lambda e: pl.format("x{}", e).alias("item_id")).write_parquet(tmp_path / "t" / "b.parquet")
    again(run, tmp_path / "t", Path(f"{bucket}/out"))
    ids, _ = read(copy_of(f"{bucket}/out", tmp_path / "found"))
    assert ids.to_list() == ["0", "1", "2", "3", "4", "x0", "x1"]


@pytest.mark.parametrize(
    ("source", "out", "said"),
    [
        ("t", "t/out", "the next call would read it as items"),
        ("t/**/*.parquet", "t/x/out", "lies in the table"),
        ("t/a.parquet", "t", "holds the file a.parquet of the table"),
    ],
)
def test_a_folder_within_the_table_of_a_bucket_or_around_it_is_refused(
    source: str, out: str, said: str, run: Run, bucket: str
) -> None:
    rows = BytesIO()
    items(0, 5).write_parquet(rows)
    ObjectClient(Url.parse(bucket)).write("t/a.parquet", rows.getvalue())
    with pytest.raises(RunError, match=said):
        again(run, f"{bucket}/{source}", Path(f"{bucket}/{out}"))
    assert len(ObjectClient(Url.parse(bucket)).list("")) == 1
    again(run, f"{bucket}/{source}", Path(f"{bucket}/out"))


# ---- half precision, the reader, memory


def test_half_precision_takes_half_the_disk(run: Run, table: Path, whole: Path, tmp_path: Path) -> None:
    again(run, table, tmp_path / "out", precision="fp16")
    half, full = EmbeddingsFolder(tmp_path / "out"), EmbeddingsFolder(whole)
    assert half.dtype == np.float16
    assert full.dtype == np.float32
    np.testing.assert_allclose(read(tmp_path / "out")[1], read(whole)[1], rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="allowed are fp32, fp16"):
        again(run, table, tmp_path / "out", precision="fp8")
    with pytest.raises(ConfigError, match="expected at least 1"):
        again(run, table, tmp_path / "out", shard_rows=0)
    large = api.load(run.folder)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in large.model.parameters():
            parameter.mul_(1e3)
    with pytest.raises(RunError, match="a number above 65,504, which fp16 does not reach; use fp32"):
        again(large, table, tmp_path / "large", precision="fp16")
    assert not list((tmp_path / "large").glob("*-*"))


@pytest.mark.parametrize("rows", [1, 7, 100, 1000])
def test_vectors_come_in_blocks_mapped_and_in_the_order_of_the_table(rows: int, whole: Path) -> None:
    vectors = EmbeddingsFolder(whole)
    sizes = [(len(ids), len(block)) for ids, block in vectors.blocks(rows)]
    assert all(a == b <= rows for a, b in sizes)
    assert sum(a for a, _ in sizes) == len(vectors) == 417
    ids, found = read(whole, rows)
    assert ids.to_list() == list(range(417))
    assert found.shape == (417, vectors.width)
    assert (vectors.about["side"], vectors.about["metric"]) == ("item", "dot")
    block = next(vectors.blocks())[1]
    assert not block.flags.writeable
    assert isinstance(block, np.memmap)


def test_what_is_no_folder_of_whole_vectors_is_a_run_error(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no vectors"):
        EmbeddingsFolder(tmp_path)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "work")
    assert len(EmbeddingsFolder(out)) == 417
    np.save(out / "part-00001.npy", np.zeros((3, 9), np.float32))
    with pytest.raises(RunError, match=r"part-00001.npy: holds \(3, 9\), expected 100 rows"):
        list(EmbeddingsFolder(out).blocks())
    shutil.copy(whole / "part-00001.npy", out)
    (out / "ids-00002.parquet").unlink()
    with pytest.raises(RunError, match="ids-00002.parquet: missing or damaged"):
        list(EmbeddingsFolder(out).blocks())
    shutil.copy(whole / "ids-00001.parquet", out / "ids-00002.parquet")
    seen = list[int]()
    with pytest.raises(RunError, match="ids-00002.parquet: holds 100 ids, expected 50"):
        seen.extend(len(ids) for ids, _ in EmbeddingsFolder(out).blocks())
    assert seen == [100, 100], "nothing of the damaged shard"
    (out / "part-00000.npy").write_bytes(b"x")
    with pytest.raises(RunError, match="part-00000.npy: missing or damaged"):
        EmbeddingsFolder(out)
    (out / "embedding.json").write_text('{"format": 1}')
    with pytest.raises(RunError, match="embedding.json: damaged"):
        EmbeddingsFolder(out)
    (out / "embedding.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="not a list of shards that this version reads"):
        EmbeddingsFolder(out)
    shutil.copy(whole / "embedding.json", out)
    for data in (b"", b"x", (whole / "part-00000.npy").read_bytes()[:90]):
        (out / "part-00000.npy").write_bytes(data)
        with pytest.raises(RunError, match="part-00000.npy: missing or damaged"):
            EmbeddingsFolder(out)
    np.save(out / "part-00000.npy", np.float32(1))
    with pytest.raises(RunError, match=r"part-00000.npy: holds \(\), expected 100 rows of vectors"):
        EmbeddingsFolder(out)


def test_shards_without_a_plan_are_not_replaced(run: Run, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "work")
    items(0, 30).write_parquet(tmp_path / "few.parquet")
    with pytest.raises(RunError, match=r"holds other vectors \(embedding.json\); choose another folder, or"):
        api.embed(run, "item", tmp_path / "few.parquet", out)
    assert len(EmbeddingsFolder(out)) == 417


@pytest.mark.system
def test_memory_does_not_grow_with_the_table(run: Run, tmp_path: Path) -> None:
    """The vectors and their ids alone are 72 MB."""
    items(0, 70_000).write_parquet(tmp_path / "few.parquet")
    pl.concat([items(i * 100_000, 100_000) for i in range(15)]).write_parquet(
        tmp_path / "many.parquet", row_group_size=50_000
    )
    code = f"""
import pathlib, re, torch
from twotower import api
torch.set_num_threads(1)
run = api.load({str(run.folder)!r})
for name in ("few", "many"):
    api.embed(run, "item", f"{tmp_path}/{{name}}.parquet", f"{tmp_path}/{{name}}", 16_384, shard_rows=65_536)
    print(re.search("VmHWM: +(.*) kB", pathlib.Path("/proc/self/status").read_text().replace("\t", " "))[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"POLARS_MAX_THREADS": "1"},
    )
    few, many = map(int, done.stdout.split())
    assert many - few < 40_000


def test_rows_of_versions_are_told_since_each_gets_a_vector(tmp_path: Path) -> None:
    users, items, actions = leaking_city(n_users=12)
    config = settings(train={"epochs": 1}, model={"width": 4})
    run = api.fit(check(users, items, actions, CITY_SCHEMA), CITY_SCHEMA, config)
    users.write_parquet(tmp_path / "users.parquet")
    items.write_parquet(tmp_path / "items.parquet")
    with collected_messages() as lines:
        assert api.embed(run, "user", tmp_path / "users.parquet", tmp_path / "user_vectors") == 24
        assert any("'since' tells versions of an id, and each row gets a vector" in line for line in lines)
        lines.clear()
        api.embed(run, "item", tmp_path / "items.parquet", tmp_path / "item_vectors")
        assert not any("each row gets" in line for line in lines)
