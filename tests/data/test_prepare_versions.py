"""Prepared versions are those of tables in memory, and train, are evaluated and served as they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from version_worlds import CHANGING_SCHEMA, CITY_SCHEMA, Tables, changing, moving_city
from worlds import settings

import twotower
from twotower import api
from twotower.arrays.ragged import Ragged
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.memmap import MemmapDataset
from twotower.data.prepare.options import PrepareOptions
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import DataError, RunError
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.side import SIDES
from twotower.files import layout

SCHEMA: Schema = CHANGING_SCHEMA.model_copy(
    update={
        "features": (
            *(f for f in CHANGING_SCHEMA.features if f.name != "fans"),
            Sequence(name="brands", side="user", feature="brand"),
        )
    }
)
SPLITS = {"time": SplitConfig(kind="time"), "last": SplitConfig(kind="last"), "random": SplitConfig()}


def files_of(tables: Tables, folder: Path) -> DataConfig:
    """The tables as Parquet."""
    for name, table in zip(("users", "items", "interactions"), tables, strict=True):
        table.write_parquet(folder / f"{name}.parquet")
    paths = (str(folder / f"{name}.parquet") for name in ("users", "items", "interactions"))
    return DataConfig(**dict(zip(("users", "items", "interactions"), paths, strict=True)))


def prepared(tables: Tables, schema: Schema, split: SplitConfig, folder: Path) -> MemmapDataset:
    """Prepared in buckets and blocks of a few rows."""
    options = PrepareOptions(piece_rows=300, bucket_rows=200, side_block_rows=17)
    return prepare.write_prepared(files_of(tables, folder), schema, split, folder / "out", options)


def test_a_row_without_a_time_is_prepared(tmp_path: Path) -> None:
    users, items, actions = moving_city()
    first = pl.int_range(pl.len()).over("user_id") == 0
    users = users.with_columns(pl.when(first).then(None).otherwise("since").alias("since"))
    memory = build_dataset(check(users, items, actions, CITY_SCHEMA), CITY_SCHEMA, SPLITS["time"])
    disk = prepared((users, items, actions), CITY_SCHEMA, SPLITS["time"], tmp_path)
    of_memory, of_disk = memory.users.versions, disk.users.versions
    assert of_memory is not None
    assert of_disk is not None
    assert len(of_disk) == len(of_memory) == users.height
    columns = ["user_id", "city", "__since"]
    assert of_disk.frame.select(columns).sort(columns).equals(of_memory.frame.select(columns).sort(columns))
    frames = [data.users.frame.select("user_id", "city").sort("user_id") for data in (memory, disk)]
    assert frames[0].equals(frames[1])


def values(column: Any, rows: npt.NDArray[Any]) -> list[Any]:
    """The values of some rows of a column."""
    return [column.row(r).tolist() for r in rows.tolist()] if isinstance(column, Ragged) else column[rows].tolist()


def seen(data: Dataset, side: Any) -> pl.DataFrame:
    """What each interaction reads of a side, histories left out, by its ids and time."""
    rows = data.pairs.user if side == "user" else data.pairs.item
    of_side, at = data.side(side).by_version(), data.input_rows(side, rows, np.arange(len(rows)))
    columns = {f.name: values(of_side.columns[f.name], at) for f in data.schema.columns(side)}
    keys = {
        "u": data.users.ids.gather(data.pairs.user),
        "i": data.items.ids.gather(data.pairs.item),
        "part": data.parts,
    }
    return pl.DataFrame(keys | columns).sort("u", "i")


@pytest.mark.parametrize("split", SPLITS)
def test_each_interaction_reads_what_it_reads_in_memory(tmp_path: Path, split: str) -> None:
    disk = prepared(changing(), SCHEMA, SPLITS[split], tmp_path)
    memory = build_dataset(check(*changing(), SCHEMA), SCHEMA, SPLITS[split])
    assert disk.has_versions
    for side in SIDES:
        assert_frame_equal(
            seen(disk, side), seen(memory, side)
        )  # sums over users in another order are rounded otherwise
    row_of = {user: row for row, user in enumerate(memory.users.ids.to_list())}
    found, expected = disk.users.columns["brands"], memory.users.columns["brands"]
    assert isinstance(found, Ragged)
    assert isinstance(expected, Ragged)
    for row, user in enumerate(disk.users.ids.to_list()):
        assert found.row(row).tolist() == expected.row(row_of[user]).tolist(), "brands of the time of each interaction"


def test_a_prepared_run_is_measured_by_the_past_and_serves_the_newest(tmp_path: Path) -> None:
    disk = prepared(moving_city(), CITY_SCHEMA, SplitConfig(kind="last"), tmp_path)
    config = settings(
        train={"epochs": 6, "batch_size": 64, "lr": 0.1, "monitor": "validation.recall@5"}, loss={"kind": "softmax"},
        split={"kind": "last"}, negatives={"uniform": 20}, index={"kind": "exact", "min_recall": 0.5},
    )  # fmt: skip
    run = twotower.fit(disk, CITY_SCHEMA, config, folder=tmp_path / "run")
    assert run.metrics["test.recall@5"] > 0.95
    assert api.evaluate(twotower.load(tmp_path / "run"))["test.recall@5"] == run.metrics["test.recall@5"]
    bundle = twotower.publish(run, tmp_path / "store")
    np.testing.assert_allclose(np.load(bundle.folder / layout.USER_VECTORS), run.factors().users.numpy(), atol=1e-6)
    assert api.evaluate_bundle(twotower.retriever(tmp_path / "store"))["exact"]["recall@5"] < 0.5


def test_buckets_hold_the_versions(tmp_path: Path) -> None:
    """Prepared from buckets they are the same bytes as from the log."""
    split = SPLITS["time"]
    disk = prepared(changing(), SCHEMA, split, tmp_path)
    data = files_of(changing(), tmp_path)
    prepare.write_buckets(data, SCHEMA, tmp_path / "buckets")
    assert (tmp_path / "buckets" / layout.versions("user")).exists()
    again = prepare.write_prepared(DataConfig(buckets=str(tmp_path / "buckets")), SCHEMA, split, tmp_path / "again")
    assert again.digest == disk.digest


DAMAGES: dict[str, Any] = {
    "column 'city' is missing": lambda t: t.drop("city"),
    "column '__time' is missing": lambda t: t.drop("__time"),
    "does not hold a time for each version": lambda t: t.with_columns(pl.col("__time").cast(pl.Float64)),
    "one id and time twice": lambda t: pl.concat([t, t.head(1)]),
    "an id that the other table lacks": lambda t: t.with_columns(pl.lit("nobody").alias("uid")),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_fault_C17_versions_of_buckets_that_cannot_be_used_are_one_line(tmp_path: Path, words: str) -> None:
    prepare.write_buckets(files_of(changing(), tmp_path), SCHEMA, tmp_path / "buckets")
    path = tmp_path / "buckets" / layout.versions("user")
    DAMAGES[words](pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(RunError, match=f"user_versions.parquet.*{words}"):
        prepare.write_prepared(DataConfig(buckets=str(tmp_path / "buckets")), SCHEMA, SPLITS["time"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fault_C17_tables_without_versions_and_features_without_gaps_are_refused_as_in_memory(tmp_path: Path) -> None:
    users, items, log = moving_city()
    make = partial(prepare.write_prepared, split=SplitConfig(kind="last"), out=tmp_path / "out")
    with pytest.raises(DataError, match="neither users nor items have it"):
        make(files_of((users.drop("since").unique("user_id"), items, log), tmp_path), CITY_SCHEMA)
    city = Categorical(name="city", side="user", missing="error")
    schema = CITY_SCHEMA.model_copy(update={"features": (city, *CITY_SCHEMA.features[1:])})
    late = users.with_columns(pl.col("since").dt.offset_by("30d"))
    with pytest.raises(DataError, match="older than the first version of their user") as e:
        make(files_of((late, items, log), tmp_path), schema)
    with pytest.raises(DataError) as expected:
        build_dataset(check(late, items, log, schema), schema, SplitConfig(kind="last"))
    assert str(e.value).partition("(the first")[0] == str(expected.value).partition("(the first")[0]
    assert not (tmp_path / "out").exists()


def test_a_prepared_folder_without_its_table_of_versions_is_refused(tmp_path: Path) -> None:
    prepared(changing(), SCHEMA, SPLITS["time"], tmp_path)
    (tmp_path / "out" / layout.versions("item")).unlink()
    with pytest.raises(RunError, match=r"item_versions\.parquet"):
        MemmapDataset.open(tmp_path / "out")
