"""Sequences of ids, of hashed ids and of side information, in memory, on a disk, in a bundle and in requests."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from pydantic import ValidationError
from version_worlds import changing
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower.arrays.ragged import Ragged
from twotower.arrays.types import ItemRow, UserRow
from twotower.config.experiment import Config
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.ids import ItemIds, UserIds
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN
from twotower.data.tables import check
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.retrieval.query import QueryReader
from twotower.retrieval.request import Request
from twotower.retrieval.user_inputs import UserInputs

SIDE_INFORMATION = (
    Sequence(name="brands", side="user", feature="brand"),
    Sequence(name="liked_brands", side="user", feature="brand", interactions="positive", share_embedding=False,
        max_length=3),
    Sequence(name="prices", side="user", feature="price"),
    Sequence(name="cities", side="item", feature="city", share_embedding=False),
)  # fmt: skip
PRICE = Numeric(name="price", side="item", buckets=4)
SCHEMA: Schema = EVERYTHING_SCHEMA.model_copy(
    update={"features": (*EVERYTHING_SCHEMA.features, PRICE, *SIDE_INFORMATION)}
)
HASHED: Schema = EVERYTHING_SCHEMA.model_copy(
    update={
        "features": (
            *(f for f in EVERYTHING_SCHEMA.features if f.name not in ("iid", "fans")),
            Categorical(name="iid", side="item", hash_buckets=9),
            Sequence(name="seen", side="user"),
        )
    }
)


Tables = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]


def tables() -> Tables:
    users, items, actions = everything()
    return (
        users,
        items.with_columns(price=pl.Series([float(i * i) if i % 7 else None for i in range(items.height)])),
        actions,
    )


@cache
def data(hashed: bool = False) -> Dataset:
    """Read only."""
    schema = HASHED if hashed else SCHEMA
    return build_dataset(check(*tables(), schema), schema, Config().split)


def column(of: Dataset, side: Any, name: str) -> Ragged:
    found = of.side(side).columns[name]
    assert isinstance(found, Ragged)
    return found


def codes(of: Dataset, side: Any, name: str) -> npt.NDArray[Any]:
    found = of.side(side).columns[name]
    assert not isinstance(found, Ragged)
    return found


@pytest.mark.parametrize(("sequence", "feature"), [("brands", "brand"), ("prices", "price")])
def test_a_sequence_holds_the_feature_of_each_item(sequence: str, feature: str) -> None:
    """As the sequence of ids holds its id: the same interactions in the same order."""
    of = data()
    for user in range(0, len(of.users), 5):
        own = np.flatnonzero((of.pairs.user == user) & (of.parts == TRAIN))
        own = own[np.argsort(of.times[own], kind="stable")]
        assert (
            column(of, "user", sequence).row(user).tolist() == codes(of, "item", feature)[of.pairs.item[own]].tolist()
        )


def test_labels_lengths_and_the_side_of_items_go_with_a_feature() -> None:
    of = data()
    liked, cities = column(of, "user", "liked_brands"), column(of, "item", "cities")
    order = np.argsort(of.times, kind="stable")
    train = order[of.parts[order] == TRAIN]
    for row in range(0, 40, 3):
        own = train[(of.pairs.user[train] == row) & of.pairs.positive[train]][-3:]
        assert liked.row(row).tolist() == codes(of, "item", "brand")[of.pairs.item[own]].tolist()
        own = train[of.pairs.item[train] == row]
        assert cities.row(row).tolist() == codes(of, "user", "city")[of.pairs.user[own]].tolist()


def test_a_sequence_shares_the_embedding_of_its_feature_or_has_its_own() -> None:
    of = data()
    fields = {f.name: f for f in of.encoders.fields("user")}
    item = {f.name: f for f in of.encoders.fields("item")}
    assert (fields["brands"].share_with, fields["prices"].share_with) == ("brand", "price")
    assert fields["liked_brands"].share_with == ""
    assert {f.rows for n, f in fields.items() if "brands" in n} == {item["brand"].rows}
    assert all(fields[s.name].kind == "bag" and fields[s.name].sequence for s in SIDE_INFORMATION if s.side == "user")


def test_a_sequence_of_hashed_ids_holds_their_buckets() -> None:
    of = data(hashed=True)
    field = next(f for f in of.encoders.fields("user") if f.name == "seen")
    assert (field.share_with, field.rows) == ("iid", 10)
    history = column(of, "user", "seen")
    assert history.source is not None
    assert np.array_equal(history.values, codes(of, "item", "iid")[of.pairs.item[history.source]])
    assert set(history.values.tolist()) <= set(range(1, 10))


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        (Sequence(name="s", side="user", feature="brnd"), "reads feature 'brnd', which the items do not have; did you "
            "mean 'brand'?"),
        (Sequence(name="s", side="user", feature="tags"), "reads feature 'tags', which has not one code a row; name a "
            "categorical"),
        (Sequence(name="s", side="item", feature="age"), "or a numeric one with buckets"),
        (Sequence(name="s", side="user", feature="city"), "which the items do not have"),
    ],
)  # fmt: skip
def test_a_feature_that_no_sequence_can_hold_is_refused(feature: Sequence, words: str) -> None:
    with pytest.raises(ValidationError) as e:
        Schema.model_validate(SCHEMA.model_dump() | {"features": [*SCHEMA.features, feature]})
    assert words in str(e.value)


def prepared_as_in_memory(
    frames: Tables, schema: Schema, split: SplitConfig, folder: Path, names: tuple[str, ...]
) -> tuple[DataConfig, Dataset, Dataset]:
    """Check that prepared histories of users are those in memory; return the files, and both datasets."""
    paths = {name: folder / f"{name}.parquet" for name in ("users", "items", "interactions")}
    for path, table in zip(paths.values(), frames, strict=True):
        table.write_parquet(path)
    files = DataConfig.model_validate({name: str(path) for name, path in paths.items()})
    disk = prepare.write_prepared(files, schema, split, folder / "out")
    memory = build_dataset(check(*frames, schema), schema, split)
    row_of = {user: row for row, user in enumerate(memory.users.ids.to_list())}
    for name, part in product(names, (TRAIN, TEST)):
        on_disk, in_memory = (of.side_before("user", part).columns[name] for of in (disk, memory))
        for row, user in enumerate(disk.users.ids.to_list()):
            assert on_disk.row(row).tolist() == in_memory.row(row_of[user]).tolist()  # type: ignore[union-attr]
    return files, disk, memory


@pytest.mark.parametrize("hashed", [False, True])
def test_prepared_sequences_are_those_in_memory(tmp_path: Path, hashed: bool) -> None:
    schema: Schema = HASHED if hashed else SCHEMA
    schema = schema.model_copy(
        update={"features": tuple(f for f in schema.features if f.name not in ("fans", "cities"))}
    )
    names = ("seen",) if hashed else ("brands", "liked_brands", "prices")
    prepared_as_in_memory(tables(), schema, SplitConfig(kind="last"), tmp_path, names)


def inputs(of: Dataset) -> UserInputs:
    return UserInputs(of, of.users.columns)


def read(of: Dataset, name: str, request: Request) -> list[int]:
    """The codes that a request gives a sequence."""
    queries = QueryReader(of, UserIds(of.users.ids, UserRow), ItemIds(of.items.ids, ItemRow))
    return list(map(int, inputs(of).history(name, queries.read(request))))


@pytest.mark.parametrize(
    ("name", "feature", "hashed"), [("brands", "brand", False), ("prices", "price", False), ("seen", "iid", True)]
)
def test_an_event_replaces_the_item_it_repeats_and_no_other_of_its_brand(name: str, feature: str, hashed: bool) -> None:
    of = data(hashed)
    user = int(np.argmax(column(of, "user", name).lengths))
    history = column(of, "user", name)
    assert history.source is not None
    stored = of.pairs.item[history.source[slice(*history.offsets[user : user + 2])]].tolist()
    of_item = codes(of, "item", feature)
    repeated, new = stored[2], next(i for i in range(len(of.items)) if i not in stored)
    asked = Request(str(of.users.ids[user]), events=[(str(of.items.ids[i]), True) for i in (new, repeated)])
    expected = [i for i in stored if i != repeated] + [new, repeated]
    assert read(of, name, asked) == of_item[expected].tolist()
    given = Request(
        str(of.users.ids[user]),
        history=[(str(of.items.ids[i]), True) for i in (repeated, new)],
        events=[(str(of.items.ids[repeated]), True)],
    )
    assert read(of, name, given) == of_item[[new, repeated]].tolist()


CATEGORIES, ITEMS = 6, 240


def categories() -> Tables:
    """Each user buys items of one category; hardly any item is bought twice."""
    rng = np.random.default_rng(0)
    rows = [
        (u, int(i), t)
        for u in range(90)
        for t, i in enumerate(rng.permutation(np.arange(u % CATEGORIES, ITEMS, CATEGORIES))[:4])
    ]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "at"], orient="row")
    items = pl.DataFrame({"item_id": np.arange(ITEMS), "category": [f"c{i % CATEGORIES}" for i in range(ITEMS)]})
    return pl.DataFrame({"user_id": np.arange(90)}), items, log


def test_a_sequence_of_categories_finds_what_a_sequence_of_ids_does_not(tmp_path: Path) -> None:
    """Both methods of a bundle agree, and a request may tell a history."""
    category = Categorical(name="category", side="item")
    by_id = (Categorical(name="item_id", side="item", hash_buckets=500), category, Sequence(name="ids", side="user"))
    by_category = (category, Sequence(name="categories", side="user", feature="category"))
    config = settings(
        train={"epochs": 10, "batch_size": 64, "lr": 0.05, "monitor": "validation.recall@40"}, loss={"kind": "softmax"},
        negatives={"uniform": 30}, split={"kind": "last"}, evaluation={"k": [40]}, index={"kind": "exact"},
    )  # fmt: skip
    found = []
    for features in (by_id, by_category):
        schema = Schema(time="at", time_unit="order", features=features)
        run = twotower.fit(categories(), schema, config, folder=tmp_path / f"run{len(features)}")
        found.append(run.metrics["test.recall@40"])
    assert found[1] > 0.95
    assert found[0] < found[1] - 0.2
    twotower.publish(run, tmp_path / "store")
    retriever = twotower.retriever(tmp_path / "store")
    answer = retriever.recommend(Request(None, history=[(str(i), True) for i in (3, 9, 15)]), 5, 2)
    assert {int(item.id) % CATEGORIES for item in answer.items} == {3}


def test_a_history_holds_the_feature_of_the_time_of_each_interaction(tmp_path: Path) -> None:
    """With versions of items; the bundle keeps them, so that a stored history is that of the training."""
    features = (*EVERYTHING_SCHEMA.features, SIDE_INFORMATION[0])
    schema = EVERYTHING_SCHEMA.model_copy(update={"valid_from": "since", "features": features})
    run = twotower.fit(changing(), schema, settings(index={"kind": "exact"}), folder=tmp_path / "run")
    of = run.dataset
    versions, history = of.items.versions, column(of, "user", "brands")
    assert versions is not None
    assert history.source is not None
    seen = of.input_rows("item", of.pairs.item[history.source], history.source)
    brands = versions.columns["brand"]
    assert isinstance(brands, np.ndarray)
    assert np.array_equal(history.values, brands[seen])
    assert not np.array_equal(history.values, codes(of, "item", "brand")[of.pairs.item[history.source]])
    bundle = twotower.publish(run, tmp_path / "store")
    assert [p.name for p in bundle.folder.iterdir() if "versions" in p.name] == ["item_versions.parquet"]
    retriever = twotower.retriever(tmp_path / "store")
    stored = retriever.dataset.users.columns["brands"]
    assert isinstance(stored, Ragged)
    assert np.array_equal(stored.values, history.values)
