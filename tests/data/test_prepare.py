"""A dataset prepared on a disk is the one prepared in memory, and takes no memory that grows with its interactions."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import preloaded
import pytest
import torch
from ray_worlds import running_ray
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything, settings

import twotower
from twotower import api, files
from twotower.arrays import npy_writer
from twotower.arrays.pieces import temporary_array
from twotower.arrays.ragged import Ragged
from twotower.cli.app import run_command
from twotower.config.experiment import Config
from twotower.config.toml import dump_config, load_config, parse_config
from twotower.data import prepare
from twotower.data.buckets import Bucket, Buckets, in_user_order
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.memmap import MemmapDataset
from twotower.data.prepare import bucket_reader, bucketing
from twotower.data.prepare.arrays import PreparedArrays
from twotower.data.prepare.bucket_reader import BucketReader
from twotower.data.prepare.options import PrepareOptions
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import check, check_side
from twotower.errors import ConfigError, DataError, RunError
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.side import SIDES
from twotower.files import locks, resumable
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.pooling.decay import Decay
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever, stored_history, stored_items
from twotower.runs import Run
from twotower.store.store import Store
from twotower.train.progress import Callback

SCHEMA = EVERYTHING_SCHEMA.model_copy(
    update={
        "features": (
            *(f for f in EVERYTHING_SCHEMA.features if f.name != "fans"),
            Sequence(
                name="met", side="user", interactions="all", pooling=Decay(rates=(0.5, 0.9)), share_embedding=False
            ),
        )
    }
)
SPLITS = {
    "time": SplitConfig(kind="time", test=0.13, validation=0.11),
    "last": SplitConfig(kind="last"),
    "last of some": SplitConfig(kind="last", users=0.7, seed=5),
    "random": SplitConfig(kind="random", test=0.13, validation=0.11, seed=7),
    "gap": SplitConfig(kind="time", test=0.13, validation=0.11, gap=11),
    "user_ratio": SplitConfig(kind="user_ratio", users=0.6),
    "user_random": SplitConfig(kind="user_random", test=0.13, validation=0.11, seed=7, users=0.5),
    "column": SplitConfig(kind="column", column="fold", ordered=True),
    "no validation": SplitConfig(kind="last", validation=0),
}


def tables() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """With times that are equal, and pairs that come twice."""
    users, items, actions = everything()
    rng = np.random.default_rng(1)
    again = actions.sample(90, seed=2).with_columns(stars=pl.lit(5, pl.Int64))
    actions = pl.concat([actions.with_columns(stars=pl.col("stars").cast(pl.Int64)), again]).sample(
        fraction=1, shuffle=True, seed=3
    )
    actions = actions.with_columns(when=1_600_000_000 + rng.integers(0, 300, actions.height))
    folds = rng.choice(["train", "validation", "test"], actions.height, p=[0.7, 0.1, 0.2])
    return users, items, actions.with_columns(fold=pl.Series(folds))


def shards(folder: Path, schema: Schema, *frames: pl.DataFrame | None, n: int = 3) -> DataConfig:
    """The tables as folders of uneven Parquet shards."""
    named = {}
    for name, frame in zip(("users", "items", "interactions"), frames, strict=True):
        if frame is None:
            continue
        (folder / name).mkdir(parents=True)
        cuts = [0, 1, *sorted(np.random.default_rng(0).integers(1, frame.height, n - 1).tolist()), frame.height]
        for i, (a, b) in enumerate(itertools.pairwise(cuts)):
            frame[a:b].write_parquet(folder / name / f"part-{i}.parquet")
        (folder / name / "_SUCCESS").touch()
        named[name] = str(folder / name)
    return DataConfig(**named)


SMALL = PrepareOptions(piece_rows=101, bucket_rows=150, side_block_rows=17)
"""Small worlds have several blocks and buckets."""


def in_memory(
    users: pl.DataFrame | None, items: pl.DataFrame | None, actions: pl.DataFrame, schema: Schema, split: SplitConfig
) -> Dataset:
    """The dataset in memory, with users in the order of a prepared one."""
    found = check(users, items, actions, schema)
    ordered = in_user_order(found.users, schema.user_id)
    return build_dataset(replace(found, users=ordered), schema, split)


def rows(data: Dataset) -> list[tuple[Any, ...]]:
    times = (data.times if data.schema.time else np.unique(data.times, return_inverse=True)[1]).tolist()
    return sorted(
        zip(data.pairs.user.tolist(), data.pairs.item.tolist(), data.pairs.positive.tolist(), data.parts.tolist(),
            times, strict=True)
    )  # fmt: skip


def lists(column: Ragged) -> list[list[int]]:
    return [column.values[a:b].tolist() for a, b in zip(column.offsets, column.offsets[1:], strict=False)]


TIMELESS = SCHEMA.model_copy(update={"time": ""})
KEPT = SCHEMA.model_copy(update={"duplicates": "keep"})


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        *((kind, SCHEMA) for kind in SPLITS),
        *((kind, TIMELESS) for kind in ("random", "column")),
        *((kind, KEPT) for kind in ("time", "random", "gap")),
    ],
    ids=[
        *SPLITS,
        "random without times",
        "column without times",
        "time with repeats",
        "random with repeats",
        "gap with repeats",
    ],
)
def test_what_is_prepared_on_a_disk_is_what_is_prepared_in_memory(
    tmp_path: Path, kind: str, schema: Schema, messages: list[str]
) -> None:
    frames = tables()
    memory = in_memory(*frames, schema, SPLITS[kind])
    data = shards(tmp_path / "in", schema, *frames)
    prepare.write_prepared(data, schema, SPLITS[kind], tmp_path / "out", SMALL)
    disk = MemmapDataset.open(tmp_path / "out")
    assert repr(disk) == f"MemmapDataset({disk.describe()})"
    read, kept = frames[2].height, frames[2].height - (0 if schema is KEPT else 90)
    dropped = "; dropped: 90 rows repeated a pair of user and item, the last of each was kept"
    assert f"interactions: {read:,} read, {kept:,} kept{dropped if read > kept else ''}" in messages
    in_gap = [m for m in messages if "in the gap" in m]
    line = f"interactions: {kept - len(disk.parts):,} rows lie in the gap before the validation or test part; dropped"
    assert in_gap == ([line, line] if kind == "gap" else [])
    assert (len(disk.parts) < kept) == (kind == "gap")
    assert disk.time_ordered == memory.time_ordered
    assert disk.encoders.digest == memory.encoders.digest
    assert rows(disk) == rows(memory)
    assert isinstance(disk.pairs.user.base, np.memmap) or isinstance(disk.pairs.user, np.memmap)
    for part in (TRAIN, VALIDATION, TEST):
        a, b = disk.part(part), memory.part(part)
        assert sorted(zip(a.user, a.item, a.positive, strict=True)) == sorted(
            zip(b.user, b.item, b.positive, strict=True)
        )
        for side in SIDES:
            mine, theirs = disk.side_before(side, part), memory.side_before(side, part)
            assert mine.ids.equals(theirs.ids)
            assert set(mine.columns) == set(theirs.columns)
            for name, column in theirs.columns.items():
                found = mine.columns[name]
                if isinstance(column, Ragged):
                    assert isinstance(found, Ragged)
                    assert lists(found) == lists(column), name
                else:
                    assert not isinstance(found, Ragged)
                    assert np.array_equal(found, column, equal_nan=True), name
    for name in ("seen_items", "positive_items"):
        assert lists(getattr(disk, name)) == lists(getattr(memory, name)), name
    assert [sorted(x) for x in lists(disk.interacted_items)] == [sorted(x) for x in lists(memory.interacted_items)]
    assert disk.interacted_items.source is not None
    assert np.array_equal(disk.pairs.item[disk.interacted_items.source], disk.interacted_items.values)
    assert np.array_equal(disk.item_positive_counts, memory.item_positive_counts)
    numbers = disk.positives_by_user
    for u, (ours, others) in enumerate(zip(lists(numbers), lists(memory.positives_by_user), strict=True)):
        assert disk.pairs.item[ours].tolist() == memory.pairs.item[others].tolist(), f"oldest first, user {u}"
    some = np.array([3, 4, 40])
    for part in (TRAIN, VALIDATION, TEST):
        of_some = [data.grouped(part).take(some) for data in (disk, memory)]
        assert all((np.diff(pairs.user) >= 0).all() for pairs in of_some)
        one, two = (sorted(zip(p.user, p.item, p.positive, strict=True)) for p in of_some)
        assert one == two
    assert disk.user_counts.tolist() == memory.user_counts.tolist()
    assert disk.item_counts.tolist() == memory.item_counts.tolist()


def test_unknown_ids_are_treated_on_a_disk_as_in_memory(tmp_path: Path, messages: list[str]) -> None:
    users, items, actions = tables()
    schema = SCHEMA.model_copy(update={"unknown_users": "add", "unknown_items": "drop"})
    absent = 20
    frames = (users[absent:], items[: items.height - absent], actions)
    found = check(*frames, schema)
    config = SPLITS["random"]
    memory = build_dataset(replace(found, users=in_user_order(found.users, schema.user_id)), schema, config)
    data = shards(tmp_path / "in", schema, *frames)
    disk = prepare.write_prepared(data, schema, config, tmp_path / "out", SMALL)
    assert rows(disk) == rows(memory)
    assert disk.users.ids.equals(memory.users.ids)
    assert disk.items.ids.equals(memory.items.ids)
    assert disk.encoders.digest == memory.encoders.digest
    for note in found.notes:
        if "repeated" not in note:
            assert note in messages
    assert any("ids of" in note for note in found.notes)


def test_a_column_that_the_schema_does_not_name_is_told_and_left_out(tmp_path: Path, messages: list[str]) -> None:
    users, items, actions = tables()
    items = items.with_columns(shelf=pl.lit("a"), stock=pl.lit(1))
    data = shards(tmp_path / "in", SCHEMA, users, items, actions)
    disk = prepare.write_prepared(data, SCHEMA, SPLITS["random"], tmp_path / "out", SMALL)
    assert "shelf" not in disk.items.frame.columns
    told = [m for m in messages if "not kept" in m]
    assert told == [
        "items: not kept, as the schema does not name them, so that no filter or slice reads them: 'shelf', 'stock'"
    ]


def test_fault_G10_categories_of_a_csv_are_prepared_as_they_are_spelled(tmp_path: Path) -> None:
    users, items, actions = tables()
    zips = pl.Series("city", ["02139", "2139", "1e5", "1.10", "1.1"] * 12)
    users = users.with_columns(zips)
    data = shards(tmp_path / "in", SCHEMA, users, items, actions)
    users.write_csv(tmp_path / "users.csv")
    data = data.model_copy(update={"users": str(tmp_path / "users.csv")})
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    disk = MemmapDataset.open(tmp_path / "out")
    cities = zip(disk.users.ids, disk.users.frame["city"], strict=True)
    assert sorted(cities) == sorted(zip(users["uid"], zips, strict=True))
    assert disk.encoders.digest == in_memory(users, items, actions, SCHEMA, SPLITS["last"]).encoders.digest


@pytest.mark.parametrize(
    "sections",
    [
        {
            "loss": {"kind": "softmax"},
            "negatives": {"uniform": 20, "hard": {"n": 1, "ranks": [1, 9]}},
            "train": {"history_scope": "causal"},
        },
        {"loss": {"kind": "softmax"}, "negatives": {"random": 3}},
        {"negatives": {"random": 2}, "train": {"data_shards": 3}},
    ],
)
def test_a_model_trained_on_a_disk_is_evaluated_published_and_asked(tmp_path: Path, sections: dict[str, Any]) -> None:
    schema = SCHEMA
    earlier = "history_scope" in sections.get("train", {})
    if not earlier:
        schema = SCHEMA.model_copy(update={"features": SCHEMA.features[:-1]})  # a decay goes with earlier histories
    else:
        keep = tuple(f for f in SCHEMA.features if f.name != "disliked")  # a bound does not
        schema = SCHEMA.model_copy(update={"features": keep})
    prepare.write_prepared(shards(tmp_path / "in", schema, *tables()), schema, SPLITS["time"], tmp_path / "out", SMALL)
    config = settings(split=SPLITS["time"].model_dump(), data={"prepared": str(tmp_path / "out")}, **sections)
    given, schema = api.read(config, None)
    run = api.fit(given, schema, config, folder=tmp_path / "run")
    if earlier:  # then the order is that of users, and the same in memory
        again = api.fit(in_memory(*tables(), schema, config.split), schema, config)
        for name, weight in again.model.state_dict().items():
            assert np.array_equal(weight.numpy(), run.model.state_dict()[name].numpy()), name
    loaded = twotower.load(tmp_path / "run")
    assert isinstance(loaded.dataset, MemmapDataset)
    assert loaded.dataset.folder == tmp_path / "run" / "prepared", "a run stands alone"
    measured = api.evaluate(loaded)
    assert {m: v for m, v in run.metrics.items() if m in measured} == pytest.approx(measured)
    api.publish(loaded, tmp_path / "store", config.index)
    retriever = Retriever(Store(tmp_path / "store").current())
    user = str(loaded.dataset.users.ids[0])
    one, two = (retriever.recommend(Request(user), 5, method) for method in (1, 2))
    assert [i.id for i in one.items] == [i.id for i in two.items]
    assert not {i.id for i in one.items} & set(stored_items(retriever, user))
    assert stored_history(retriever, user, 3)


def test_time_steps_are_found_by_search_as_by_a_table(tmp_path: Path) -> None:
    prepare.write_prepared(shards(tmp_path / "in", SCHEMA, *tables()), SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    disk = MemmapDataset.open(tmp_path / "out")
    fields = disk.encoders.fields("user")
    by_search = SideTensors(disk.users, fields, timeline=disk.timeline, by_user=True)
    by_table = SideTensors(disk.users, fields, timeline=disk.timeline)
    numbers = np.asarray(disk.positive_indices)[::7].astype(np.int64)
    users = disk.pairs.user[numbers].astype(np.int64)
    for name in ("liked", "met"):
        a, b = by_search._positions(name), by_table._positions(name)
        assert np.array_equal(a.prefix_lengths(users, numbers), b.prefix_lengths(users, numbers))
        assert np.array_equal(np.sort(a.find(numbers)), np.sort(b.find(numbers)))


def test_prepared_data_older_than_a_file_of_their_tables_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    config = Config(data=data.model_copy(update={"prepared": str(tmp_path / "out")}), split=SPLITS["last"])
    api.read(config, SCHEMA)
    assert "is older than" not in caplog.text
    files = sorted(Path(data.interactions).glob("part-*"))
    written = (tmp_path / "out" / "prepared.json").stat().st_mtime
    for path in files[:2]:
        os.utime(path, (written + 5, written + 5))
    api.read(config, SCHEMA)
    assert f"out is older than {files[0]} and 1 more, whose changes it lacks; prepare the tables again" in caplog.text
    caplog.clear()
    shutil.rmtree(data.interactions)
    api.read(config, SCHEMA)
    assert "is older than" not in caplog.text
    (Path(data.interactions) / "_delta_log").mkdir(parents=True)
    (Path(data.interactions) / "_delta_log" / "00000000000000000000.json").touch()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "deltalake", None)
        api.read(config, SCHEMA)  # a lake is not read, and needs no package
    assert "is older than" not in caplog.text


def test_other_settings_are_refused(tmp_path: Path) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    with pytest.raises(DataError, match="split.kind = 'last' needs a time; name its column in schema.time"):
        prepare.write_prepared(data, TIMELESS, SPLITS["last"], tmp_path / "out", SMALL)
    with pytest.raises(ConfigError, match="'fans': sequences of items' users cannot be prepared; drop it"):
        prepare.write_prepared(data, EVERYTHING_SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="not empty and not a prepared dataset"):
        prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "mine", SMALL)
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    config = Config(data=DataConfig(prepared=str(tmp_path / "out")), split=SplitConfig(kind="time"))
    with pytest.raises(ConfigError, match=r"was prepared with another \[split\] \(kind\)"):
        api.read(config, None)
    other = SCHEMA.model_copy(update={"positive_above": 1})
    with pytest.raises(ConfigError, match=r"was prepared with another \[schema\] \(positive_above\)"):
        api.read(config.model_copy(update={"split": SPLITS["last"]}), other)
    (tmp_path / "out" / "arrays" / "item.npy").write_bytes(b"x" * 300)
    with pytest.raises(RunError, match=r"item.npy"):
        MemmapDataset.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.with_columns(iid=pl.lit("nobody")), r"1 of 1 ids of 'iid' are not in items, more than a fifth"),
        (lambda t: t.with_columns(stars=pl.lit(1)), "no row has 'stars' above 3"),
        (lambda t: t.head(0), "no rows, expected at least one"),
        (
            lambda t: t.with_columns(stars=pl.when(pl.col("when") < 1_600_000_299).then(1).otherwise(5)),
            "nothing to learn",
        ),
    ],
)
def test_bad_tables_end_with_one_line_and_leave_nothing(tmp_path: Path, change: Any, expected: str) -> None:
    users, items, actions = tables()
    data = shards(tmp_path / "in", SCHEMA, users, items, actions)
    for path in (tmp_path / "in" / "interactions").glob("*.parquet"):
        change(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(DataError, match=expected):
        prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_fault_C9_a_truncated_shard_is_named(tmp_path: Path) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    path = tmp_path / "in" / "interactions" / "part-2.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"part-2.parquet: cannot be read as parquet .*is the file complete"):
        prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)


def test_fault_C9_a_line_of_too_many_values_never_gives_values_of_other_columns(tmp_path: Path) -> None:
    """Also where the columns that are read end before the line does."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [f"u{n % 7},i{n % 5},{1_700_000_000 + n},note" for n in range(50)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,at,note", *lines, "u1,Smith, John,i2,1700000099"]))
    schema = Schema(features=(Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")))
    with pytest.raises(DataError, match="log.csv: a line has more values than the first line"):
        prepare.write_prepared(
            DataConfig(interactions=str(folder)), schema, SplitConfig(kind="random"), tmp_path / "out", SMALL
        )
    assert not (tmp_path / "out").exists()


def prepared(folder: Path, schema: Schema, split: str, *frames: pl.DataFrame | None) -> MemmapDataset:
    data = shards(folder / "in", schema, *frames)
    return prepare.write_prepared(data, schema, SPLITS[split], folder / "out", SMALL)


def test_an_order_that_cannot_be_compared_from_shard_to_shard_is_refused(tmp_path: Path) -> None:
    _, _, actions = checkerboard()
    for n, (change, expected) in enumerate(
        (
            (pl.col("at") + 0.5, "'at' holds fractions or numbers beyond 64 bits; to prepare, give whole numbers"),
            (pl.from_epoch("at"), "part-2.parquet: column 'at' holds Datetime"),
        )
    ):
        data = shards(tmp_path / str(n), CHECKERBOARD_SCHEMA, None, None, actions)
        path = tmp_path / str(n) / "interactions" / "part-2.parquet"
        pl.read_parquet(path).with_columns(at=change).write_parquet(path)
        with pytest.raises(DataError, match=expected):
            prepare.write_prepared(data, CHECKERBOARD_SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)


def test_ids_from_2_to_the_63_on_are_those_of_memory(tmp_path: Path) -> None:
    users, _, actions = checkerboard()
    big = pl.col("user_id").cast(pl.UInt64) + pl.when(pl.col("user_id") > 30).then(2**63).otherwise(0)
    users, actions = users.with_columns(user_id=big), actions.with_columns(user_id=big).sort("user_id")
    for n, side in enumerate((users, None)):
        memory = in_memory(side, None, actions, CHECKERBOARD_SCHEMA, SPLITS["last"])
        disk = prepared(tmp_path / str(n), CHECKERBOARD_SCHEMA, "last", side, None, actions)
        assert rows(disk) == rows(memory)
        assert disk.users.ids.equals(memory.users.ids)


@pytest.mark.parametrize("base", [10**18, 2**63], ids=["19 digits", "beyond Int64"])
def test_fault_G10_long_ids_of_a_csv_are_those_of_parquet(tmp_path: Path, base: int) -> None:
    actions = checkerboard()[2].with_columns(pl.col("user_id").cast(pl.UInt64) + base)
    actions = actions.with_columns(pl.col("user_id").cast(pl.Int64 if base < 2**63 else pl.UInt64))
    data = shards(tmp_path / "in", CHECKERBOARD_SCHEMA, None, None, actions)
    actions.select(pl.col("user_id").unique().sort()).write_csv(tmp_path / "users.csv")
    data = data.model_copy(update={"users": str(tmp_path / "users.csv")})
    disk = prepare.write_prepared(data, CHECKERBOARD_SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    users = check(tmp_path / "users.csv", None, actions, CHECKERBOARD_SCHEMA).users
    assert rows(disk) == rows(in_memory(users, None, actions, CHECKERBOARD_SCHEMA, SPLITS["last"]))


def digest(folder: Path) -> str:
    return str(json.loads((folder / "prepared.json").read_text())["digest"])


@pytest.mark.parametrize("kind", SPLITS)
def test_no_byte_depends_on_sizes(tmp_path: Path, kind: str) -> None:
    fractions = pl.col("stars") + pl.col("stars").cum_count() / 7  # sums of which are rounded
    users, items, actions = tables()
    data = shards(tmp_path / "in", SCHEMA, users, items, actions.with_columns(stars=fractions))
    others = [PrepareOptions(threads=n, piece_rows=p, bucket_rows=b) for n, p, b in ((1, 1000, 10_000), (3, 73, 41))]
    digests = set()
    for n, option in enumerate([SMALL, *(others if kind == "random" else others[1:2])]):
        prepare.write_prepared(data, SCHEMA, SPLITS[kind], tmp_path / str(n), option)
        digests.add(digest(tmp_path / str(n)))
    assert len(digests) == 1


def test_rows_without_ids_or_of_bad_times_are_left_out_as_in_memory(tmp_path: Path, messages: list[str]) -> None:
    users, items, actions = tables()
    n = actions.height
    row = pl.Series(range(n))
    holes = actions.with_columns(
        uid=pl.when(row % 19 == 3).then(None).when(row % 23 == 4).then(pl.lit("")).otherwise("uid"),
        iid=pl.when(row % 29 == 5).then(None).otherwise("iid"),
        when=pl.when(row % 31 == 6).then(0).otherwise("when"),
    )
    holes = pl.concat([holes, holes[:1].with_columns(uid=pl.lit("only a bad time"), when=pl.lit(-1, pl.Int64))])
    here = pl.Series([r % 19 != 3 and r % 23 != 4 and r % 29 != 5 for r in range(n)])
    good = here & pl.Series([r % 31 != 6 for r in range(n)])
    nobody = users[:1].with_columns(uid=pl.lit(None, pl.String))
    schema = SCHEMA.model_copy(update={"missing": "drop", "bad_times": "drop"})
    memory = in_memory(users, items, actions.filter(good), SCHEMA, SPLITS["time"])
    data = shards(tmp_path / "in", SCHEMA, pl.concat([users, nobody]), items, holes)
    disk = prepare.write_prepared(data, schema, SPLITS["time"], tmp_path / "out", SMALL)
    assert (
        rows(disk) == rows(memory) == rows(in_memory(pl.concat([nobody, users]), items, holes, schema, SPLITS["time"]))
    )
    assert disk.encoders.digest == memory.encoders.digest
    assert disk.users.ids.equals(memory.users.ids)
    lack, bad = n - int(here.sum()), int((here & ~good).sum()) + 1
    assert f"interactions: {lack:,} of {n + 1:,} rows have no id in 'uid' or 'iid'; left out" in messages
    assert f"users: 1 of {users.height + 1:,} rows have no id in 'uid'; left out" in messages
    assert any(f"dropped: {lack:,} rows lack an id, {bad:,} rows have bad times, " in line for line in messages)
    unknown = holes.with_columns(when=pl.when(pl.int_range(pl.len()) == 3).then(None).otherwise("when"))
    both = shards(tmp_path / "both", SCHEMA, users, items, unknown)
    for each in (data, both):  # ids first
        with pytest.raises(DataError, match=r"column 'uid' has \d+ missing ids.*or set schema\.missing = 'drop'"):
            prepare.write_prepared(each, SCHEMA, SPLITS["time"], tmp_path / "refused", SMALL)
    none = shards(tmp_path / "none", schema, users, items, holes.with_columns(uid=pl.lit(None, pl.String)))
    with pytest.raises(DataError, match="have no id in 'uid' or 'iid', and no other row is left"):
        prepare.write_prepared(none, schema, SPLITS["time"], tmp_path / "refused", SMALL)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_side_tables_may_name_their_ids_otherwise(tmp_path: Path, suffix: str) -> None:
    users, items, actions = (
        t.drop(n for n, d in t.schema.items() if d.is_nested() and suffix == "csv") for t in tables()
    )
    features = tuple(
        f for f in SCHEMA.features if f.source in {*users.columns, *items.columns} or f.history or f.computes
    )
    plain = SCHEMA.model_copy(update={"features": features})
    schema = plain.model_copy(update={"users_id": "customer", "items_id": "asin"})
    given = [
        users.rename({"uid": "customer"}),
        items.rename({"iid": "asin"}).with_columns(iid=pl.lit("another column")),
        actions,
    ]
    for name, frame in zip(("users", "items", "interactions"), given, strict=True):
        getattr(frame, f"write_{suffix}")(tmp_path / f"{name}.{suffix}")
    data = DataConfig(**{name: str(tmp_path / f"{name}.{suffix}") for name in ("users", "items", "interactions")})
    found = prepare.write_prepared(data, schema, SPLITS["random"], tmp_path / "out", SMALL)
    memory = in_memory(users, items, actions, plain, SPLITS["random"])
    assert rows(found) == rows(memory)
    assert found.encoders.digest == memory.encoders.digest
    assert check(data.users, data.items, data.interactions, schema).items.equals(
        check(users, items, actions, plain).items, null_equal=True
    )
    with pytest.raises(DataError, match="users: no column 'uid'.*or the id column of this table in schema.users_id"):
        prepare.write_prepared(data, plain, SPLITS["random"], tmp_path / "refused", SMALL)
    with pytest.raises(DataError, match="items: no column 'asim'; did you mean 'asin'"):
        check(data.users, data.items, data.interactions, schema.model_copy(update={"items_id": "asim"}))


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with running_ray():
        yield


@pytest.mark.system  # Ray starts
@pytest.mark.parametrize("kind", ["random", "time"])
def test_ray_prepares_the_same_bytes(tmp_path: Path, kind: str, ray: None) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    options = replace(SMALL, piece_rows=73, bucket_rows=41, threads=2)
    buckets = []
    for engine in ("local", "ray"):
        prepare.write_prepared(data, SCHEMA, SPLITS[kind], tmp_path / engine, replace(options, engine=engine))
        found = prepare.write_buckets(data, SCHEMA, tmp_path / f"{engine}-buckets", replace(options, engine=engine))
        buckets.append([pl.read_parquet(found.file(file)) for file in found.facts.files])
    assert digest(tmp_path / "local") == digest(tmp_path / "ray")
    assert len(buckets[0]) > 5
    assert all(a.equals(b) for a, b in zip(*buckets, strict=True))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.system
def test_ray_goes_on_with_the_buckets_of_a_killed_call(
    tmp_path: Path, ray: None, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    options = replace(SMALL, piece_rows=400, bucket_rows=41, threads=2)
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "whole", options)
    first, second = BucketsSeen(tmp_path / ".out.partial", stop_at=4), BucketsSeen(tmp_path / ".out.partial")
    monkeypatch.setattr(files, "hooks", first)
    with pytest.raises(Stop):
        prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", options)
    monkeypatch.setattr(files, "hooks", second)
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", replace(options, engine="ray"))
    assert any("going on with what an earlier call has left" in m for m in messages)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert len(first.seen) == 4
    assert first.seen.items() < second.seen.items()  # none is made again, and the others are made


def test_one_thread_of_ray_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # as if no test had begun one
    data = shards(tmp_path / "in", SCHEMA, *tables())
    with pytest.raises(ConfigError, match="set `threads=2` or more, or choose `engine='local'`"):
        prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", PrepareOptions("ray", threads=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_indices_of_64_bits_change_no_number(tmp_path: Path) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    buckets = prepare.write_buckets(data, SCHEMA, tmp_path / "buckets", SMALL)
    schema = SCHEMA.model_copy(update={"features": SCHEMA.features[:-1]})
    runs = {}
    for bits, most in ((32, 2**31), (64, 2**10)):
        made, work = tmp_path / f"{bits}", tmp_path / f"work-{bits}"
        made.mkdir()
        work.mkdir()
        writer = PreparedArrays(BucketReader.open(buckets, schema), SPLITS["last"], made, work, max_short_rows=most)

        def each(what: str, task: Callable[[Bucket], bool]) -> None:
            assert all(task(b) for b in buckets.facts.buckets)

        writer.write(each, 1)
        dataset = MemmapDataset.open(made)
        source = dataset.interacted_items.source
        assert source is not None
        assert {dataset.train_indices.dtype, source.dtype} == {np.dtype(f"i{bits // 8}")}
        config = settings(split={"kind": "last"}, loss={"kind": "softmax"}, negatives={"uniform": 20, "random": 0})
        runs[bits] = api.fit(dataset, schema, config)
    for name, weight in runs[32].model.state_dict().items():
        assert torch.equal(weight, runs[64].model.state_dict()[name]), name
    assert _measured(runs[32]) == _measured(runs[64])


def _measured(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.metrics.items() if name.startswith(("test.", "validation."))}


class BucketsSeen:
    """The buckets of a preparation that are seen at its points: inode and time of change, other ones for a bucket that
    is made again. Once it has seen `stop_at` buckets, it stops the preparation."""

    def __init__(self, partial: Path, stop_at: int = 0) -> None:
        self._folder, self._stop_at = partial / "work" / "buckets" / "interactions", stop_at
        self.seen: dict[str, tuple[int, int]] = {}

    def point(self, name: str) -> None:
        found = {path: path.stat() for path in self._folder.glob("[0-9]*.parquet")}
        self.seen |= {path.name: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}
        if len(self.seen) == self._stop_at:
            raise Stop


class Stop(BaseException):
    """An end of the process at a point, for tests."""


class StopAt:
    def __init__(self, last: int) -> None:
        self.last, self.passed = last, list[str]()

    def point(self, name: str) -> None:
        self.passed.append(name)
        if len(self.passed) == self.last:
            raise Stop


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that prepares with the given arguments up to a point, 0 for the end, and returns the points."""

    def prepared_up_to(at: int, *arguments: Any) -> list[str]:
        hooks = StopAt(at)
        with monkeypatch.context() as patched, suppress(Stop):
            patched.setattr(files, "hooks", hooks)
            prepare.write_prepared(*arguments)
        return hooks.passed

    return prepared_up_to


@pytest.mark.parametrize("step", [90, pytest.param(3, marks=pytest.mark.system)])
def test_fault_C13_a_preparation_goes_on_from_every_point(
    tmp_path: Path, step: int, stop: Callable[..., list[str]]
) -> None:
    """What is finished is not made again, and the result has the same bytes."""
    data = shards(tmp_path / "in", SCHEMA, *tables())
    options = replace(SMALL, threads=1, bucket_rows=400, piece_rows=400)

    def stopped(at: int, out: Path) -> int:
        return stop(at, data, SCHEMA, SPLITS["random"], out, options).count("made.written")

    whole = stopped(0, tmp_path / "whole")
    points = len(stop(0, data, SCHEMA, SPLITS["random"], tmp_path / "whole", options))
    assert points >= 50
    last = range(points - 4, points)  # the folder gets its name, and the work is removed
    for at in sorted({*range(1, points, step), *last}):
        first = stopped(at, tmp_path / "out")
        if not (tmp_path / "out").exists():  # else it stopped after the last rename
            assert whole <= first + stopped(0, tmp_path / "out") <= whole + 1, at
        else:
            assert stopped(0, tmp_path / "out") == whole, "a complete one is made again as a whole"
        assert digest(tmp_path / "out") == digest(tmp_path / "whole"), at
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:2]
import kill_points
from twotower.config.toml import load_config
from twotower.data.prepare import write_prepared
from twotower.data.prepare.options import PrepareOptions
if sys.argv[4] != "0":
    kill_points.install(sys.argv[4])
schema, config = load_config(Path(sys.argv[2]))
options = PrepareOptions(piece_rows=100, bucket_rows=80)
write_prepared(config.data, schema, config.split, Path(sys.argv[3]), options)
"""


@pytest.mark.system  # two minutes
def test_fault_C13_a_preparation_killed_50_times_goes_on_to_the_same_folder(tmp_path: Path) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    config = Config(data=data, split=SPLITS["time"])
    (tmp_path / "mine.toml").write_text(dump_config(SCHEMA, config), encoding="utf-8")

    def run(at: int, out: str) -> int:
        words = (Path(__file__).parents[1], tmp_path / "mine.toml", tmp_path / out, at)
        return preloaded.run("-c", KILLED, *words, timeout=100).returncode

    assert run(0, "whole") == 0
    killed = 0
    while not (tmp_path / "out").exists():
        assert run(1 + killed // 4, "out")  # four times at each point from where the former calls have come to
        killed += 1
    assert killed >= 50
    assert run(0, "out") == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "mine.toml", "out", "whole"]


def test_a_preparation_of_other_settings_starts_again(
    tmp_path: Path, stop: Callable[..., list[str]], messages: list[str]
) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    stop(20, data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    assert (tmp_path / ".out.partial").is_dir()
    prepare.write_prepared(data, SCHEMA, SPLITS["time"], tmp_path / "out", SMALL)
    assert any("left by a call with other data or settings; starting again" in m for m in messages)
    prepare.write_prepared(data, SCHEMA, SPLITS["time"], tmp_path / "whole", SMALL)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_a_preparation_starts_again_after_a_restart_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Callable[..., list[str]], messages: list[str]
) -> None:
    """Files that are not on the disk yet are lost by a restart."""
    data = shards(tmp_path / "in", SCHEMA, *tables())
    stop(40, data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    monkeypatch.setattr(resumable, "boot_id", lambda: "another start")
    for path in (tmp_path / ".out.partial").rglob("*.parquet"):
        path.write_bytes(b"")
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    assert not any("going on with what an earlier call has left" in m for m in messages)
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "whole", SMALL)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_preparation_goes_on_with_more_memory(
    tmp_path: Path, stop: Callable[..., list[str]], messages: list[str]
) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    first = PrepareOptions(memory=10**6, threads=1)
    stop(14, data, SCHEMA, SPLITS["last"], tmp_path / "out", first)
    other = PrepareOptions(memory=10**8, threads=2)
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", other)
    assert any("going on with what an earlier call has left" in m for m in messages)
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "whole", SMALL)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_one_process_at_a_time_prepares_a_folder(tmp_path: Path) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    (tmp_path / ".out.partial").mkdir()
    with locks.lock(tmp_path / ".out.partial" / "lock") as held:
        held.write_holder("prepare")
        with pytest.raises(
            RunError, match=f"another prepare is running \\(pid {os.getpid()} on .*let it end, or stop it"
        ):
            prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)


def test_a_preparation_of_other_tables_starts_again(tmp_path: Path, stop: Callable[..., list[str]]) -> None:
    """The same file as another table is another plan."""
    ids = pl.int_range(120, eager=True)
    both = pl.DataFrame({"user_id": ids, "item_id": ids, "side": ids})
    both.write_parquet(tmp_path / "both.parquet")
    actions = checkerboard()[2]
    data = shards(tmp_path / "in", CHECKERBOARD_SCHEMA, None, None, actions)
    wrong, right = (data.model_copy(update={table: str(tmp_path / "both.parquet")}) for table in ("users", "items"))
    stop(30, wrong, CHECKERBOARD_SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    for name in ("out", "whole"):
        prepare.write_prepared(right, CHECKERBOARD_SCHEMA, SPLITS["last"], tmp_path / name, SMALL)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_fault_C14_a_bucket_that_changes_between_two_passes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buckets = prepare.write_buckets(shards(tmp_path / "in", SCHEMA, *tables()), SCHEMA, tmp_path / "buckets", SMALL)
    changed = buckets.file(buckets.facts.files[2])
    rule = bucket_reader.SplitBuckets.rule

    def grown(self: bucket_reader.SplitBuckets, ids: pl.Series) -> Any:
        found = rule(self, ids)
        pl.read_parquet(changed).with_columns(~pl.col("positive")).write_parquet(changed)
        return found

    monkeypatch.setattr(bucket_reader.SplitBuckets, "rule", grown)
    with pytest.raises(RunError, match=r"00002.parquet: was changed while it was read; call again when it is complete"):
        prepare.write_prepared(DataConfig(buckets=str(buckets.folder)), SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)


def test_fault_C16_a_limit_of_the_size_of_files_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """polars has errors of its own for what it cannot write."""
    data = shards(tmp_path / "in", SCHEMA, *tables())
    (tmp_path / "mine.toml").write_text(dump_config(SCHEMA, Config(data=data, split=SPLITS["last"])), encoding="utf-8")
    words = ["prepare", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "out")]
    for limit in (2_000, 5_000, 8_000):  # of the plan; of a piece or a bucket; of an array
        with largest_file(limit):
            code = run_command(words)
        said = capsys.readouterr().err
        assert code == 2, said
        assert "Traceback" not in said
        assert re.search(r"error: .*cannot be written \(.*\)", said)
        assert not (tmp_path / "out").exists()
    assert run_command(words) == 0


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of the files that this process writes, in bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_fault_C14_a_file_that_changes_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    changed = tmp_path / "in" / "interactions" / "part-2.parquet"

    settled = bucketing._settled_sides

    def grown(*arguments: Any) -> Any:
        found = settled(*arguments)
        frame = pl.read_parquet(changed)
        pl.concat([frame, frame.head(1)]).write_parquet(changed)
        return found

    monkeypatch.setattr(bucketing, "_settled_sides", grown)
    with pytest.raises(
        DataError, match=r"part-2.parquet: was changed while it was read; call again when it is complete"
    ):
        prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_fault_C15_a_history_that_exceeds_the_memory_is_refused_with_its_user(tmp_path: Path) -> None:
    n = 20_000
    actions = pl.DataFrame(
        {"user_id": ["busy"] * n + ["a", "b"], "item_id": np.arange(n + 2), "at": np.arange(n + 2), "liked": 1}
    )
    data = shards(tmp_path / "in", CHECKERBOARD_SCHEMA, None, None, actions)
    message = r"the history of user 'busy' has 20,000 interactions, which take about 4 MB; `memory` is 1 MB"
    with pytest.raises(ConfigError, match=message):
        prepare.write_prepared(
            data, CHECKERBOARD_SCHEMA, SPLITS["last"], tmp_path / "out", PrepareOptions(memory=10**6)
        )
    assert not (tmp_path / "out").exists()
    more = prepare.write_prepared(data, CHECKERBOARD_SCHEMA, SPLITS["last"], tmp_path / "out", PrepareOptions())
    assert len(more.parts) == n + 2


def test_options_that_no_preparation_can_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="`engine` is 'spark', allowed are local, ray, ray://HOST:PORT"):
        PrepareOptions("spark").job_engine()
    with pytest.raises(ConfigError, match="`memory` is 1,000 bytes, expected at least 1 MB"):
        PrepareOptions(memory=1000).resolved()
    with pytest.raises(ConfigError, match="`threads` is -1, expected a number, or 0 to choose it"):
        PrepareOptions(threads=-1).resolved()


