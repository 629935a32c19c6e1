"""The baseline of transition counts equals a loop, needs an order of the parts, and knows a world of steps."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from worlds import ID_FEATURES, settings

from twotower import api
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST
from twotower.data.tables import check
from twotower.data.unknown_ids import rows_of_ids
from twotower.evaluation.baselines import popularity_baseline
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.part_evaluation import evaluate_model
from twotower.features.schema import Schema
from twotower.scorers import alone
from twotower.scorers.transitions import FREQUENCY, LAG, RATE, SPAN, Transitions

SCHEMA = Schema(time="at", time_unit="order", features=ID_FEATURES)
LAST = SplitConfig(kind="last")


def walks(n_users: int = 60, n_items: int = 41, length: int = 9, seed: int = 3) -> pl.DataFrame:
    """Users who take items in the order of a circle, from an item of their own on, and in between any other."""
    rng, rows = np.random.default_rng(seed), []
    for user in range(n_users):
        first, at = int(rng.integers(n_items)), 0
        for step in range(length):
            rows.append((user, (first + step) % n_items, at := at + 1))
            if rng.random() < 0.3:
                rows.append((user, int((first + rng.integers(length, n_items)) % n_items), at := at + 1))
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "at"], orient="row")
    return log.unique(["user_id", "item_id"], keep="first", maintain_order=True).sample(
        fraction=1.0, shuffle=True, seed=1
    )


def built(log: pl.DataFrame, split: SplitConfig = LAST, schema: Schema = SCHEMA) -> Dataset:
    return build_dataset(check(None, None, log, schema), schema, split)


def scores(data: Dataset) -> np.ndarray:
    found = Transitions.of(data, TEST)
    assert found is not None
    return found.catalogue_scores(np.arange(len(data.users))).numpy()


def test_transition_counts_equal_a_loop() -> None:
    data = built(walks(length=25, n_items=61))
    order = np.argsort(data.times, kind="stable")
    counted: dict[tuple[int, int], float] = defaultdict(float)
    users = {u: [n for n in order if data.pairs.user[n] == u] for u in range(len(data.users))}
    for mine in users.values():
        items = [int(data.pairs.item[n]) for n in mine if data.parts[n] == 0]
        for i, before in enumerate(items):
            for gap, after in enumerate(items[i + 1 : i + 1 + SPAN], 1):
                counted[before, after] += round(gap**-LAG * 2**16) / 2**16
    column: dict[int, float] = defaultdict(float)
    for (_, after), n in counted.items():
        column[after] += n
    mean = sum(column.values()) / len(column)
    expected = np.zeros((len(users), len(data.items)))
    for user, mine in users.items():
        latest = [int(data.pairs.item[n]) for n in mine if data.parts[n] < TEST][::-1][:SPAN]
        for n, before in enumerate(latest, 1):
            for after in range(len(data.items)):
                if count := counted.get((before, after)):
                    expected[user, after] += RATE ** (n - 1) * math.log1p(count / (column[after] / mean) ** FREQUENCY)
    np.testing.assert_allclose(scores(data), expected, rtol=1e-5, atol=1e-7)
    assert max(len(mine) for mine in users.values()) > SPAN + 3


def test_transition_counts_of_prepared_data_are_those_of_memory(tmp_path: Path) -> None:
    walks().write_parquet(tmp_path / "log.parquet")
    config = settings(data={"interactions": str(tmp_path / "log.parquet")}, split=LAST.model_dump())
    disk, memory = api.prepare_folder(config, SCHEMA, tmp_path / "prepared"), built(walks())
    rows = rows_of_ids(memory.users.ids, disk.users.ids).to_numpy().astype(np.int64)
    assert disk.items.ids.equals(memory.items.ids)
    np.testing.assert_allclose(scores(disk)[rows], scores(memory), rtol=1e-6)


def test_transition_counts_know_the_step_that_popularity_does_not_and_need_an_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = EvaluationConfig(k=(1,), bootstrap=0)

    def measured(split: SplitConfig, schema: Schema = SCHEMA) -> dict[str, float]:
        data = built(walks(300), split, schema)
        popular = popularity_baseline(data.train, len(data.users), len(data.items))
        return evaluate_model(lambda _: popular, data, config, alone=alone)

    found = measured(LAST)
    assert found["baseline.transitions.recall@1"] > 0.4 > 0.1 > found["baseline.popularity.recall@1"]
    assert not [m for m in measured(SplitConfig(kind="random")) if "transitions" in m]
    assert not [
        m
        for m in measured(SplitConfig(kind="user_random"), SCHEMA.model_copy(update={"time": ""}))
        if "transitions" in m
    ]
    with caplog.at_level("INFO", "twotower"):
        assert Transitions.of(built(walks()), TEST, max_interactions=100) is None
    assert "no baseline of transitions: " in caplog.text


def test_a_query_costs_the_transitions_of_its_items_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense product takes a quarter of an hour for twenty thousand users and ten thousand items."""
    data, product = built(walks()), torch.sparse.mm
    given: list[torch.Tensor] = []

    def seen(*factors: torch.Tensor) -> torch.Tensor:
        given.extend(factors)
        out: torch.Tensor = product(*factors)
        return out

    monkeypatch.setattr(torch.sparse, "mm", seen)
    scores(data)
    query, table = given
    assert query.is_sparse
    assert table.is_sparse
    assert query._nnz() <= SPAN * len(data.users)
