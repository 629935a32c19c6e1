"""Rows that are added to a folder of buckets: what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import kill_points
import numpy as np
import polars as pl
import preloaded
import pytest

from twotower import api, files
from twotower.cli.app import run_command
from twotower.config.experiment import Config
from twotower.config.toml import dump_config
from twotower.data import prepare
from twotower.data.buckets import Buckets
from twotower.data.buckets.check import check_buckets
from twotower.data.config import DataConfig
from twotower.data.memmap import MemmapDataset
from twotower.data.prepare.options import PrepareOptions
from twotower.data.split import SplitConfig
from twotower.errors import DataError, TwoTowerError
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema

SCHEMA = Schema(
    time="at",
    features=(
        Categorical(name="city", side="user"),
        Categorical(name="item_id", side="item"),
        Categorical(name="hour", side="context"),
    ),
)
OPTIONS = PrepareOptions(piece_rows=100, bucket_rows=100, threads=1)
START = 1_600_000_000


def log(rows: int, first: int = 0) -> pl.DataFrame:
    """Rows of users and items, a second apart, each pair once."""
    row = np.arange(first, first + rows)
    return pl.DataFrame({"user_id": row % 40, "item_id": row % 40 + row // 40, "at": START + row, "hour": row % 24})


def users(n: int = 40) -> pl.DataFrame:
    return pl.DataFrame({"user_id": np.arange(n), "city": [f"c{u % 3}" for u in range(n)]})


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """A folder of the buckets of 400 rows, and the file of the next 100."""
    users().write_parquet(tmp_path / "users.parquet")
    log(400).write_parquet(tmp_path / "days.parquet")
    log(100, 400).write_parquet(tmp_path / "day.parquet")
    days = DataConfig(users=str(tmp_path / "users.parquet"), interactions=str(tmp_path / "days.parquet"))
    prepare.write_buckets(days, SCHEMA, tmp_path / "buckets", OPTIONS)
    update = {"interactions": str(tmp_path / "day.parquet"), "buckets": str(tmp_path / "buckets")}
    return days.model_copy(update=update)


def append(data: DataConfig, schema: Schema = SCHEMA) -> Buckets:
    return prepare.append_segment(data, schema, SplitConfig(), data.interactions, OPTIONS)


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tables_of_now_change_features_and_add_rows_and_a_file_is_taken_once(
    data: DataConfig, tmp_path: Path, messages: list[str]
) -> None:
    now = users(43).reverse().with_columns(city=pl.lit("moved")).head(40)  # 0, 1 and 2 are gone
    now.write_parquet(tmp_path / "users.parquet")
    late = log(2).with_columns(item_id=pl.lit(90, pl.Int64), at=pl.lit(START - 5, pl.Int64))
    pl.concat([log(98, 400), late]).write_parquet(tmp_path / "day.parquet")
    before = pl.read_parquet(tmp_path / "buckets" / "users.parquet")
    facts = append(data).facts
    after = pl.read_parquet(tmp_path / "buckets" / "users.parquet")
    assert after["user_id"].head(40).equals(before["user_id"])
    cities = dict(after.rows())
    assert {cities[u] for u in range(3, 43)} == {"moved"}
    assert [cities[u] for u in range(3)] == ["c0", "c1", "c2"]
    assert (facts.rows, facts.first_time) == (500, (START - 5) * 1_000_000)
    assert any(
        "segment 1: 100 interactions, 2 of them older than the newest before; 3 new users" in m for m in messages
    )
    assert check_buckets(tmp_path / "buckets", SCHEMA) == []
    os.link(tmp_path / "day.parquet", tmp_path / "copy.parquet")
    with pytest.raises(DataError, match=r"copy.parquet: is in .*buckets already, in segment 1"):
        append(data.model_copy(update={"interactions": str(tmp_path / "copy.parquet")}))
    with pytest.raises(DataError, match=r"days.parquet: is in .*buckets already, in segment 0"):
        append(data.model_copy(update={"interactions": str(tmp_path / "days.parquet")}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.drop("hour"), "column 'hour'"),
        (lambda t: t.with_columns(pl.col("hour").cast(pl.String)), "column 'hour' holds String, and Int64 in"),
        (lambda t: t.with_columns(pl.format("u{}", "user_id").alias("user_id")), "give both the same type"),
        (lambda t: t.with_columns(pl.col("at") * 1000), "times are not between 1990 and tomorrow"),
        (lambda t: t.with_columns(pl.from_epoch("at")), "holds a date, and .* of times that are a number"),
        (lambda t: t.head(0), "the table has no rows"),
    ],
)  # fmt: skip
def test_fault_C18_rows_that_do_not_fit_the_folder_are_one_line_and_change_nothing(
    data: DataConfig, tmp_path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], expected: str
) -> None:
    change(log(100, 400)).write_parquet(tmp_path / "day.parquet")
    before = held(tmp_path / "buckets")
    with pytest.raises(TwoTowerError, match=expected) as found:
        append(data)
    assert "\n" not in str(found.value)
    assert held(tmp_path / "buckets") == before
    assert not list(tmp_path.glob(".buckets*"))


def test_fault_C18_dates_with_a_zone_do_not_follow_dates_without(data: DataConfig, tmp_path: Path) -> None:
    plain = pl.from_epoch("at")
    log(400).with_columns(plain).write_parquet(tmp_path / "days.parquet")
    days = data.model_copy(update={"interactions": str(tmp_path / "days.parquet"), "buckets": ""})
    prepare.write_buckets(days, SCHEMA, tmp_path / "buckets", OPTIONS)
    zoned = log(100, 400).with_columns(plain.dt.replace_time_zone("Europe/Berlin"))
    zoned.write_parquet(tmp_path / "day.parquet")
    with pytest.raises(DataError, match="holds a zoned date, and .* of times that are a date; give dates"):
        append(data)
    log(100, 400).with_columns(plain).write_parquet(tmp_path / "day.parquet")
    assert append(data).facts.rows == 500


def test_fault_C18_other_settings_and_tables_are_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(TwoTowerError, match="log.time_unit 's', expected 'ms'"):
        append(data, SCHEMA.model_copy(update={"time_unit": "ms"}))
    users().with_columns(city=pl.lit(3)).write_parquet(tmp_path / "users.parquet")
    with pytest.raises(DataError, match="users: column 'city' holds Int32, and String in"):
        append(data)
    users().drop("city").write_parquet(tmp_path / "users.parquet")
    with pytest.raises(DataError, match="city"):
        append(data)
    with pytest.raises(TwoTowerError, match="data.buckets is missing"):
        api.append_segment(Config(), SCHEMA, tmp_path / "day.parquet")


def test_a_pair_that_comes_again_is_refused_where_none_may(data: DataConfig, tmp_path: Path) -> None:
    once = SCHEMA.model_copy(update={"duplicates": "error"})
    days = data.model_copy(update={"interactions": str(tmp_path / "days.parquet"), "buckets": ""})
    prepare.write_buckets(days, once, tmp_path / "buckets", OPTIONS)
    again = pl.concat([log(99, 400), log(1).with_columns(at=pl.lit(START + 900, pl.Int64))])
    again.write_parquet(tmp_path / "day.parquet")
    with pytest.raises(DataError, match="repeats user .* of an earlier segment"):
        append(data, once)
    again.head(99).write_parquet(tmp_path / "day.parquet")
    assert append(data, once).facts.rows == 499


def test_a_training_keeps_the_data_that_it_has_opened(data: DataConfig, tmp_path: Path) -> None:
    split = SplitConfig(kind="last")
    opened = prepare.write_prepared(data, SCHEMA, split, tmp_path / "prepared", OPTIONS)
    item = opened.pairs.item.copy()
    append(data)
    assert len(MemmapDataset.open(tmp_path / "prepared").parts) == 400
    prepare.write_prepared(data, SCHEMA, split, tmp_path / "prepared", OPTIONS)
    assert len(MemmapDataset.open(tmp_path / "prepared").parts) == 500
    np.testing.assert_array_equal(opened.pairs.item, item)


def test_a_folder_that_another_call_has_changed_is_left_as_it_is(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(50, 700).write_parquet(tmp_path / "other.parquet")

    def other() -> None:
        monkeypatch.setattr(files, "hooks", files.Hooks())
        path = tmp_path / "buckets" / "buckets.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"maker": "another"}))

    monkeypatch.setattr(files, "hooks", kill_points.At("resumable.cleared", other))
    with pytest.raises(TwoTowerError, match="another call has changed it; call again"):
        append(data)
    assert append(data).facts.rows == 500


def test_the_command_adds_rows_or_prepares_and_does_one_of_both(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.toml"
    tables = data.model_copy(update={"interactions": str(tmp_path / "days.parquet")})
    config.write_text(dump_config(SCHEMA, Config(data=tables)), encoding="utf-8")
    append = ["prepare", str(config), "--append", str(tmp_path / "day.parquet")]
    assert run_command(append) == 0
    shown = capsys.readouterr().out
    assert "segment 1: 100 interactions, 0 of them older than the newest before; 0 new users" in shown
    assert f"data.buckets={tmp_path / 'buckets'}" in shown
    for words, expected in (
        (append, "day.parquet: is in"),
        ([*append, "--out", str(tmp_path / "out")], "--append adds rows to the buckets and writes no --out"),
        (["prepare", str(config)], "--out is missing"),
        ([*append, "--set", "data.buckets="], "data.buckets is missing"),
    ):
        assert run_command(words) == 2
        errors = capsys.readouterr().err
        assert expected in errors
        assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:2]
import kill_points
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.data.prepare.options import PrepareOptions
from twotower.data.split import SplitConfig
from twotower.features.schema import Schema
kill_points.install(sys.argv[4])
data, schema = DataConfig.model_validate_json(sys.argv[2]), Schema.model_validate_json(sys.argv[3])
options = PrepareOptions(piece_rows=100, bucket_rows=100, threads=1)
prepare.append_segment(data, schema, SplitConfig(), data.interactions, options)
"""


