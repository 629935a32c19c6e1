"""Columns that are functions of the item, against plain loops, in memory and prepared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from context_worlds import hourly_settings
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.evidence import Constancy, _some_rows, contexts_of_items, measure_constancy
from twotower.data.prepare import write_prepared
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.features.categorical import Categorical
from twotower.features.feature import Feature
from twotower.features.hour_of_day import HourOfDay
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.text import Text
from twotower.features.vector import Vector
from twotower.train.trainer import Trainer

USERS, ITEMS, ROWS = 200, 60, 1500
IDS = (Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item"))
LEAKS: dict[str, tuple[Feature, list[object]]] = {
    "word": (Categorical(name="brand", side="context"), [f"b{i % 9}" for i in range(ITEMS)]),
    "word with gaps": (Categorical(name="brand", side="context"),
     [f"b{i % 9}" if i % 3 else None for i in range(ITEMS)]),
    "flag": (Categorical(name="brand", side="context"), [i % 2 == 0 for i in range(ITEMS)]),
    "number": (Numeric(name="brand", side="context"), [1.5 * i for i in range(ITEMS)]),
    "number with gaps": (Numeric(name="brand", side="context"), [1.5 * i if i % 3 else None for i in range(ITEMS)]),
    "buckets": (Numeric(name="brand", side="context", buckets=8), [1.5 * i for i in range(ITEMS)]),
    "words": (MultiHot(name="brand", side="context"), [[f"t{k}" for k in range(i % 5)] for i in range(ITEMS)]),
    "vector": (Vector(name="brand", side="context"), [[1.0, float(i % 9)] for i in range(ITEMS)]),
}  # fmt: skip


def shop(values: list[object], wrong: float = 0.0) -> tuple[None, None, pl.DataFrame]:
    """Rows of users and items drawn apart, with the value of the item as `brand` in all but a share of them, which have
    that of another item, and a device that is that of no item."""
    rng = np.random.default_rng(3)
    item = rng.integers(0, ITEMS, ROWS)
    shown = np.where(rng.random(ROWS) < wrong, rng.integers(0, ITEMS, ROWS), item)
    columns = {"user_id": rng.integers(0, USERS, ROWS), "item_id": item, "at": 1_700_000_000 + 60 * np.arange(ROWS)}
    device = pl.Series(["phone", "tablet", "desktop"]).gather(rng.choice(3, ROWS, p=[0.9, 0.06, 0.04]))
    return None, None, pl.DataFrame(columns).with_columns(brand=pl.Series(values).gather(shown), device=device)


def dataset(tables: tuple[None, None, pl.DataFrame], *context: Feature) -> Dataset:
    schema = Schema(time="at", features=(*IDS, *context))
    return build_dataset(check(*tables, schema), schema, SplitConfig(kind="time"))


def naive(rows: list[tuple[int, int, float | None]]) -> Constancy:
    """Numbers of rows (id, other, value) by plain loops."""
    first = dict[tuple[int, int], float]()
    for key, other, value in rows:
        if value is not None and value == value:
            first.setdefault((key, other), value)
    lengths = Counter(key for key, _ in first)
    values = dict[int, list[float]]()
    for (key, _), value in first.items():
        if lengths[key] > 1:
            values.setdefault(key, []).append(value)
    if not values:
        return Constancy()
    of_all = Counter(v for of_id in values.values() for v in of_id)
    most = {key: max(Counter(of_id).values()) for key, of_id in values.items()}
    best = max(of_all.values())
    ids = {v: sum(most[k] > values[k].count(v) for k in values) for v in of_all if of_all[v] == best}
    found = Constancy(sum(map(len, values.values())), sum(most.values()), best, max(ids.values()))
    return found if len({*ids.values()}) == 1 else found._replace(ids=-1)  # several values are the most frequent


ROW = st.tuples(st.integers(0, 5), st.integers(0, 4), st.sampled_from([None, float("nan"), 0.0, 1.0, 2.0]))


@given(st.lists(ROW, max_size=60))
@examples(max_examples=60, deadline=None)
def test_constancy_is_that_of_plain_loops(rows: list[tuple[int, int, float | None]]) -> None:
    ids, others, values = (
        pl.Series([row[i] for row in rows], dtype=kind) for i, kind in enumerate((pl.Int64, pl.Int64, pl.Float64))
    )
    found, expected = measure_constancy(values, ids, others), naive(rows)
    assert found[:3] == expected[:3]
    assert expected.ids in (-1, found.ids)


@given(
    st.integers(0, 2**32), st.integers(2, 200), st.floats(0.3, 0.999), st.integers(2, 12),
    st.sampled_from([200, 2000, 8000])
)  # fmt: skip
@examples(max_examples=60, deadline=None)
def test_a_column_that_no_item_decides_is_none_of_the_item(
    seed: int, items: int, common: float, kinds: int, rows: int
) -> None:
    """One value has a share of the rows, the others divide the rest; items may have two rows or many."""
    rng = np.random.default_rng(seed)
    item = rng.zipf(1.3, rows) % items if seed % 2 else rng.integers(0, rows // 2, rows)
    shares = np.array([common] + [(1 - common) / (kinds - 1)] * (kinds - 1))
    values = rng.choice(kinds, rows, p=shares / shares.sum())
    assert not measure_constancy(*map(pl.Series, (values, item, np.arange(rows)))).exists


@pytest.mark.parametrize("kind", LEAKS)
def test_a_context_of_the_item_is_refused_before_training(kind: str, tmp_path: Path) -> None:
    feature, values = LEAKS[kind]
    memory = dataset(tables := shop(values), feature)
    path = tmp_path / "clicks.parquet"
    tables[2].write_parquet(path)
    disk = write_prepared(DataConfig(interactions=str(path)), memory.schema, memory.split, tmp_path / "prepared")
    said = "feature 'brand' of the context is a function of the item: .* put its column in the table of items"
    for data in (memory, disk):
        with pytest.raises(ConfigError, match=said):
            Trainer(data, hourly_settings())


@pytest.mark.parametrize(("wrong", "is_refused"), [(0.005, True), (0.02, False)])
def test_a_hundredth_of_the_rows_may_differ(wrong: float, is_refused: bool) -> None:
    feature, values = LEAKS["word"]
    assert ("brand" in contexts_of_items(dataset(shop(values, wrong), feature))) == is_refused


def test_what_a_request_knows_is_trained() -> None:
    """A device, one that nearly all share, a text, and a moment; a device of users, who have items of their own."""
    tables = shop([f"red shoe {i}" for i in range(ITEMS)])
    rare = pl.Series(["web" if i % 150 else "app" for i in range(ROWS)])
    frame = tables[2].with_columns(rare=rare, alone=pl.col("item_id") % 7)
    features = (
        Categorical(name="device", side="context"), Categorical(name="rare", side="context"),
        Text(name="brand", side="context"), HourOfDay(name="hour")
    )  # fmt: skip
    assert not contexts_of_items(dataset((None, None, frame), *features))
    own = frame.with_columns(item_id=pl.col("user_id"), alone=pl.col("user_id") % 7)
    assert not contexts_of_items(dataset((None, None, own), Categorical(name="alone", side="context")))
    Trainer(dataset(tables, features[0]), hourly_settings())


def test_much_data_are_measured_by_some_items() -> None:
    data = dataset(shop(LEAKS["word"][1]))
    assert (_some_rows(data, ROWS, 5) == data.train_indices).all()
    some = _some_rows(data, 100, 5)
    of_item = np.bincount(data.pairs.item[some], minlength=ITEMS)
    assert {*some} <= {*data.train_indices}
    assert 50 <= len(some) <= 150
    assert 10 <= np.count_nonzero(of_item) <= 25  # of about 20 rows each