def test_buckets_of_another_program_are_prepared(tmp_path: Path) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "whole", SMALL)
    prepare.write_buckets(data, SCHEMA, tmp_path / "buckets", SMALL)
    again = DataConfig(buckets=str(tmp_path / "buckets"))
    prepare.write_prepared(again, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert Buckets.open(tmp_path / "buckets").facts.rows, "they stay"
    with pytest.raises(ConfigError, match="data.buckets is not read by a training; prepare it, and set data.prepared"):
        api.read(Config(data=again, split=SPLITS["last"]), SCHEMA)
    with pytest.raises(ConfigError, match="`engine` is 'ray', but data.buckets are sorted already; leave it out"):
        prepare.write_prepared(again, SCHEMA, SPLITS["last"], tmp_path / "out", PrepareOptions("ray", threads=2))
    both = data.model_copy(update={"buckets": again.buckets})
    prepare.write_prepared(both, SCHEMA, SPLITS["last"], tmp_path / "both", SMALL)
    assert digest(tmp_path / "both") == digest(tmp_path / "whole"), "the buckets are read"
    with pytest.raises(ConfigError, match="data.interactions is missing"):
        prepare.write_buckets(again, SCHEMA, tmp_path / "more", SMALL)


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        (lambda t: t.drop("time"), RunError, "no column 'time'"),
        (lambda t: t.drop("value.stars"), RunError, "no column 'value.stars'"),
        (lambda t: t.with_columns(weight=pl.lit(1.0)), ConfigError, "column 'weight', and schema.weight is empty"),
        (lambda t: t.reverse(), RunError, r"does not follow docs/prepared-format.md .rule 10: record 1 has user"),
        (lambda t: t.head(3), RunError, "rule 14: number of records 3, expected"),
        (lambda t: t.with_columns(item=pl.lit(10**6, pl.Int32)), RunError, "rule 8: record 0 has item 1000000"),
        (lambda t: t.with_columns(item=pl.col("item").first().over("user")), RunError, "rule 11: record . repeats"),
    ],
)  # fmt: skip
def test_buckets_that_do_not_follow_the_contract_are_refused(
    tmp_path: Path, change: Any, error: type[Exception], expected: str
) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    buckets = prepare.write_buckets(data, SCHEMA, tmp_path / "buckets", SMALL)
    path = buckets.file(buckets.facts.files[1])
    change(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(error, match=expected) as raised:
        prepare.write_prepared(DataConfig(buckets=str(buckets.folder)), SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    assert path.name in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        ({"positive_above": 1.0}, "positive_above 3.0, expected 1.0 as in the schema"),
        ({"label": "", "positive_above": 0.0}, "label 'stars', expected '' as in the schema"),
        ({"time_unit": "ms"}, "time_unit 's', expected 'ms' as in the schema"),
        ({"time_format": "%d/%m/%Y"}, "time_format '', expected '%d/%m/%Y' as in the schema"),
        ({"duplicates": "error"}, "duplicates 'last', expected 'error' as in the schema"),
        ({"duplicates": "keep"}, "duplicates 'last', expected 'keep' as in the schema"),
    ],
)
def test_fault_G30_buckets_of_another_schema_are_refused(tmp_path: Path, update: dict[str, Any], expected: str) -> None:
    buckets = prepare.write_buckets(shards(tmp_path / "in", SCHEMA, *tables()), SCHEMA, tmp_path / "buckets", SMALL)
    if not update.get("label", True):  # of which nothing is averaged
        update = update | {"features": tuple(f for f in SCHEMA.features if f.name != "mean_stars")}
    other = SCHEMA.model_copy(update=update)
    with pytest.raises(
        ConfigError,
        match=rf"the buckets were written for another schema \((log\.)?{re.escape(expected)}\); write them again",
    ):
        prepare.write_prepared(DataConfig(buckets=str(buckets.folder)), other, SPLITS["last"], tmp_path / "out", SMALL)
    assert api.check_buckets(buckets.folder, SCHEMA) == []
    assert any(expected in line for line in api.check_buckets(buckets.folder, other))


