"""Metrics by the values of a column of the users, and their gap."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from messages import one_line
from scored import naive_auc, random_factors
from worlds import EVERYTHING_SCHEMA, everything, settings

from twotower import api
from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST
from twotower.errors import ConfigError
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.metrics.recall import Recall
from twotower.evaluation.part_evaluation import PartEvaluation
from twotower.evaluation.slices import MISSING, UserSlices


def test_numbers_are_cut_at_their_quartiles_and_few_of_them_are_values() -> None:
    ages = [*range(1, 13), None, float("nan")]
    sliced = UserSlices.of(pl.DataFrame({"age": pl.Series(ages, dtype=pl.Float64)}), "age")
    assert sliced.values == ["..3.75", "3.75..6.5", "6.5..9.25", "9.25..", MISSING]
    assert sliced.places.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 2
    few = UserSlices.of(pl.DataFrame({"n": [3, 10, None, 3]}), "n")
    assert (few.values, few.places.tolist()) == (["3", "10", MISSING], [0, 1, 2, 0])
    same = UserSlices.of(pl.DataFrame({"n": [5.0] * 20 + [float(i) for i in range(11)]}), "n")
    assert same.values == ["..5", "5..", MISSING]
    assert same.places.tolist() == [1] * 20 + [0] * 5 + [1] * 6


def test_only_the_largest_slices_are_measured() -> None:
    users = pl.DataFrame({"zip": [f"{i % 70:03}" for i in range(210)] + ["000"]})
    sliced = UserSlices.of(users, "zip")
    every = np.arange(211)
    assert len(sliced.measured(every, 1)) == 50
    assert (sliced.measured(every, 4), sliced.measured(every, 5)) == ([0], [])


def test_slices_of_a_column_equal_loops_over_its_users(everything_data: Dataset) -> None:
    data, k = everything_data, 5
    config = EvaluationConfig(k=(k, 10), bootstrap=0, slices=("city",), slice_min_users=10)
    report = PartEvaluation.from_factors(random_factors(data), data, TEST, config)
    found = report.slices()
    city = [c or MISSING for c in data.users.frame["city"].to_list()]
    recalls = Recall().values(report.rankings.at(k)).tolist()
    ranked = Counter(city[u] for u in report.users.tolist())
    small = {c for c, n in ranked.items() if n < 10}
    assert small
    assert found["users.city.left_out"] == sum(ranked[c] for c in small)
    names = {name.removeprefix("users.city=") for name in found if name.startswith("users.city=")}
    assert names == ranked.keys() - small
    assert len(names) > 2
    for name in names:
        assert found[f"users.city={name}"] == ranked[name]
        own = [r for r, u in zip(recalls, report.users.tolist(), strict=True) if city[u] == name]
        assert found[f"recall@{k}.city={name}"] == pytest.approx(sum(own) / len(own))
        rows = zip(report.scored.scores.tolist(), data.test.positive.tolist(), data.test.user.tolist(), strict=True)
        assert found[f"auc.city={name}"] == pytest.approx(naive_auc([(s, p, 0) for s, p, u in rows if city[u] == name]))
    for metric in ("auc", f"recall@{k}", f"ndcg@{k}"):
        values = [found[f"{metric}.city={name}"] for name in names]
        assert found[f"{metric}.city.gap"] == pytest.approx(max(values) - min(values))
    assert not {name for name in found if name.startswith("log_loss")}


def test_a_gap_of_one_value_is_none(everything_data: Dataset) -> None:
    frame = everything_data.users.frame.with_columns(all=pl.lit("x"))
    data = replace(everything_data, users=replace(everything_data.users, frame=frame))
    config = EvaluationConfig(k=(5,), bootstrap=0, slices=("all",))
    found = PartEvaluation.from_factors(random_factors(data), data, TEST, config).slices()
    assert (found["users.all=x"], found["users.all.left_out"]) == (50, 0)
    assert not {name for name in found if name.endswith(".gap")}


def test_a_run_has_the_slices_in_its_metrics_and_its_report(tmp_path: Path) -> None:
    """A column that no feature reads is one of the table, too."""
    users, items, actions = everything()
    users = users.with_columns(gender=pl.Series(["<F>", "M"] * 30))
    config = settings(evaluation={"k": [5], "metrics": ["novelty"], "slices": ["gender", "age"], "slice_min_users": 5})
    run = api.fit((users, items, actions), EVERYTHING_SCHEMA, config, folder=tmp_path / "run")
    assert run.metrics["test.users.gender=<F>"] + run.metrics["test.users.gender=M"] == 50
    novelty = [run.metrics[f"test.novelty@5.gender={value}"] for value in ("<F>", "M")]
    assert run.metrics["test.novelty@5.gender.gap"] == pytest.approx(abs(novelty[0] - novelty[1]))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    table = page.partition("<h3>By gender</h3>")[2].partition("<h3>By age</h3>")[0]
    assert f"<td>&lt;F&gt;</td><td>{run.metrics['test.users.gender=<F>']:.0f}</td>" in table
    assert f"{run.metrics['test.recall@5.gender.gap']:.4f}" in table.partition("<td>gap</td>")[2]
    loaded = api.load(tmp_path / "run")
    measured = api.evaluate(loaded)
    assert {name: run.metrics[name] for name in measured} == measured


@pytest.mark.parametrize(
    ("slices", "said"),
    [
        (["sity"], "evaluation.slices: the users have no column 'sity'; did you mean 'city'? (found: uid, "),
        (["friends"], "evaluation.slices: column 'friends' of the users holds List(Int64), expected one value a row"),
        (["city", "city"], "'city' stands there twice; name each column once"),
    ],
)
def test_a_wrong_column_is_one_line_and_nothing_is_written(slices: list[str], said: str, tmp_path: Path) -> None:
    users, items, actions = everything()
    users = users.with_columns(friends=pl.Series([[1, 2]] * 60))
    with one_line(ConfigError, said):
        config = parse_config({"evaluation": {"k": [5], "slices": slices}})[1]
        api.fit((users, items, actions), EVERYTHING_SCHEMA, config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
