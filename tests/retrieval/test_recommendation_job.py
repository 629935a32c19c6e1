"""The nightly job: answers to a table of users, kills and restarts, what is refused, memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kill_points
import numpy as np
import pandas as pd
import polars as pl
import preloaded
import pyarrow.dataset
import pyarrow.parquet
import pytest
from messages import collected_messages
from ray_worlds import running_ray

from twotower import api, files
from twotower.cli.app import run_command
from twotower.data.reading.readers import columns_and_rows
from twotower.errors import ConfigError, DataError, RunError
from twotower.files.object_stores import ObjectClient
from twotower.files.urls import Url
from twotower.retrieval import SHARD_USERS
from twotower.retrieval.batches import recommend_batch
from twotower.retrieval.recommendation_job import LIST_FILE
from twotower.retrieval.retriever import Retriever
from twotower.store.bundle import remove_bundle

IDS = [*(f"u{i}" for i in range(40)), "nobody", "u3", *(f"u{i}" for i in range(40, 60)), "noone"]
SHARD_ROWS, SHARDS = 12, 6
"""Of `table`: 12, 12, 6; none; 12, 12, 9 users."""


def users() -> pl.DataFrame:
    ages = [None if i % 3 else 20.0 + i for i in range(len(IDS))]
    return pl.DataFrame({"uid": IDS, "age": ages, "extra": range(len(IDS))})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, one of them empty, and a file of another program."""
    folder = tmp_path_factory.mktemp("table")
    users().head(30).write_parquet(folder / "a.parquet", row_group_size=8)
    users().clear().write_parquet(folder / "b.parquet")
    users().slice(30).write_parquet(folder / "c.parquet")
    (folder / "_SUCCESS").touch()
    return folder


def job(store: Path, table: Path | str, out: Path, **options: Any) -> list[str]:
    """Run the job; return its messages."""
    with collected_messages() as lines:
        api.recommend_users(store, table, out, **{"k": 5, "shard_rows": SHARD_ROWS, "threads": 1} | options)
    return lines


