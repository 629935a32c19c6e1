"""A run with versions is written, resumed, published and served: metrics of past rows, a bundle of the newest rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from trainers import StopAt
from version_worlds import CITY_SCHEMA, N_CITIES, N_ITEMS, moving_city
from worlds import settings

import twotower
from twotower import api
from twotower.config.experiment import Config
from twotower.data.splits import TEST
from twotower.files import layout
from twotower.reports.compare import compare_runs
from twotower.retrieval.request import Request
from twotower.runs import Run


def config() -> Config:
    return settings(
        train={"epochs": 6, "batch_size": 64, "lr": 0.1, "monitor": "validation.recall@5"}, loss={"kind": "softmax"},
        split={"kind": "last"}, negatives={"uniform": 20}, index={"kind": "exact", "min_recall": 0.5},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("versions")
    return twotower.fit(moving_city(), CITY_SCHEMA, config(), folder=folder / "run")


def test_a_run_is_loaded_with_its_versions(run: Run) -> None:
    assert run.folder is not None
    again = twotower.load(run.folder)
    assert again.dataset.digest == run.dataset.digest
    assert api.evaluate(again)["test.recall@5"] == run.metrics["test.recall@5"] > 0.95
    assert {c.difference for c in compare_runs(run, again, resamples=5)} == {0.0}


def test_a_training_that_was_stopped_resumes_to_the_same_bits(run: Run, tmp_path: Path) -> None:
    assert run.folder is not None
    with pytest.raises(KeyboardInterrupt):
        twotower.fit(moving_city(), CITY_SCHEMA, config(), folder=tmp_path / "run", callback=StopAt(25))
    found = twotower.fit(moving_city(), CITY_SCHEMA, config(), folder=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / layout.WEIGHTS).read_bytes() == (run.folder / layout.WEIGHTS).read_bytes()
    assert found.metrics["test.recall@5"] == run.metrics["test.recall@5"]


def test_a_bundle_serves_the_newest_version(run: Run, tmp_path: Path, messages: list[str]) -> None:
    bundle = twotower.publish(run, tmp_path / "store")
    assert not [p.name for p in bundle.folder.iterdir() if "versions" in p.name]
    retriever = twotower.retriever(tmp_path / "store")
    users, _, log = moving_city()
    asked = 0
    for user, city in users.sort("since").group_by("user_id").last().select("user_id", "city").rows():
        if {int(city[1:])} <= {
            i % N_CITIES for i in {*range(N_ITEMS)} - {*log.filter(pl.col("user_id") == user)["item_id"]}
        }:
            answers = [retriever.recommend(Request(str(user)), 1, method) for method in (1, 2)]
            assert [int(a.items[0].id) % N_CITIES for a in answers] == [int(city[1:])] * 2
            asked += 1
    assert asked > 40
    np.testing.assert_allclose(np.load(bundle.folder / layout.USER_VECTORS), run.factors(TEST).users.numpy(), atol=1e-6)
    assert not any("newest versions" in line for line in messages)
    measured = api.evaluate_bundle(retriever)
    assert measured["exact"]["recall@5"] < 0.5 < run.metrics["test.recall@5"]
    assert sum("a bundle serves the newest versions" in line for line in messages) == 1
