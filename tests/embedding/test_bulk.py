"""Bulk embedding in shards: kills, restarts, damage, and what a reader gets."""

from __future__ import annotations

import gzip
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import duckdb
import kill_points
import numpy as np
import polars as pl
import preloaded
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from messages import collected_messages
from object_server import ObjectServer
from ray_worlds import running_ray
from version_worlds import CITY_SCHEMA, leaking_city
from waves import trending
from wire import Wire
from worlds import checkerboard, settings

from twotower import api, files
from twotower.cli import training
from twotower.cli.app import run_command
from twotower.data.tables import check
from twotower.embedding.folder import LIST_FILE, EmbeddingsFolder
from twotower.errors import ConfigError, DataError, RunError
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.files.object_stores import ObjectClient
from twotower.files.sharded_result import ShardedResult
from twotower.files.urls import Url
from twotower.retrieval.retriever import Retriever
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
SHARDS = 6  # of `table`, by 100 rows: 100, 100, 50; 100, 30; 37


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
    """Inode and time of change of every shard's file: another one for whatever is written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(out.glob("part-*"))}


def shard(out: Path, number: int) -> Path:
    """The file of a shard."""
    (found,) = out.glob(f"part-{number:05d}-*.parquet")
    return found


def same(out: Path, wanted: Path) -> None:
    """The same bytes in all shards, the list, and nothing half made."""
    names = {p.name for p in wanted.iterdir()}
    assert len(names) == SHARDS + 3
    assert {p.name for p in out.iterdir()} == names
    for name in names:
        assert (out / name).read_bytes() == (wanted / name).read_bytes(), name


def read(out: Path | str, rows: int = 65_536) -> tuple[pl.Series, np.ndarray[Any, Any]]:
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
    assert len(re.findall(r"items embedded, .* a second.*, shard \d of 6", said)) == SHARDS
    assert "417 items in 6 shards have vectors" in said


def test_the_command_has_the_defaults_of_the_function() -> None:
    by_function, by_command = (inspect.signature(call).parameters for call in (api.embed, training.embed))
    for name in by_function.keys() & by_command.keys() - {"run", "side", "out", "columns"}:
        assert by_function[name].default == by_command[name].default, name


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
    assert [name[:10] for name in before] == [f"part-{i:05d}" for i in range(3)]
    with pytest.raises(RunError, match=r"_embedding.json is missing, or of another version"):
        EmbeddingsFolder(out)
    code, said = ended(start(run, table, out))
    assert code == 0, said
    assert len(re.findall(r", shard \d of 6", said)) == SHARDS - 3
    assert {name: s for name, s in state(out).items() if name in before} == before
    same(out, whole)


def result(out: Path, **changes: Any) -> ShardedResult:
    plan = {"format": 2, "side": "item", "model": "m", "shard_rows": 2, "table (a.parquet)": [9, 1, 6]}
    return ShardedResult(out, "vectors", LIST_FILE, plan | changes)


def test_a_folder_into_which_another_call_writes_is_refused(run: Run, table: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = rf"another call is running \(pid {os.getpid()} on .*\); let it end, or stop it"
    with result(out).writing(overwrite=False):
        for overwrite in (False, True):
            with pytest.raises(RunError, match=said):
                again(run, table, out, overwrite=overwrite)
    again(run, table, out, overwrite=True)
    same(out, whole)


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
    assert len(before) == 3
    lines = again(run, table, out, engine="ray")
    assert len([line for line in lines if "items embedded" in line]) == SHARDS - 3
    assert {name: s for name, s in state(out).items() if name in before} == before
    same(out, whole)
    flipped(shard(out, 2))
    lines = again(run, table, out, engine="ray")
    assert len([line for line in lines if "items embedded" in line]) == 1
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
        while len(state(out)) < 3:
            assert call.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        processes = psutil.Process(call.pid).children(recursive=True)
        call.kill()
    assert call.returncode == -signal.SIGKILL
    assert processes
    assert not psutil.wait_procs(processes, timeout=120)[1]
    before = state(out)
    lines = again(run, table, out, shard_rows=3)
    again(run, table, again_out, shard_rows=3)
    shards = len(state(again_out))
    assert 3 <= len(before) < shards
    assert len([line for line in lines if "items embedded" in line]) == shards - len(before)
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
        assert not (tmp_path / engine / LIST_FILE).exists()
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
    "rows": (other_rows, r"of another `table \(c.parquet\)` \(\[.*, 130\] then, \[.*, 131\] now\)"),
    "time": (touched, r"of another `table \(a.parquet\)` \(\[.*, 250\] then, \[.*, 1, 250\] now\)"),
    "gone": (lambda t: (t / "b.parquet").unlink(), r"of another `table \(b.parquet\)` \(\[.*, 0\] then, none now\)"),
    "new": (
        lambda t: items(0, 2).write_parquet(t / "e.parquet"),
        r"of another `table \(e.parquet\)` \(none then, \[.*, 2\] now\)",
    ),
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
        (other, {}, "its vectors are of another `model`"),
        (replace(run, dataset=schema), {}, "its vectors are of another `schema`"),
        (run, {"precision": "fp16"}, r"its vectors are of another `precision` \(fp32 then, fp16 now\)"),
        (run, {"shard_rows": 90}, r"of another `shard_rows` \(100 then, 90 now\)"),
    ):
        with pytest.raises(RunError, match=message):
            again(given, table, out, **options)
    with pytest.raises(RunError, match=r"of another `side` \(item then, user now\)"):
        api.embed(run, "user", tmp_path / "users.parquet", out, shard_rows=100)
    assert state(out) == before
    api.embed(run, "user", tmp_path / "users.parquet", out, overwrite=True)
    assert {p.name for p in out.iterdir()} == {shard(out, 0).name, "_embedding.json", "_lock", "_plan_embedding.json"}
    assert EmbeddingsFolder(out).about["side"] == "user"


def test_vectors_of_items_that_lack_what_a_bundle_knows_of_their_rows_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users, _, actions = checkerboard()
    config = settings(
        train={"epochs": 1, "monitor": "validation.recall@5"}, scorers=["trending"], evaluation={"k": [5]},
        loss={"kind": "softmax"}, negatives={"uniform": 5},
    )  # fmt: skip
    run = api.fit((users, items(0, 30), actions), SCHEMA, config, folder=tmp_path / "run")
    items(0, 30).write_parquet(tmp_path / "items.parquet")
    for weight, told in ((0.0, False), (1.0, True)):
        caplog.clear()
        with torch.no_grad():
            trending(run.model).numbers.zero_()
            trending(run.model).numbers[:2] = torch.tensor([1.0, weight])
        with caplog.at_level("WARNING", "twotower"):
            api.embed(run, "item", tmp_path / "items.parquet", tmp_path / f"out{weight}")
        assert ("the model ranks by recent popularity" in caplog.text) == told


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
        patched.setattr(files, "hooks", kill_points.At("shard.made", stop))
        with pytest.raises(KeyboardInterrupt):
            again(run, table, out)
    assert sorted(p.name for p in out.iterdir()) == ["_lock", "_plan_embedding.json"]
    with pytest.raises(DataError, match="1 missing ids"):
        again(other, table, out)
    assert [*state(out)] == [shard(out, 0).name]
    with pytest.raises(RunError, match="of another `model`"):
        again(run, table, out)
    items(0, 150).write_parquet(table)
    with pytest.raises(RunError, match="of another `table"):
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


# ---- tables


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (
            pl.Series(["7", "x8"]),
            r"column 'item_id' holds 'x8', and the ids of the training are Int64; give ids of this type",
        ),
        (pl.Series(["7", "08"]), "holds '08', and the ids"),
        (pl.Series([7, 2**63], dtype=pl.UInt64), "holds 9223372036854775808, and the ids"),
    ],
)
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_ids_that_the_training_could_not_have_are_refused(
    ids: pl.Series, said: str, ending: str, run: Run, tmp_path: Path
) -> None:
    rows = items(0, 2).with_columns(item_id=ids)
    rows.write_csv(tmp_path / "t.csv") if ending == "csv" else rows.write_parquet(tmp_path / "t.parquet")
    if ending == "csv":
        said = said.replace("holds 9223372036854775808", "holds '9223372036854775808'")
    with pytest.raises(DataError, match=said):
        again(run, tmp_path / f"t.{ending}", tmp_path / "out")
    assert not state(tmp_path / "out")


@pytest.mark.parametrize("kind", [pl.String, pl.UInt16, pl.Float64])
def test_ids_of_other_types_become_those_of_the_training(kind: Any, run: Run, tmp_path: Path) -> None:
    items(0, 9).with_columns(pl.col("item_id").cast(pl.Int64).cast(kind)).write_parquet(tmp_path / "t.parquet")
    again(run, tmp_path / "t.parquet", tmp_path / "out")
    items(0, 9).write_parquet(tmp_path / "plain.parquet")
    again(run, tmp_path / "plain.parquet", tmp_path / "plain")
    assert shard(tmp_path / "out", 0).name[:10] == shard(tmp_path / "plain", 0).name[:10]
    assert read(tmp_path / "out")[0].equals(read(tmp_path / "plain")[0])
    assert np.array_equal(read(tmp_path / "out")[1], read(tmp_path / "plain")[1])


def test_a_text_file_is_cut_into_shards_as_a_parquet_file_is(run: Run, tmp_path: Path) -> None:
    rows = items(0, 250).with_columns(weight=pl.col("weight").round(3))
    rows.write_csv(tmp_path / "t.csv")
    rows.write_parquet(tmp_path / "t.parquet")
    for ending in ("csv", "parquet"):
        again(run, tmp_path / f"t.{ending}", tmp_path / ending)
        assert len(state(tmp_path / ending)) == 3
    assert np.array_equal(read(tmp_path / "csv")[1], read(tmp_path / "parquet")[1])


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
    commas, points = (read(tmp_path / name) for name in ("commas", "points"))
    assert commas[0].equals(points[0])
    assert np.array_equal(commas[1], points[1])
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


@pytest.mark.parametrize(("name", "point", "shards"), [("c.parquet", 3, 4), ("a.parquet", 4, SHARDS)])
def test_fault_C12_a_table_that_changes_while_it_is_embedded_ends_the_job(
    name: str, point: int, shards: int, run: Run, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file changes after its first shard is made, or after its last one was."""
    copy, out = Path(shutil.copytree(table, tmp_path / "table")), tmp_path / "out"
    monkeypatch.setattr(files, "hooks", kill_points.At(f"shard:{point}", lambda: os.utime(copy / name, ns=(1, 1))))
    with pytest.raises(
        DataError,
        match=rf"{name}: was changed while it was read; when it is complete, call again with `overwrite=True`",
    ):
        again(run, copy, out)
    assert len(list(out.glob("part-*"))) == shards
    assert not (out / LIST_FILE).exists()
    with pytest.raises(RunError, match=rf"of another `table \({name}\)` .*`overwrite=True`"):
        again(run, copy, out)