@pytest.fixture(scope="module")
def whole(store: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    job(store, table, out)
    return out


def read(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "part-*.parquet")


def state(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every shard: another one for whatever is written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("part-*")}


def same(out: Path, expected: Path) -> None:
    """The same bytes in all files, and nothing half made."""
    found, wanted = ({p.relative_to(o): p for o in (one,) for p in o.rglob("*")} for one in (out, expected))
    assert found.keys() == wanted.keys()
    for name, path in wanted.items():
        assert path.is_dir() or found[name].read_bytes() == path.read_bytes(), name


# ---- what is written


@pytest.mark.parametrize("method", [1, 2])
def test_the_shards_hold_what_a_batch_of_all_users_gives(
    store: Path, table: Path, retriever: Retriever, tmp_path: Path, method: int
) -> None:
    job(store, table, tmp_path / "out", method=method)
    expected = recommend_batch(retriever, users(), 5, method)  # type: ignore[arg-type]
    found = read(tmp_path / "out")
    assert found.drop("score").equals(expected.drop("score"))
    np.testing.assert_allclose(found["score"], expected["score"], atol=1e-5)
    assert found.schema == expected.schema


def test_pandas_and_pyarrow_open_the_folder_as_one_table(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} == {
        *state(whole),
        "_recommendations.json",
        "_plan_recommendations.json",
        "_lock",
    }
    expected = read(whole).rows()
    assert [*pd.read_parquet(whole).itertuples(index=False, name=None)] == expected
    for table in (pyarrow.parquet.read_table(whole), pyarrow.dataset.dataset(whole, format="parquet").to_table()):
        assert pl.DataFrame(table).rows() == expected


def test_the_list_says_what_was_made_of_what(store: Path, table: Path, whole: Path, retriever: Retriever) -> None:
    facts = json.loads((whole / LIST_FILE).read_text())
    assert facts["bundle"] == retriever.bundle.id
    assert [name for name in facts if name.startswith("table")] == [f"table ({name}.parquet)" for name in "abc"]
    assert (facts["k"], facts["columns"], facts["users"]) == (5, ["uid"], len(IDS))
    assert facts["sources"] == {"model": len(IDS) - 2, "popular": 2}
    assert (facts["unknown_left_out"], facts["without_items"], facts["repeated"]) == (0, 0, 1)
    assert [s["users"] for s in facts["shards"]] == [12, 12, 6, 12, 12, 9]
    frames = [pl.read_parquet(whole / s["file"]) for s in facts["shards"]]
    assert [f.height for f in frames] == [s["rows"] for s in facts["shards"]]
    assert facts["rows"] == 5 * len(IDS)


def test_a_summary_says_what_was_read_answered_and_left_out(store: Path, table: Path, tmp_path: Path) -> None:
    lines = job(store, table, tmp_path / "out", unknown="drop", where={"brand": "brand1"}, ban=["i1"], k=40)
    assert lines[-3:] == [
        "users: 63 read, 61 kept; dropped: 2 unknown to the bundle",
        "answers: 61 by model, 1 repeat an id",
        f"{read(tmp_path / 'out').height:,} recommendations in 6 shards: {tmp_path / 'out'}",
    ]
    assert "63 users, read by uid" in lines[0]
    every = [f"i{i}" for i in range(40)]
    assert job(store, table, tmp_path / "none", ban=every)[-2] == (
        "answers: 61 by model, 2 by popular, 63 without an item left, 1 repeat an id"
    )
    assert read(tmp_path / "none").is_empty()


OPTIONS: dict[str, Any] = {
    "k": 6, "method": 2, "unknown": "drop", "ban": ["i3"], "where": {"brand": "brand1"}, "keep_seen": True,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_answers_and_is_refused_in_a_folder_of_another(
    store: Path, table: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = state(out)
    with pytest.raises(RunError, match=rf"its recommendations are .*`{name}`.* then, .* now\); choose another") as e:
        job(store, table, out, **{name: OPTIONS[name]})
    assert "\n" not in str(e.value)
    assert state(out) == before
    job(store, table, out, overwrite=True, **{name: OPTIONS[name]})
    assert not read(out).equals(read(whole))
    job(store, table, tmp_path / "fresh", **{name: OPTIONS[name]})
    same(out, tmp_path / "fresh")


def test_shards_have_fewer_users_where_each_has_many_items(store: Path, table: Path, tmp_path: Path) -> None:
    job(store, table, tmp_path / "out", shard_rows=10**6, k=10_000)
    assert json.loads((tmp_path / "out" / LIST_FILE).read_text())["shard_rows"] == 2**22 // 10_000


# ---- tables


def test_a_file_a_pattern_and_a_csv_give_the_same_answers(
    store: Path, table: Path, whole: Path, tmp_path: Path
) -> None:
    users().write_parquet(tmp_path / "t.parquet")
    users().write_csv(tmp_path / "t.csv")
    users().head(30).write_csv(tmp_path / "1.tsv", separator="\t")
    users().slice(30).write_csv(tmp_path / "2.tsv", separator="\t")
    job(store, table, tmp_path / "two", method=2)
    expected = {1: read(whole), 2: read(tmp_path / "two")}
    forms = (tmp_path / "t.parquet", table / "*.parquet", tmp_path / "t.csv", tmp_path / "*.tsv")
    for given, method in zip(forms, (1, 2, 2, 1), strict=True):
        out = tmp_path / f"{given.name.strip('*')}-{method}"
        job(store, given, out, method=method)
        assert read(out).drop("score").equals(expected[method].drop("score"))
        np.testing.assert_allclose(read(out)["score"], expected[method]["score"], atol=1e-5)


def bad_tables(folder: Path) -> dict[str, tuple[Path, dict[str, Any], str]]:
    frames = {
        "none": users().clear(), "nameless": users().rename({"uid": "id"}), "null": pl.DataFrame({"uid": ["u1", None]}),
        "other": pl.DataFrame({"uid": [1, 2]}),
    }  # fmt: skip
    for name, frame in frames.items():
        frame.write_parquet(folder / f"{name}.parquet")
    users().write_parquet(folder / "good.parquet")
    (folder / "half.parquet").write_bytes((folder / "good.parquet").read_bytes()[:100])
    for name in ("good", "other"):
        (folder / "mixed").mkdir(exist_ok=True)
        shutil.copy(folder / f"{name}.parquet", folder / "mixed")
    good = folder / "good.parquet"
    return {
        "no users": (folder / "none.parquet", {}, "the table has no rows, expected at least one"),
        "no ids": (folder / "nameless.parquet", {}, "no column 'uid'; did you mean 'id'"),
        "a null": (folder / "null.parquet", {}, "column 'uid' has 1 missing ids"),
        "no file": (folder / "nothing.parquet", {}, "no such file"),
        "half": (folder / "half.parquet", {}, "cannot be read as parquet"),
        "types": (folder / "mixed", {}, "column 'uid' holds Int64, and String in "),
        "unknown": (good, {"unknown": "error"}, "user 'nobody' is not among the 60 users of this bundle"),
        "k": (good, {"k": 10**12}, "expected 1 to 10,000"),
        "where": (good, {"where": {"brnd": "x"}}, "no column 'brnd'"),
        "word": (good, {"unknown": "guess"}, "`unknown` is 'guess'"),
        "shards": (good, {"shard_rows": 0}, "`shard_rows` is 0, expected at least 1"),
        "threads": (good, {"threads": -1}, "`threads` is -1, expected at least 0"),
    }


def test_bad_input_is_one_line_and_no_list_of_shards(store: Path, tmp_path: Path) -> None:
    for name, (table, options, message) in bad_tables(tmp_path).items():
        with pytest.raises((DataError, ConfigError), match=message) as e:
            job(store, table, tmp_path / name, **options)
        assert "\n" not in str(e.value)
        assert e.value.exit_code == 2
        assert not (tmp_path / name / LIST_FILE).exists()


PART = "part-00000-0123456789abcdef.parquet"


@pytest.mark.parametrize(
    ("given", "out", "said"),
    [
        ("t", "t/recs", "lies in the table t, and the next call would read it as users; choose a folder outside"),
        ("t", "t", "lies in the table t"),
        ("t", "t/2026/recs", "lies in the table t"),
        ("t/../t", "link/recs", "lies in the table"),
        ("t/*/*.parquet", "t/recs", "lies in the table"),
        ("t/**/*.parquet", "t/2026/recs", "lies in the table"),
        (
            "t/part-00000-0123456789abcdef.parquet",
            "t",
            r"holds the file part-00000-0123456789abcdef\.parquet of the table",
        ),
        ("t/*.parquet", "link", r"holds the file part-00000-0123456789abcdef\.parquet of the table"),
    ],
)
def test_a_folder_within_the_table_or_around_it_is_refused_at_once(
    store: Path, tmp_path: Path, given: str, out: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t/2026").mkdir(parents=True)
    Path("link").symlink_to("t")
    for name in (PART, "2026/a.parquet") if "*/" in given else (PART,):
        users().write_parquet(f"t/{name}")
    before = sorted(Path("t").rglob("*"))
    with pytest.raises(RunError, match=said) as e:
        job(store, given, Path(out), overwrite=True)
    assert "\n" not in str(e.value)
    assert sorted(Path("t").rglob("*")) == before


@pytest.mark.parametrize(("given", "out"), [("t", "t/_recs"), ("t/*.parquet", "t/recs"), ("t/a.parquet", "recs")])
def test_a_folder_that_the_table_does_not_read_is_written_twice(
    store: Path, tmp_path: Path, given: str, out: str
) -> None:
    (tmp_path / "t").mkdir()
    users().write_parquet(tmp_path / "t" / "a.parquet")
    for _ in range(2):
        job(store, tmp_path / given, tmp_path / out)
    assert read(tmp_path / out)["user_id"].n_unique() == len({*IDS})


def test_fault_C12_a_table_that_changes_meanwhile_ends_the_job(
    store: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in (lambda p: os.utime(p, ns=(1, 1)), lambda p: p.unlink(), lambda p: users().head(5).write_parquet(p)):
        copy, out = tmp_path / "table", tmp_path / "out"
        shutil.copytree(table, copy)
        monkeypatch.setattr(files, "hooks", kill_points.At("shard:1", lambda: change(copy / "c.parquet")))  # noqa: B023
        with pytest.raises(DataError, match=r"c\.parquet: (was changed while|cannot be read)"):
            job(store, copy, out)
        assert sorted(name[:10] for name in state(out)) == [f"part-{i:05d}" for i in range(3)]
        assert not (out / LIST_FILE).exists()
        shutil.rmtree(copy)
        shutil.rmtree(out)


def test_fault_C12_a_table_that_changes_after_it_was_read_ends_the_job(
    store: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer is made of the first file once the last shard is read."""
    copy, out = Path(shutil.copytree(table, tmp_path / "table")), tmp_path / "out"
    monkeypatch.setattr(
        files, "hooks", kill_points.At(f"shard:{SHARDS - 1}", lambda: os.utime(copy / "a.parquet", ns=(1, 1)))
    )
    with pytest.raises(
        DataError,
        match=r"a\.parquet: was changed while it was read; when it is complete, call again with `overwrite=True`",
    ):
        job(store, copy, out)
    assert len(state(out)) == SHARDS
    assert not (out / LIST_FILE).exists()


def test_fault_C12_a_csv_that_grows_while_its_rows_are_counted_ends_the_job(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, counted = tmp_path / "t.csv", columns_and_rows
    table.write_text("uid\nu1\nu2\n", encoding="utf-8")

    def grow(*given: Any) -> tuple[pl.Schema, int]:
        found = counted(*given)
        with table.open("a", encoding="utf-8") as f:
            f.write("u3\n")
        return found

    monkeypatch.setattr("twotower.data.reading.table_shards.columns_and_rows", grow)
    with pytest.raises(DataError, match=r"t\.csv: was changed while it was read"):
        job(store, table, tmp_path / "out")
    assert not state(tmp_path / "out")


# ---- kills, damage, other calls


def test_a_second_call_makes_nothing_and_says_the_same(store: Path, table: Path, whole: Path) -> None:
    before = state(whole)
    first = job(store, table, whole)
    assert state(whole) == before
    assert first[-3] == "users: 63 read, 63 kept"
    assert first[-2] == "answers: 61 by model, 2 by popular, 1 repeat an id"


def start(store: Path, table: Path, out: Path, *program: str) -> preloaded.Process:
    """Start the command in a process of its own."""
    return preloaded.start(
        *program, "recommend", "--store", store, "--users", table, "--out", out, "-k", "5", "--shard-rows",
        str(SHARD_ROWS), "--threads", "1", stdout=preloaded.PIPE, stderr=preloaded.PIPE,
    )  # fmt: skip


def killed_at(where: str, store: Path, table: Path, out: Path) -> int:
    """Run the command until a point; return its exit code."""
    process = start(store, table, out, *kill_points.program(where))
    said = process.communicate(timeout=60)
    code = process.wait()
    assert code in (0, -signal.SIGKILL), said
    return code


def gone_on(where: str, store: Path, table: Path, whole: Path, out: Path) -> bool:
    """Kill the command at a point, go on, and compare; return False if the point was not reached."""
    if killed_at(where, store, table, out) == 0:
        return False
    before = state(out)
    job(store, table, out)
    same(out, whole)
    assert {name: s for name, s in state(out).items() if name in before} == before
    return True


@pytest.mark.parametrize("where", ["2", "shard:0", "shard.made", "shard:4", "14", "-1"])
def test_fault_C11_a_killed_job_is_gone_on_with_to_the_same_bytes(
    where: str, store: Path, table: Path, whole: Path, tmp_path: Path
) -> None:
    """-1 is the writing of the list, the last point but two: plan, 6 shards of 7 points each, list."""
    assert gone_on(str(5 + 7 * SHARDS + 3) if where == "-1" else where, store, table, whole, tmp_path / "out")


@pytest.mark.system  # a minute of processes
def test_fault_C11_a_kill_at_any_point_of_the_job(store: Path, table: Path, whole: Path, tmp_path: Path) -> None:
    point = 1
    while gone_on(str(point), store, table, whole, tmp_path / str(point)):
        point += 1
    assert point > 50


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with running_ray():
        yield


@pytest.mark.system
def test_a_text_table_and_its_errors_are_the_same_by_ray(
    ray: None, store: Path, table: Path, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "users").mkdir()
    for name in ("a", "c"):
        pl.read_parquet(table / f"{name}.parquet").write_csv(tmp_path / "users" / f"{name}.csv")
    for engine in ("local", "ray"):
        job(store, tmp_path / "users", tmp_path / engine, engine=engine)
    same(tmp_path / "ray", tmp_path / "local")
    for engine, user in (("local", "nobody"), ("ray", "(nobody|noone)")):  # of the shard that ends first
        with pytest.raises(DataError, match=f"user '{user}' is not among the 60 users of this bundle"):
            job(store, tmp_path / "users", tmp_path / f"{engine}-error", engine=engine, unknown="error")


@pytest.mark.system
def test_ray_writes_the_answers_to_a_text_table_into_a_bucket(
    store: Path, table: Path, bucket: str, tmp_path: Path
) -> None:
    """In a process of its own, since those of Ray have the environment in which it begins."""
    (tmp_path / "users").mkdir()
    for name in ("a", "c"):
        pl.read_parquet(table / f"{name}.parquet").write_csv(tmp_path / "users" / f"{name}.csv")
    job(store, tmp_path / "users", tmp_path / "local")
    words = ["recommend", "--store", store, "--users", tmp_path / "users", "--out", f"{bucket}/recs", "-k", 5]
    words += ["--shard-rows", SHARD_ROWS, "--engine", "ray", "--threads", 2]
    preloaded.run("-m", "twotower", *map(str, words), check=True, timeout=600)
    client = ObjectClient(Url.parse(bucket))
    names = {path.name for path in (tmp_path / "local").iterdir() if path.name[0] == "p" or path.name == LIST_FILE}
    assert {found.key for found in client.list("recs")} - {"recs/_plan_recommendations.json"} == {
        f"recs/{n}" for n in names
    }
    for name in names:
        assert client.read(f"recs/{name}", 10**9).data == (tmp_path / "local" / name).read_bytes(), name


@pytest.mark.parametrize("damage", ['{"users": 3}', "{}", '{"format": NaN}', "", "whole", "no repeated"])
def test_a_damaged_list_is_made_again(store: Path, table: Path, whole: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(whole, out := tmp_path / "out")
    facts = json.loads((out / LIST_FILE).read_text())
    told = {"whole": json.dumps(facts | {"users": 1}), "no repeated": json.dumps(facts | {"repeated": "1"})}
    (out / LIST_FILE).write_text(told.get(damage, damage))
    lines = job(store, table, out)
    assert f"users: {len(IDS)} read, {len(IDS)} kept" in lines
    same(out, whole)


def test_other_bundles_tables_and_folders_are_refused(
    run: Any, store: Path, table: Path, whole: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    other = tmp_path / "store"
    api.publish(run, other)
    with pytest.raises(
        RunError, match=r"its recommendations are of another `bundle` \(\S+ then, \S+ now\); choose another"
    ):
        job(other, table, out)
    shutil.copytree(table, tmp_path / "table")
    os.utime(tmp_path / "table" / "a.parquet", ns=(1, 1))
    with pytest.raises(RunError, match=r"of another `table \(a.parquet\)`"):
        job(store, tmp_path / "table", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(RunError, match=r"not a folder of recommendations \(it holds notes.txt\)"):
        job(store, table, tmp_path / "mine", overwrite=True)
    job(other, table, out, overwrite=True)
    assert json.loads((out / LIST_FILE).read_text())["bundle"] != json.loads(
        (whole / LIST_FILE).read_text()
    )["bundle"]  # fmt: skip


def test_a_bundle_that_is_being_read_is_not_removed(
    store: Path, table: Path, retriever: Retriever, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    folder = copy / "bundles" / retriever.bundle.id
    removed: list[bool] = []
    monkeypatch.setattr(files, "hooks", kill_points.At("shard:2", lambda: removed.append(remove_bundle(folder))))
    job(copy, table, tmp_path / "out")
    assert removed == [False]
    assert remove_bundle(folder)


def test_fault_C12_a_full_disk_ends_the_job_which_goes_on_later(
    store: Path, table: Path, whole: Path, tmp_path: Path
) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1200, resource.RLIM_INFINITY))\n"
        "from twotower.__main__ import main; main()"
    )
    process = start(store, table, tmp_path / "out", "-c", code)
    _, errors = process.communicate(timeout=60)
    assert process.wait() == 2, errors
    assert errors.count("\n") == 1
    assert "cannot be written" in errors
    assert not state(tmp_path / "out")
    job(store, table, tmp_path / "out")
    same(tmp_path / "out", whole)


# ---- the command


def test_the_command_writes_what_the_function_does_and_prints_progress(
    store: Path, table: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recommend", "--store", str(store), "--users", str(table), "--out", str(tmp_path / "out"), "-k", "5"]
    assert run_command([*words, "--shard-rows", str(SHARD_ROWS), "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "users: 63 read, 63 kept" in out
    same(tmp_path / "out", whole)
    assert run_command([*words, "--shard-rows", "20"]) == 2
    assert "of another --shard-rows (12 then, 20 now); choose another folder, or start over with --overwrite" in (
        capsys.readouterr().err
    )
    more = [
        "--method",
        "2",
        "--unknown",
        "drop",
        "--ban",
        "i1",
        "--where",
        "brand=brand1",
        "--keep-seen",
        "--overwrite",
    ]
    assert run_command([*words, *more]) == 0
    facts = json.loads((tmp_path / "out" / LIST_FILE).read_text())
    assert facts["shard_rows"] == SHARD_USERS
    told = {"method": 2, "unknown": "drop", "ban": ["i1"], "where": {"brand": "brand1"}, "keep_seen": True}
    assert {name: facts[name] for name in told} == told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--users", "t.parquet"], "--users TABLE and --out FOLDER go together"),
        (["--out", "recs"], "--users TABLE and --out FOLDER go together"),
        (["--users", "t", "--out", "o", "--user", "u1"], "leave out --user, --features, --context and --json"),
        (["--users", "t", "--out", "o", "--json"], "leave out --user, --features, --context and --json"),
        (["--user", "u1", "--unknown", "drop"], "--unknown is an option of --users TABLE --out FOLDER"),
        (["--user", "u1", "--unknown", "popular"], "--unknown is an option of --users TABLE --out FOLDER"),
        (["--user", "u1", "--shard-rows", "5"], "--shard-rows is an option of --users"),
        (["--user", "u1", "--shard-rows", f"{SHARD_USERS}"], "--shard-rows is an option of --users"),
        (["--user", "u1", "--overwrite"], "--overwrite is an option of --users"),
        (["--user", "u1", "--engine", "ray"], "--engine is an option of --users"),
        (["--user", "u1", "--decimal", ","], "--decimal is an option of --users"),
        (["--user", "u1", "--threads", "2"], "--threads is an option of --users"),
        (["--user", "u1", "--threads", "0"], "--threads is an option of --users"),
        ([], "name a user with --user ID, describe one with --features FILE.json, or name a table with --users"),
    ],
)
def test_options_of_the_other_use_are_refused(
    store: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["recommend", "--store", str(store), *words]) == 2
    assert said in capsys.readouterr().err


# ---- memory

MEASURED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from held_memory import held, most_held
from twotower.retrieval.recommendation_job import recommend_users
before = held()
print(before + most_held(lambda: recommend_users(*sys.argv[1:4], 40, shard_rows=8192, threads=1)))
"""


@pytest.mark.system  # half a minute
def test_sixteen_times_the_users_take_no_more_memory(store: Path, tmp_path: Path) -> None:
    found = []
    for n in (30_000, 480_000):
        pl.DataFrame({"uid": [f"u{i % 61}" for i in range(n)]}).write_parquet(tmp_path / f"{n}.parquet")
        command = [
            sys.executable,
            "-c",
            MEASURED,
            str(Path(__file__).parents[1]),
            str(store),
            str(tmp_path / f"{n}.parquet"),
            str(tmp_path / str(n)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(float(done.stdout))
    assert found[1] < 1.2 * found[0], found
