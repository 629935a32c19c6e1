"""The functions and the writer of buckets that the documents give to Spark, run by a local Spark."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb_buckets
import numpy as np
import polars as pl
import pytest
from test_docs import blocks
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower import api
from twotower.data import prepare
from twotower.data.buckets.check import check_buckets
from twotower.data.config import DataConfig
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.embedding.folder import EmbeddingsFolder
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema

pytestmark = [pytest.mark.spark, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, runs/mine, and a store with its bundle, as the pages name them."""
    folder = tmp_path_factory.mktemp("spark")
    run = twotower.fit(
        check(*everything(), EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, settings(), folder=folder / "runs/mine"
    )
    twotower.publish(run, folder / "store", force=True)
    return folder


@pytest.fixture(scope="module")
def spark(folder: Path) -> Iterator[Any]:
    """A Spark of this machine, on loopback alone, whose processes start in `folder`."""
    from pyspark.sql import SparkSession

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        built = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
        found = built.config("spark.sql.shuffle.partitions", "3").config("spark.driver.memory", "1g").getOrCreate()
        yield found
        found.stop()


def functions(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Return the names that the code of the operations page defines."""
    names: dict[str, Any] = {"__name__": "__main__"}  # a function of a program is sent to Spark as it is
    for code in blocks("docs/operations.md", "python"):
        if "(batches)" in code:
            exec(compile(code, "<document>", "exec"), names)
    monkeypatch.chdir(folder)
    return names


def test_spark_embeds_as_the_command_does(spark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = twotower.load(folder / "runs/mine")
    run.dataset.items.frame.write_parquet(folder / "items.parquet")
    api.embed(run, "item", folder / "items.parquet", folder / "vectors")
    ((ids, vectors),) = EmbeddingsFolder(folder / "vectors").blocks()
    embed = functions(monkeypatch, folder)["embed"]
    items = spark.read.parquet(str(folder / "items.parquet")).repartition(3)
    found = dict(items.mapInArrow(embed, "id string, vector array<float>").collect())
    assert found.keys() == set(ids)
    np.testing.assert_allclose([found[name] for name in ids], vectors, rtol=1e-5, atol=1e-6)


def test_spark_answers_as_the_command_does(spark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = pl.DataFrame({"user_id": [*(f"u{i}" for i in range(60)), "nobody"]})
    users.write_parquet(folder / "users.parquet")
    api.recommend_users(folder / "store", folder / "users.parquet", folder / "recs")
    expected = pl.read_parquet(folder / "recs/part-*.parquet").sort("user_id", "rank")
    recommend = functions(monkeypatch, folder)["recommend"]
    asked = spark.read.parquet(str(folder / "users.parquet")).repartition(3)
    answers = asked.mapInArrow(recommend, "user_id string, rank int, item_id string, score float, source string")
    found = pl.from_arrow(answers.toArrow())
    assert isinstance(found, pl.DataFrame)
    found = found.sort("user_id", "rank")
    assert found.columns == expected.columns
    assert found.drop("score").equals(expected.drop("score"))
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-5)
    assert set(found["source"]) == {"model", "popular"}


def test_spark_writes_the_buckets_of_the_contract(spark: Any, tmp_path: Path) -> None:
    """Those of DuckDB's writer, and a prepared folder of one digest with the log's own."""
    import spark_buckets

    rng = np.random.default_rng(0)
    n = 900
    log = pl.DataFrame(
        {
            "user_id": rng.integers(0, 50, n).astype(str), "item_id": rng.integers(0, 20, n),
            "rating": rng.integers(1, 6, n), "rated_at": 1_600_000_000 + rng.integers(0, 300, n),
        }
    )  # fmt: skip
    (tmp_path / "log").mkdir()
    for number in range(3):
        log[number * 300 : number * 300 + 300].write_parquet(tmp_path / f"log/{number}.parquet")
    log.write_parquet(tmp_path / "log.parquet")
    spark_buckets.write_buckets(spark, tmp_path / "log", tmp_path / "spark")
    duckdb_buckets.write_buckets(tmp_path / "log.parquet", tmp_path / "duckdb")
    files = ["users.parquet", "items.parquet", *(f"interactions/{b:05d}.parquet" for b in range(4))]
    for name in files:
        mine, theirs = (pl.read_parquet(tmp_path / made / name) for made in ("spark", "duckdb"))
        assert mine.select(pl.col(pl.Int32).cast(pl.Int64), pl.exclude(pl.Int32)).select(theirs.columns).equals(theirs)
    features = (Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item"))
    schema = Schema(label="rating", positive_above=3, time="rated_at", time_unit="s", features=features)
    assert check_buckets(tmp_path / "spark", schema) == []
    split = SplitConfig(kind="last")
    data = (DataConfig(buckets=str(tmp_path / "spark")), DataConfig(interactions=str(tmp_path / "log")))
    one, other = (
        prepare.write_prepared(config, schema, split, tmp_path / f"prepared{number}")
        for number, config in enumerate(data)
    )
    assert one.digest == other.digest