class Counted(files.Hooks):
    points = 0

    def point(self, name: str) -> None:
        self.points += 1


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.system)])
def test_fault_C19_an_append_killed_at_any_point_leaves_the_folder_of_before_or_of_after(
    data: DataConfig, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = tmp_path / "buckets", tmp_path / "kept"
    shutil.copytree(folder, kept)
    before, hooks = held(folder), Counted()
    with monkeypatch.context() as patched:
        patched.setattr(files, "hooks", hooks)
        append(data)
    after = held(folder)
    assert hooks.points >= 30
    words, states = (Path(__file__).parents[1], data.model_dump_json(), SCHEMA.model_dump_json()), list[bool]()
    for point in sorted({*range(1, hooks.points, step), *range(hooks.points - 3, hooks.points + 1)}):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        assert preloaded.run("-c", KILLED, *words, point, timeout=100).returncode
        found = held(folder)
        assert found in (before, after), point
        states.append(found == after)
        if found == before:
            append(data)
        else:
            with pytest.raises(DataError, match="already, in segment 1"):
                append(data)
        assert held(folder) == after, point
    assert states == sorted(states)
    assert {*states} == {False, True}
    log(20, 700).write_parquet(tmp_path / "other.parquet")
    append(data.model_copy(update={"interactions": str(tmp_path / "other.parquet")}))
    assert not list(tmp_path.glob(".*")), "what kills have left"