def test_fault_C16_a_full_disk_keeps_what_is_done_for_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    write, calls = npy_writer.write_blocks, list[int]()

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(npy_writer, "write_blocks", full)
    with pytest.raises(
        RunError, match=r"cannot be written \(No space left on device\); call again to go on, or remove .out.partial"
    ):
        prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "whole", SMALL)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_fault_C16_a_disk_without_room_for_a_split_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write to a mapped page that the disk has no room for would end the process."""

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bucket_reader, "temporary_array", partial(temporary_array, memory_bytes=0))
    data = shards(tmp_path / "in", SCHEMA, *tables())
    for kind in ("random", "time"):
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            RunError, match="no room for 0 MB of temporary arrays .No space left on device.; free some$"
        ):
            prepare.write_prepared(data, SCHEMA, SPLITS[kind], tmp_path / kind, SMALL)
        monkeypatch.undo()
        monkeypatch.setattr(bucket_reader, "temporary_array", partial(temporary_array, memory_bytes=0))
        prepare.write_prepared(data, SCHEMA, SPLITS[kind], tmp_path / kind, SMALL)


def test_no_bucket_is_larger_than_asked_but_for_a_single_user(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user = np.minimum((rng.pareto(0.5, 3000)).astype(int), 400)
    actions = pl.DataFrame({"user_id": user, "item_id": rng.integers(0, 900, 3000), "at": np.arange(3000), "liked": 1})
    data = shards(tmp_path / "in", CHECKERBOARD_SCHEMA, None, None, actions)
    buckets = prepare.write_buckets(data, CHECKERBOARD_SCHEMA, tmp_path / "out", SMALL).facts.buckets
    assert len(buckets) > 5
    assert all(b.rows <= 150 or b.users[1] - b.users[0] == 1 for b in buckets)


def test_a_training_reads_its_own_files_whatever_becomes_of_the_prepared_ones(tmp_path: Path) -> None:
    prepared(tmp_path, CHECKERBOARD_SCHEMA, "last", None, None, checkerboard()[2])
    config = settings(split={"kind": "last"}, data={"prepared": str(tmp_path / "out")})
    given, schema = api.read(config, None)

    class Remover(Callback):
        def on_epoch_end(self, history: list[dict[str, Any]]) -> None:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)

    run = api.fit(given, schema, config, folder=tmp_path / "run", callback=Remover())
    assert not (tmp_path / "out").exists()
    assert api.evaluate(twotower.load(tmp_path / "run"))["test.auc"] == pytest.approx(run.metrics["test.auc"])
    # A run of other tables in the folder does not read what is left of this one.
    api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "other")
    (tmp_path / "other" / "metrics.json").unlink()
    (tmp_path / "run" / "prepared").rename(tmp_path / "other" / "prepared")
    api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "other", resume=True, override=True)
    assert not isinstance(twotower.load(tmp_path / "other").dataset, MemmapDataset)


MEASURED = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import numpy as np, polars as pl, torch
torch.set_num_threads(1)
from held_memory import held, most_held
from twotower.config.toml import load_config
from twotower.data.prepare import write_prepared
from twotower.data.prepare.options import PrepareOptions
from twotower.data.memmap import MemmapDataset
from twotower.train.trainer import Trainer

schema, config = load_config(Path(sys.argv[1]))
options = PrepareOptions(memory=100 * 10**6, piece_rows=2**16, bucket_rows=2**17)
before = held()
preparing = most_held(lambda: write_prepared(config.data, schema, config.split, Path(sys.argv[2]), options))
trainer = Trainer(MemmapDataset.open(sys.argv[2]), config)
epoch = trainer.objective.sampler.epoch(0)
for number in range(20):
    trainer.step(epoch, number * 7)
print(json.dumps({"preparing": preparing, "training": held() - before}))
"""