def test_files_are_named_one_by_one_by_a_folder_or_by_a_pattern(
    run: Run, table: Path, whole: Path, tmp_path: Path
) -> None:
    again(run, f"{table}/[a-d].*", tmp_path / "out")
    same(tmp_path / "out", whole)
    shutil.copytree(table, tmp_path / "deep" / "one")
    again(run, str(tmp_path / "deep" / "*" / "*.parquet"), tmp_path / "three")
    assert len(EmbeddingsFolder(tmp_path / "three")) == 380
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.md").touch()
    with pytest.raises(DataError, match="found a '.md' file"):
        again(run, tmp_path / "odd", tmp_path / "none")
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


def test_a_text_file_of_which_no_row_can_be_read_is_not_one_without_rows(run: Run, tmp_path: Path) -> None:
    """A quote within the first row of a file of two, whose rows a count takes for none."""
    (tmp_path / "t").mkdir()
    items(0, 5).write_csv(tmp_path / "t" / "a.csv")
    (tmp_path / "t" / "b.csv").write_text('item_id,weight,kinds\n5,0.5,k5" pipe\n6,0.5,k1\n')
    with pytest.raises(DataError, match=r"b.csv: cannot be read as csv \(CSV malformed"):
        again(run, tmp_path / "t", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_column_that_one_file_lacks_is_said_before_anything_is_made(run: Run, table: Path, tmp_path: Path) -> None:
    shutil.copytree(table, tmp_path / "t")
    items(0, 9).drop("kinds").write_parquet(tmp_path / "t" / "z.parquet")
    with pytest.raises(DataError, match="no column 'kinds'"):
        again(run, tmp_path / "t", tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    for name in {p.name for p in whole.iterdir()} - {"_lock"}:
        assert (found / name).read_bytes() == (whole / name).read_bytes(), name
    for place in (found, f"{bucket}/out", Path(f"{bucket}/out")):
        assert np.array_equal(read(place)[1], read(whole)[1])
    ObjectClient(Url.parse(bucket)).write(f"out/{shard(whole, 2).name}", b"of somebody else")
    lines = again(run, table, Path(f"{bucket}/out"))
    assert len([line for line in lines if "items embedded" in line]) == 1
    assert lines[-1].endswith(f"have vectors: {bucket}/out")
    again_found = copy_of(f"{bucket}/out", tmp_path / "again")
    assert {p.name for p in again_found.iterdir()} == {p.name for p in whole.iterdir()} - {"_lock"}
    assert np.array_equal(read(again_found)[1], read(whole)[1])
    with pytest.raises(RunError, match=r"of another `shard_rows` \(100 then, 90 now\)"):
        again(run, table, Path(f"{bucket}/out"), shard_rows=90)


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
    assert read(found)[0].equals(read(whole)[0])
    assert np.array_equal(read(found)[1], read(whole)[1])


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
    assert {block.dtype for _, block in half.blocks()} == {np.dtype(np.float16)}
    assert {block.dtype for _, block in full.blocks()} == {np.dtype(np.float32)}
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
def test_vectors_come_in_blocks_in_the_order_of_the_table(rows: int, whole: Path) -> None:
    vectors = EmbeddingsFolder(whole)
    sizes = [(len(ids), len(block)) for ids, block in vectors.blocks(rows)]
    assert all(a == b <= rows for a, b in sizes)
    assert sum(a for a, _ in sizes) == len(vectors) == 417
    ids, found = read(whole, rows)
    assert ids.to_list() == list(range(417))
    assert found.shape == (417, vectors.width)
    assert (vectors.about["side"], vectors.about["metric"]) == ("item", "dot")


def test_other_tools_read_the_folder_as_one_table(whole: Path) -> None:
    ids, vectors = read(whole)
    table = pq.read_table(whole)
    assert table["id"].to_pylist() == ids.to_list()
    assert np.array_equal(np.stack(table["vector"].to_numpy()), vectors)
    rows = duckdb.connect().execute(f"SELECT vector FROM '{whole}/part-*.parquet' ORDER BY id").fetchall()
    assert np.array_equal(np.array([row for (row,) in rows], np.float32), vectors)


def test_what_is_no_folder_of_whole_vectors_is_a_run_error(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="_embedding.json is missing, or of another version"):
        EmbeddingsFolder(tmp_path)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    second, third = shard(out, 1), shard(out, 2)
    second.unlink()
    seen = list[int]()
    with pytest.raises(DataError, match=rf"{second.name}: .*is the file complete"):
        seen.extend(len(ids) for ids, _ in EmbeddingsFolder(out).blocks())
    assert seen == [100]
    shutil.copy(third, second)
    with pytest.raises(DataError, match=rf"{second.name}: holds 50 vectors, expected 100; embed again to repair it"):
        list(EmbeddingsFolder(out).blocks())
    for data in (b"", b"x", third.read_bytes()[:90]):
        second.write_bytes(data)
        with pytest.raises(DataError, match=rf"{second.name}: .*is the file complete"):
            list(EmbeddingsFolder(out).blocks())
    for text in ('{"format": 99}', "{", "[]"):
        (out / LIST_FILE).write_text(text)
        with pytest.raises(RunError, match="_embedding.json is missing, or of another version"):
            EmbeddingsFolder(out)


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
        assert any("'since' begins versions of an id, and each row gets a vector" in line for line in lines)
        lines.clear()
        api.embed(run, "item", tmp_path / "items.parquet", tmp_path / "item_vectors")
        assert not any("each row gets" in line for line in lines)


def test_a_table_with_ids_of_another_name_is_embedded_and_answered(run: Run, whole: Path, tmp_path: Path) -> None:
    users, _, actions = checkerboard()
    schema = SCHEMA.model_copy(update={"users_id": "uid", "items_id": "asin"})
    given = users.rename({"user_id": "uid"}), items(0, 30).rename({"item_id": "asin"})
    named = api.fit(check(*given, actions, schema), schema, run.config, folder=tmp_path / "run")
    table = items(0, 40).rename({"item_id": "asin"})
    table.write_parquet(tmp_path / "items.parquet")
    table.write_csv(tmp_path / "items.csv")
    expected = pl.read_parquet(shard(whole, 0)).head(40)
    for n, path in enumerate([tmp_path / "items.parquet", tmp_path / "items.csv"]):
        api.embed(named, "item", path, tmp_path / f"out{n}")
        assert pl.read_parquet(shard(tmp_path / f"out{n}", 0)).equals(expected)
    items(0, 40).write_parquet(tmp_path / "plain.parquet")  # as the log names them
    api.embed(named, "item", tmp_path / "plain.parquet", tmp_path / "plain")
    assert pl.read_parquet(shard(tmp_path / "plain", 0)).equals(expected)
    retriever = Retriever(api.publish(named, tmp_path / "store", force=True))
    assert retriever.recommend_frame(given[0], 4).equals(retriever.recommend_frame(users, 4))
