"""Novelty, diversity and popularity bias: equal to fractions by hand, and the same wherever a run is measured."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from messages import one_line
from scored import ranked_items
from worlds import EVERYTHING_SCHEMA, everything

from twotower import api
from twotower.config.toml import parse_config
from twotower.data.dataset import build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.evaluation.metrics.arp import Arp
from twotower.evaluation.metrics.diversity import Diversity
from twotower.evaluation.metrics.gini import Gini
from twotower.evaluation.metrics.measured import RankedItems, Rankings
from twotower.evaluation.metrics.novelty import Novelty


def shown(best: list[list[int]], items: RankedItems) -> Rankings:
    rows = np.array(best)
    return Rankings.alike(rows, rows < 0, np.ones(len(rows), np.int64), items)


def test_novelty_and_popularity_by_hand() -> None:
    items = ranked_items(np.array([5, 2, 1, 0]), user_counts=np.array([4, 2, 1, 0]), n_users=4)
    found = shown([[0, 1], [2, 3], [3, -1], [-1, -1]], items)
    # Of four users 4, 2 and 1 know an item: 0, 1 and 2 bits. The item that nobody knows counts as known to one.
    assert Novelty().values(found).tolist() == [1 / 2, (2 + 2) / 2, 2, 0]
    assert Arp().values(found).tolist() == [(5 + 2) / 2, 1 / 2, 0, 0]


def test_gini_by_hand() -> None:
    items = ranked_items(np.zeros(4, np.int64))
    # The items are shown 0, 1, 1 and 1 times: (-3*0 - 1*1 + 1*1 + 3*1) / (4 * 3).
    assert Gini().value(shown([[0, 1], [2, -1]], items)) == 3 / 12
    assert Gini().value(shown([[0, 1], [3, 2]], items)) == 0
    assert Gini().value(shown([[1], [1], [1]], items)) == 3 / 4
    assert np.isnan(Gini().value(shown([[-1]], items)))


@pytest.mark.parametrize("form", ["lists", "text"])
def test_diversity_by_hand(form: str) -> None:
    values = [["a", "b"], ["b", "c"], ["b", "a", "a"], [], None]
    tags = values if form == "lists" else [None if v is None else "|".join(v) for v in values]
    items = ranked_items(np.zeros(5, np.int64), pl.Series("tags", tags))
    best = [[0, 1, 2], [0, 3, -1], [3, 4, -1], [0, -1, -1], [-1, -1, -1]]
    # {a, b} and {b, c} share one of three values: 2/3; {a, b} and {b, a}: 0; a set and an empty one: 1.
    found = Diversity(column="tags").values(shown(best, items))
    assert found.tolist() == pytest.approx([(2 / 3 + 0 + 2 / 3) / 3, 1, 0, 0, 0], abs=1e-15)


def test_diversity_equals_a_loop_over_sets() -> None:
    rng = np.random.default_rng(0)
    sets = [set(rng.integers(0, 30, rng.integers(0, 6)).tolist()) for _ in range(50)]
    best = rng.permuted(np.tile(np.arange(50), (150, 1)), axis=1)[:, :8]
    best[rng.random(150) < 0.3, 5:] = -1
    found = Diversity(column="tags").values(
        shown(best.tolist(), ranked_items(np.zeros(50, np.int64), pl.Series("tags", [sorted(s) for s in sets])))
    )
    for row, value in zip(best.tolist(), found.tolist(), strict=True):
        pairs = list(combinations([sets[i] for i in row if i >= 0], 2))
        expected = [1 - len(a & b) / len(a | b) if a | b else 0 for a, b in pairs]
        assert value == pytest.approx(sum(expected) / len(expected), abs=1e-12)


@pytest.mark.parametrize("duplicates", ["last", "keep"])
def test_items_count_users_of_the_train_part_alone(duplicates: str) -> None:
    schema = EVERYTHING_SCHEMA.model_copy(update={"duplicates": duplicates})
    users, table, actions = everything()
    repeated = pl.concat([actions, actions.head(200).with_columns(pl.col("when") + 1)])
    data = build_dataset(check(users, table, repeated, schema), schema, SplitConfig())
    assert (len(data.train) > len(set(zip(data.train.user, data.train.item, strict=True)))) is (duplicates == "keep")
    items = RankedItems.of(data)
    known: list[set[int]] = [set() for _ in range(len(data.items))]
    for user, item in zip(data.train.user.tolist(), data.train.item.tolist(), strict=True):
        known[item].add(user)
    assert items.user_counts.tolist() == [len(users) for users in known]
    assert items.n_users == len(set().union(*known))
    rows = np.array([5, 0, 7])
    some = RankedItems.of(data, rows)
    assert some.user_counts.tolist() == items.user_counts[rows].tolist()
    every, few = items.value_sets("tags"), some.value_sets("tags")
    assert [len(few.row(i)) for i in range(3)] == [len(every.row(row)) for row in rows]


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ([{"kind": "diversity", "column": "tag"}],
         "diversity reads the column 'tag', which the items lack; did you mean 'tags'? (found: iid, "),
        (["diversity"], "'evaluation.metrics.0.column' is missing"),
        (["novelti"], "no metric of kind 'novelti'; did you mean 'novelty'?"),
        (["arp", "arp"], "'arp' is measured already"),
    ],
)  # fmt: skip
def test_a_wrong_metric_is_one_line_and_nothing_is_written(metrics: list[Any], said: str, tmp_path: Path) -> None:
    with one_line(ConfigError, said):
        config = parse_config({"evaluation": {"k": [5], "metrics": metrics}})[1]
        api.fit(everything(), EVERYTHING_SCHEMA, config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
