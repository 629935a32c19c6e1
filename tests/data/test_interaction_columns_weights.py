"""Weights of interactions: tables in memory, runs and prepared data hold the same; bad weights are one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from data.test_prepare import SMALL, SPLITS, in_memory, shards, tables
from messages import one_line
from worlds import EVERYTHING_SCHEMA

from twotower.data import memmap, prepare
from twotower.data.buckets import Buckets
from twotower.data.buckets.check import check_buckets
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError, DataError, RunError
from twotower.evaluation.baselines import popularity_baseline
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.ranking import evaluation_queries
from twotower.features.schema import Schema
from twotower.retrieval.catalogue import Popularity

LOG = {"weight_scale": "log"}
FEATURES = [{"kind": "categorical", "name": f"{s}_id", "side": s} for s in ("user", "item")]
SCHEMA = EVERYTHING_SCHEMA.model_copy(
    update={"weight": "watched", "features": tuple(f for f in EVERYTHING_SCHEMA.features if f.name != "fans")}
)


def weighted_tables() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Tables whose rows weigh 0, 0.2, 1 or 3."""
    users, items, actions = tables()
    weights = np.random.default_rng(4).choice([0, 0.2, 1, 3], actions.height)
    return users, items, actions.with_columns(watched=weights)


def rows(data: Dataset) -> list[tuple[Any, ...]]:
    assert data.pairs.weight.dtype == np.float32
    columns = (*data.pairs.arrays.values(), data.parts)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize(
    ("kind", "scale"),
    [("gap", "linear"), ("column", "linear"), ("no validation", "linear"), ("time", "linear"), ("last", "log")],
)
def test_prepared_weights_are_those_of_memory(tmp_path: Path, kind: str, scale: str) -> None:
    frames, split, schema = weighted_tables(), SPLITS[kind], SCHEMA.model_copy(update={"weight_scale": scale})
    memory = in_memory(*frames, schema, split)
    data = shards(tmp_path / "in", schema, *frames)
    disk = prepare.write_prepared(data, schema, split, tmp_path / "out", SMALL)
    assert rows(disk) == rows(memory)
    assert {0, 1, 3 if scale == "linear" else 2} < set(disk.pairs.weight.tolist())
    np.testing.assert_allclose(disk.item_positive_counts, memory.item_positive_counts)
    for name in ("positives_by_user", "positive_items", "seen_items"):
        assert getattr(disk, name).lengths.tolist() == getattr(memory, name).lengths.tolist(), name
    assert disk.positive_items.values.tolist() == memory.positive_items.values.tolist()
    assert (disk.pairs.target[disk.positive_indices]).all()
    assert len(disk.positive_indices) == int(disk.train.target.sum()) < int(disk.train.positive.sum())
    buckets = prepare.write_buckets(data, schema, tmp_path / "buckets", SMALL, split)
    assert check_buckets(buckets.folder, schema) == []
    again = prepare.write_prepared(DataConfig(buckets=str(buckets.folder)), schema, split, tmp_path / "again", SMALL)
    assert again.digest == disk.digest


def test_a_run_keeps_the_weights_of_its_tables(tmp_path: Path) -> None:
    split = SplitConfig(kind="last")
    data = build_dataset(check(*weighted_tables(), SCHEMA), SCHEMA, split)
    memmap.save(data, tmp_path)
    again = memmap.load(tmp_path, SCHEMA, split)
    assert rows(again) == rows(data)
    assert again.digest == data.digest
    path = tmp_path / "interactions.parquet"
    kept = pl.read_parquet(path)
    for bad in (kept.drop("weight"), kept.with_columns(weight=pl.lit(-1, pl.Float32))):
        bad.write_parquet(path)
        with pytest.raises(RunError, match="interactions.parquet"):
            memmap.load(tmp_path, SCHEMA, split)


def test_the_bounds_of_weights_are_weights_in_either_precision() -> None:
    schema = Schema.model_validate({"weight": "w", "features": FEATURES})
    for dtype in (pl.Float32, pl.Float64):
        log = pl.DataFrame({"user_id": [1, 2, 3], "item_id": [7, 8, 9], "w": pl.Series([1e-6, 0, 1e6], dtype=dtype)})
        found = check(None, None, log, schema).interactions["__weight"]
        assert found.to_list() == [np.float32(1e-6), 0, np.float32(1e6)]


def test_the_log_scale_leaves_0_and_1_and_shortens_the_rest() -> None:
    schema = Schema.model_validate({"weight": "plays", "features": FEATURES} | LOG)
    log = pl.DataFrame({"user_id": range(5), "item_id": range(5), "plays": [0, 1, 3, 1023, 1_000_000]})
    found = check(None, None, log, schema).interactions["__weight"]
    assert found.dtype == pl.Float32
    assert found[:4].to_list() == [0, 1, 2, 10]
    assert found[4] == pytest.approx(np.log2(1_000_001))
    with pytest.raises(ValueError, match="weight_scale needs weight"):
        Schema.model_validate({"features": FEATURES} | LOG)


def test_the_log_scale_is_of_the_column_and_not_of_the_weights_of_events() -> None:
    events = {"event": "kind", "events": {"view": 0.5, "buy": 4}}
    schema = Schema.model_validate({"weight": "n", "features": FEATURES} | LOG | events)
    log = pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "n": [7, 1], "kind": ["view", "buy"]})
    assert check(None, None, log, schema).interactions["__weight"].to_list() == [1.5, 4]