@pytest.mark.system  # half a minute
def test_fault_C7_interactions_beyond_memory_are_prepared_and_trained_in_bounded_memory(tmp_path: Path) -> None:
    """Sixteen times the interactions take no more than a fifth and 60 MB more memory that cannot be given back."""
    found = {}
    for n in (200_000, 3_200_000):
        folder = tmp_path / str(n)
        folder.mkdir()
        rng = np.random.default_rng(0)
        for part in range(4):
            pl.DataFrame(
                {
                    "user_id": rng.integers(0, 20_000, n // 4),
                    "item_id": (rng.random(n // 4) ** 3 * 5_000).astype(np.int64),
                    "at": np.arange(n // 4) + part * n,
                }
            ).write_parquet(folder / f"{part}.parquet")
        body: dict[str, Any] = {
            "data": {"interactions": "*.parquet"},
            "split": {"kind": "last"},
            "loss": {"kind": "softmax"},
            "negatives": {"uniform": 100},
            "model": {"width": 4, "pairs": [{"user": {"layers": [4]}, "item": {"layers": [4]}}]},
            "train": {"batch_size": 512, "device": "cpu", "history_scope": "causal", "monitor": "validation.recall@10"},
            "schema": {
                "time": "at", "time_unit": "order",
                "features": [
                    {"name": "user_id", "side": "user", "kind": "categorical"},
                    {"name": "item_id", "side": "item", "kind": "categorical"},
                    {"name": "met", "side": "user", "kind": "sequence", "pooling": "decay"},
                ],
            },
        }  # fmt: skip
        schema, config = parse_config(body)
        assert schema is not None
        (folder / "config.toml").write_text(dump_config(schema, config), encoding="utf-8")
        tests = str(Path(__file__).parents[1])
        command = [sys.executable, "-c", MEASURED, tests, str(folder / "config.toml"), str(folder / "out")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        found[n] = json.loads(done.stdout.splitlines()[-1])
    few, many = found.values()
    for stage in ("preparing", "training"):
        assert many[stage] < few[stage] * 1.2 + 60, found


def test_a_prepared_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    data = shards(tmp_path / "in", CHECKERBOARD_SCHEMA, None, None, checkerboard()[2])
    prepare.write_prepared(data, CHECKERBOARD_SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    out = tmp_path / "out"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"it holds notes\.txt"):
        prepare.write_prepared(data, CHECKERBOARD_SCHEMA, SPLITS["last"], out, SMALL)
    assert (out / "notes.txt").read_text() == "mine"
    assert len(MemmapDataset.open(out).pairs.user)


def test_fault_G8_a_dataset_whose_place_another_takes_is_not_mixed_with_it(tmp_path: Path) -> None:
    """Arrays that are read late, and files that get another name, are of the dataset that was opened."""
    config = settings(split={"kind": "last"})
    first = checkerboard()[2]
    one = prepared(tmp_path / "1", CHECKERBOARD_SCHEMA, "last", None, None, first)
    other = first.with_columns(liked=pl.col("liked").shuffle(seed=1))
    two = prepared(tmp_path / "2", CHECKERBOARD_SCHEMA, "last", None, None, other)
    run = api.fit(one, CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run")
    loaded = twotower.load(tmp_path / "run")
    api.fit(two, CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run", resume=True, override=True)
    measured = api.evaluate(loaded)
    assert {m: v for m, v in run.metrics.items() if m in measured} == measured
    with pytest.raises(RunError, match="another dataset has replaced it; open the folder again"):
        api.publish(loaded, tmp_path / "store")
    api.publish(twotower.load(tmp_path / "run"), tmp_path / "store")

    prepare.write_prepared(shards(tmp_path / "in", CHECKERBOARD_SCHEMA, None, None, other), CHECKERBOARD_SCHEMA,
                        SPLITS["last"], one.folder, SMALL)  # fmt: skip
    with pytest.raises(RunError, match="another dataset has replaced it; open the folder again"):
        api.fit(one, CHECKERBOARD_SCHEMA, config, folder=tmp_path / "late")
    again = api.fit(MemmapDataset.open(one.folder), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "late", resume=True)
    assert again.dataset.digest == two.digest


def test_a_run_on_prepared_data_goes_on_without_them(tmp_path: Path) -> None:
    prepared(tmp_path, CHECKERBOARD_SCHEMA, "last", None, None, checkerboard()[2])
    config = settings(split={"kind": "last"}, data={"prepared": str(tmp_path / "out")}, train={"epochs": 2})
    given, schema = api.read(config, None)
    whole = api.fit(given, schema, config, folder=tmp_path / "run")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "run" / "metrics.json").unlink()
    named, again = load_config(tmp_path / "run" / "config.toml")
    given, schema = api.read(again, named)
    run = api.fit(given, schema, again, folder=tmp_path / "run", resume=True)
    assert run.metrics["test.auc"] == whole.metrics["test.auc"]


def lacks(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts.pop(key)


def of_kind(kind: str) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts["schema"]["features"][0].update(kind=kind)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *((lacks(key), rf"prepared\.json: damaged, or of another version \('{key}' is missing\)")
          for key in ("schema", "rows", "columns", "ends", "split", "digest")),
        (of_kind("of tomorrow"), "damaged, or of another version"),
        (of_kind("code_of_prepared_data:Mine"), "is not imported; import it, or pass `kinds='code_of_prepared_data'`$"),
    ],
    ids=["schema", "rows", "columns", "ends", "split", "digest", "of another version", "code, which is not imported"],
)  # fmt: skip
def test_facts_that_lack_something_are_a_run_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    prepared(tmp_path, CHECKERBOARD_SCHEMA, "last", None, None, checkerboard()[2])
    facts = json.loads((tmp_path / "out" / "prepared.json").read_text())
    change(facts)
    (tmp_path / "out" / "prepared.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match=words) as raised:
        MemmapDataset.open(tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_of_a_sides_parquet_only_named_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def watched(frame: pl.DataFrame, *rest: Any) -> tuple[pl.DataFrame, pl.DataFrame | None]:
        seen.append(frame.columns)
        return check_side(frame, *rest)

    monkeypatch.setattr("twotower.data.tables.check_side", watched)
    frames = [None if f is None else f.with_columns(wide=pl.lit("x" * 100)) for f in tables()]
    prepared(tmp_path, SCHEMA, "last", *frames)
    assert seen
    assert not any("wide" in columns for columns in seen)
