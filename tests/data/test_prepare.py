"""A dataset prepared on a disk is the one prepared in memory, and takes no memory that grows with its interactions."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything, settings

import twotower
from twotower import api
from twotower.arrays.ragged import Ragged
from twotower.config.experiment import Config
from twotower.config.toml import load_config, parse_config
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.memmap import MemmapDataset
from twotower.data.prepare import PrepareSizes
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import check, check_side
from twotower.errors import ConfigError, DataError, RunError
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.side import SIDES
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.pooling.decay import Decay
from twotower.retrieval.explanation import stored_history, stored_items
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
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
SPLITS = {"time": SplitConfig(kind="time", test=0.13, validation=0.11), "last": SplitConfig(kind="last")}


def tables() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """With times that are equal, and pairs that come twice."""
    users, items, actions = everything()
    rng = np.random.default_rng(1)
    again = actions.sample(90, seed=2).with_columns(stars=pl.lit(5, pl.Int64))
    actions = pl.concat([actions.with_columns(stars=pl.col("stars").cast(pl.Int64)), again]).sample(
        fraction=1, shuffle=True, seed=3
    )
    return users, items, actions.with_columns(when=1_600_000_000 + rng.integers(0, 300, actions.height))


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


SMALL = PrepareSizes(block_rows=101, bucket_rows=150, side_block_rows=17)
"""Small worlds have several blocks and buckets."""


def rows(data: Dataset) -> list[tuple[Any, ...]]:
    assert data.times is not None
    return sorted(
        zip(data.pairs.user.tolist(), data.pairs.item.tolist(), data.pairs.positive.tolist(), data.parts.tolist(),
            data.times.tolist(), strict=True)
    )  # fmt: skip


def lists(column: Ragged) -> list[list[int]]:
    return [column.values[a:b].tolist() for a, b in zip(column.offsets, column.offsets[1:], strict=False)]


@pytest.mark.parametrize("kind", SPLITS)
def test_what_is_prepared_on_a_disk_is_what_is_prepared_in_memory(
    tmp_path: Path, kind: str, messages: list[str]
) -> None:
    frames = tables()
    memory = build_dataset(check(*frames, SCHEMA), SCHEMA, SPLITS[kind])
    data = shards(tmp_path / "in", SCHEMA, *frames)
    prepare.write_prepared(data, SCHEMA, SPLITS[kind], tmp_path / "out", SMALL)
    disk = MemmapDataset.open(tmp_path / "out")
    assert any("90 rows repeated a pair" in line for line in messages)
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


def test_fault_G10_categories_of_a_csv_are_prepared_as_they_are_spelled(tmp_path: Path) -> None:
    users, items, actions = tables()
    zips = pl.Series("city", ["02139", "2139", "1e5", "1.10", "1.1"] * 12)
    users = users.with_columns(zips)
    data = shards(tmp_path / "in", SCHEMA, users, items, actions)
    users.write_csv(tmp_path / "users.csv")
    data = data.model_copy(update={"users": str(tmp_path / "users.csv")})
    prepare.write_prepared(data, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    disk = MemmapDataset.open(tmp_path / "out")
    assert disk.users.frame["city"].to_list() == zips.to_list()
    assert (
        disk.encoders.digest
        == build_dataset(check(users, items, actions, SCHEMA), SCHEMA, SPLITS["last"]).encoders.digest
    )


def test_a_side_without_a_table_is_the_ids_of_the_interactions(tmp_path: Path) -> None:
    _, _, actions = checkerboard()
    config = SplitConfig(kind="last")
    memory = build_dataset(check(None, None, actions, CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, config)
    prepare.write_prepared(
        shards(tmp_path / "in", CHECKERBOARD_SCHEMA, None, None, actions),
        CHECKERBOARD_SCHEMA,
        config,
        tmp_path / "out",
        SMALL,
    )
    disk = MemmapDataset.open(tmp_path / "out")
    assert rows(disk) == rows(memory)
    assert disk.users.ids.equals(memory.users.ids)


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
        again = api.fit(tables(), schema, config)
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


def test_other_settings_are_refused(tmp_path: Path) -> None:
    data = shards(tmp_path / "in", SCHEMA, *tables())
    with pytest.raises(ConfigError, match="'random' draws from all rows at once; to prepare, set 'last' or 'time'"):
        prepare.write_prepared(data, SCHEMA, SplitConfig(), tmp_path / "out", SMALL)
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
        (lambda t: t.with_columns(iid=pl.lit("nobody")), "ids of 'iid' that are not in items"),
        (lambda t: t.with_columns(uid=pl.lit(7)), "give both the same type"),
        (lambda t: t.with_columns(stars=pl.lit(1)), "no row has 'stars' above 3"),
        (lambda t: t.drop("when"), "no column 'when'"),
        (lambda t: t.head(0), "no rows, expected at least one"),
        (lambda t: t.with_columns(when=pl.lit("now")), "row 1 holds 'now', expected a number or a date"),
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


def prepared(folder: Path, schema: Schema, split: str, *frames: pl.DataFrame | None) -> MemmapDataset:
    data = shards(folder / "in", schema, *frames)
    return prepare.write_prepared(data, schema, SPLITS[split], folder / "out", SMALL)


def test_an_order_that_cannot_be_compared_from_shard_to_shard_is_refused(tmp_path: Path) -> None:
    _, _, actions = checkerboard()
    for n, (change, expected) in enumerate(
        (
            (pl.col("at") + 0.5, "'at' holds fractions or numbers beyond 64 bits; to prepare, give whole numbers"),
            (pl.from_epoch("at"), "'at' is a date in some rows and a number in others"),
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
        memory = build_dataset(check(side, None, actions, CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, SPLITS["last"])
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
    memory = check(tmp_path / "users.csv", None, actions, CHECKERBOARD_SCHEMA)
    assert rows(disk) == rows(build_dataset(memory, CHECKERBOARD_SCHEMA, SPLITS["last"]))


def test_buckets_are_of_one_size_where_few_users_have_most_interactions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    user = np.minimum((rng.pareto(0.5, 3000)).astype(int), 400)
    actions = pl.DataFrame({"user_id": user, "item_id": rng.integers(0, 900, 3000), "at": np.arange(3000), "liked": 1})
    sizes: list[int] = []
    sort = prepare._Preparation._sort_bucket

    def sized(self: Any, path: Path) -> int:
        sizes.append(sort(self, path))
        return sizes[-1]

    monkeypatch.setattr(prepare._Preparation, "_sort_bucket", sized)
    prepared(tmp_path, CHECKERBOARD_SCHEMA, "last", None, None, actions)
    assert len(sizes) > 5
    assert max(sizes) <= 150 + np.bincount(user).max()


def test_what_a_killed_preparation_left_is_removed_by_the_next(tmp_path: Path) -> None:
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    left = tmp_path / f".out.{gone.stdout.strip()}.tmp"
    left.mkdir()
    prepared(tmp_path, CHECKERBOARD_SCHEMA, "last", None, None, checkerboard()[2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


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
import json, logging, re, sys
from pathlib import Path
import numpy as np, polars as pl, torch
torch.set_num_threads(1)
from twotower.config.toml import load_config
from twotower.data.prepare import PrepareSizes, write_prepared
from twotower.data.memmap import MemmapDataset
from twotower.train.trainer import Trainer

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

schema, config = load_config(Path(sys.argv[1]))
n = int(sys.argv[2])
sizes = PrepareSizes(block_rows=2**16, bucket_rows=2**17)
most = [0.0]
class Meter(logging.Handler):
    def emit(self, record):
        most[0] = max(most[0], held())
logging.getLogger("twotower").addHandler(Meter())
logging.getLogger("twotower").setLevel(logging.INFO)
before = held()
write_prepared(config.data, schema, config.split, Path(sys.argv[3]), sizes)
most[0] = max(most[0], held())
trainer = Trainer(MemmapDataset.open(sys.argv[3]), config)
epoch = trainer.objective.sampler.epoch(0)
for number in range(20):
    trainer.step(epoch, number * 7)
print(json.dumps({"preparing": most[0] - before, "training": held() - before}))
"""