def test_weight_0_is_a_history_and_no_target_and_popularity_goes_by_weight() -> None:
    users, items = pl.DataFrame({"u": [1, 2, 3]}), pl.DataFrame({"i": [7, 8, 9]})
    schema = Schema.model_validate(
        {"user_id": "u", "item_id": "i", "time": "t", "time_unit": "order", "weight": "w", "features": [
            {"kind": "categorical", "name": "u", "side": "user"}, {"kind": "sequence", "name": "met", "side": "user"},
            {"kind": "categorical", "name": "i", "side": "item"}]}
    )  # fmt: skip
    log = pl.DataFrame(
        {"u": [1, 1, 1, 2, 2, 2, 3, 3, 3], "i": [7, 8, 9, 8, 7, 9, 7, 9, 8], "t": range(9),
         "w": [0.0, 5, 1, 2.5, 1, 0, 1, 1, 1]}
    )  # fmt: skip
    data = build_dataset(check(users, items, log, schema), schema, SplitConfig(kind="last"))
    assert data.train.weight.tolist() == [0, 2.5, 1]
    assert data.item_positive_counts.tolist() == [1, 2.5, 0]
    assert Popularity(data.item_positive_counts).rows.tolist() == [1, 0, 2]
    assert popularity_baseline(data.train, 3, 3).items[:, 0].tolist() == [1, 2.5, 0]
    assert data.positives_by_user.lengths.tolist() == [0, 1, 1]
    assert data.history(schema.histories()[0], data.parts == 0).lengths.tolist() == [1, 1, 1]
    queries = evaluation_queries(data, 2, EvaluationConfig(k=(2,)))
    assert queries.users.tolist() == [0, 2], "the last row of user 2 weighs nothing"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0, -0.5, 1.0], r"weight 'w' has 1 values that are neither 0 nor from 1e-06 to 1e\+06 \(the first: -0.5\)"),
        (
            [1.0, float("nan"), float("inf")],
            r"has [12] values that are neither 0 nor from .* \(the first: nan\)",
        ),
        ([1.0, None, 1.0], r"has 1 values .* \(the first: missing\); change them or drop the rows"),
        ([1e300, 1.0, 1.0], r"has 1 values .* \(the first: 1e\+300\)"),
        ([1.0, 2e6, 1.0], r"has 1 values .* \(the first: 2000000.0\)"),
        ([1.0, 1e-7, 0.0], r"has 1 values .* \(the first: 1e-07\)"),
        (
            ["a", "b", "c"],
            "weight 'w' holds String, expected numbers; the first that is none is 'a': give a number in its place, or "
            "drop the rows$",
        ),
        ([0.0, 0.0, 0.0], "no positive interaction of a weight above 0 in the train part"),
    ],
)
@pytest.mark.parametrize("prepared", [False, True])
def test_fault_G31_bad_weights_are_one_line_and_leave_nothing(
    tmp_path: Path, weights: list[Any], expected: str, prepared: bool
) -> None:
    log = pl.DataFrame({"user_id": [1, 2, 3], "item_id": [7, 8, 9], "w": weights})
    schema = Schema.model_validate({"weight": "w", "features": FEATURES})
    split = SplitConfig(kind="random", test=0.3, validation=0.3)
    with one_line(DataError) as raised:
        if prepared:
            data = shards(tmp_path / "in", schema, None, None, log, n=2)
            prepare.write_prepared(data, schema, split, tmp_path / "out", SMALL)
        else:
            build_dataset(check(None, None, log, schema), schema, split)
    assert re.search(expected, str(raised.value)), raised.value
    assert not (tmp_path / "out").exists()


def test_buckets_of_other_weights_are_refused(tmp_path: Path) -> None:
    data = shards(tmp_path / "in", SCHEMA, *weighted_tables())
    buckets = prepare.write_buckets(data, SCHEMA, tmp_path / "buckets", SMALL)
    given = DataConfig(buckets=str(buckets.folder))
    other = SCHEMA.model_copy(update={"weight": ""})
    with pytest.raises(ConfigError, match=r"another schema \(log.weight 'watched', expected '' as in the schema\)"):
        prepare.write_prepared(given, other, SPLITS["last"], tmp_path / "out", SMALL)
    scaled = SCHEMA.model_copy(update=LOG)
    with pytest.raises(
        ConfigError, match=r"another schema \(log.weight_scale 'linear', expected 'log' as in the schema\)"
    ):
        prepare.write_prepared(given, scaled, SPLITS["last"], tmp_path / "out", SMALL)
    path = Buckets.open(buckets.folder).file(buckets.facts.files[1])
    good = pl.read_parquet(path)
    for bad in (-1.0, float("nan")):
        good.with_columns(weight=pl.lit(bad, pl.Float32)).write_parquet(path)
        with pytest.raises(RunError, match="damaged, or does not follow docs/prepared-format.md"):
            prepare.write_prepared(given, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
    good.drop("weight").write_parquet(path)
    with pytest.raises(RunError, match="no column 'weight', which the schema needs"):
        prepare.write_prepared(given, SCHEMA, SPLITS["last"], tmp_path / "out", SMALL)