@pytest.mark.system  # half a minute
def test_fault_C7_interactions_beyond_memory_are_prepared_and_trained_in_bounded_memory(tmp_path: Path) -> None:
    """Sixteen times the interactions take no more than a fifth more memory that cannot be given back."""
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
        from twotower.config.toml import dump_config

        (folder / "config.toml").write_text(dump_config(schema, config), encoding="utf-8")
        command = [sys.executable, "-c", MEASURED, str(folder / "config.toml"), str(n), str(folder / "out")]
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


@pytest.mark.parametrize("gone", ["schema", "rows", "columns", "ends", "split", "digest"])
def test_facts_that_lack_something_are_a_run_error(tmp_path: Path, gone: str) -> None:
    prepared(tmp_path, CHECKERBOARD_SCHEMA, "last", None, None, checkerboard()[2])
    facts = json.loads((tmp_path / "out" / "prepared.json").read_text())
    del facts[gone]
    (tmp_path / "out" / "prepared.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match=rf"prepared\.json: damaged, or of another version \({gone}: Field required\)"):
        MemmapDataset.open(tmp_path / "out")


def test_a_schema_of_another_version_is_a_run_error_of_one_line(tmp_path: Path) -> None:
    prepared(tmp_path, CHECKERBOARD_SCHEMA, "last", None, None, checkerboard()[2])
    facts = json.loads((tmp_path / "out" / "prepared.json").read_text())
    facts["schema"]["features"][0]["kind"] = "of tomorrow"
    (tmp_path / "out" / "prepared.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match="damaged, or of another version") as raised:
        MemmapDataset.open(tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_a_schema_that_names_code_imports_nothing(tmp_path: Path) -> None:
    prepared(tmp_path, CHECKERBOARD_SCHEMA, "last", None, None, checkerboard()[2])
    facts = json.loads((tmp_path / "out" / "prepared.json").read_text())
    facts["schema"]["features"][0]["kind"] = "code_of_prepared_data:Mine"
    (tmp_path / "out" / "prepared.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match="is not imported; import it, or pass `kinds='code_of_prepared_data'`$"):
        MemmapDataset.open(tmp_path / "out")


def test_a_preparation_of_another_host_is_left_alone(tmp_path: Path) -> None:
    held = tmp_path / ".out.4194303.tmp" / "work"  # no process of this host has this number
    held.mkdir(parents=True)
    code = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(held / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        dead = tmp_path / ".out.1.tmp" / "work"  # there is a process of this number, as in every container
        dead.mkdir(parents=True)
        (dead / "lock").touch()
        prepared(tmp_path, CHECKERBOARD_SCHEMA, "last", None, None, checkerboard()[2])
        assert sorted(p.name for p in tmp_path.iterdir()) == [".out.4194303.tmp", "in", "out"]
        other.communicate(b"\n")


def test_of_a_sides_parquet_only_named_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def watched(frame: pl.DataFrame, *rest: Any) -> pl.DataFrame:
        seen.append(frame.columns)
        return check_side(frame, *rest)

    monkeypatch.setattr(prepare, "check_side", watched)
    frames = [None if f is None else f.with_columns(wide=pl.lit("x" * 100)) for f in tables()]
    prepared(tmp_path, SCHEMA, "last", *frames)
    assert seen
    assert not any("wide" in columns for columns in seen)
