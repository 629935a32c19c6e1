"""Metrics by weight: weight 2 is the row twice, weight 0 no target, and numbers computed by loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compared import comparison_data
from mykinds.metrics import Herfindahl, TailShare
from scored import random_factors
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST
from twotower.data.tables import check
from twotower.errors import ConfigError, RunError
from twotower.evaluation.baselines import bias_baseline, popularity_baseline
from twotower.evaluation.comparison import compare_factors
from twotower.evaluation.config import EvaluationConfig, MetricSet, Repeats
from twotower.evaluation.metrics import METRICS
from twotower.evaluation.metrics.auc import auc_by_group
from twotower.evaluation.metrics.diversity import Diversity
from twotower.evaluation.metrics.metric import Metric
from twotower.evaluation.part_evaluation import PartEvaluation
from twotower.features.schema import Schema
from twotower.reports.compare import compare_runs

ADDED: tuple[Metric, ...] = (
    *(Diversity(column="item_id") if kind is Diversity else kind() for kind in METRICS if not kind.always),
    TailShare(),
    Herfindahl(),
)
CONFIG = EvaluationConfig(k=(3, 7), metrics=ADDED, bootstrap=20, weighted=True)
NAMES = [*CONFIG.metric_set.names(CONFIG.k)]


@pytest.fixture(scope="module")
def weighted() -> Dataset:
    """Test rows of weights 0 to 3, other rows of weights 1 to 3."""
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"duplicates": "keep"})
    found = build_dataset(check(*checkerboard(20, 16), schema), schema, SplitConfig(kind="random", test=0.4, seed=2))
    weight = np.random.default_rng(3).integers(0, 4, len(found.pairs)).astype(np.float32)
    weight[(found.parts != TEST) & (weight == 0)] = 1
    return replace(found, pairs=replace(found.pairs, weight=weight))


@pytest.fixture(scope="module")
def repeated(weighted: Dataset) -> Dataset:
    """The same rows of weight 1, each as often as it weighs."""
    rows = np.repeat(np.arange(len(weighted.pairs)), weighted.pairs.weight.astype(int))
    pairs = replace(weighted.pairs.take(rows), weight=np.ones(len(rows), np.float32))
    return replace(weighted, pairs=pairs, parts=weighted.parts[rows], times=weighted.times[rows])


def evaluation(data: Dataset, config: EvaluationConfig = CONFIG) -> PartEvaluation:
    return PartEvaluation.from_factors(random_factors(data), data, TEST, config)


@pytest.mark.parametrize("name", NAMES)
def test_weight_2_is_the_row_twice_and_weight_0_no_target_for_every_metric(
    weighted: Dataset, repeated: Dataset, name: str
) -> None:
    one, other = evaluation(weighted), evaluation(repeated)
    assert one.metrics()[name] == pytest.approx(other.metrics()[name], rel=1e-6)
    if name in other.intervals():
        assert one.intervals()[name] == pytest.approx(other.intervals()[name], rel=1e-6)


@pytest.mark.parametrize("repeats", ["allow", "only"])
def test_repeats_are_weighed_too(weighted: Dataset, repeated: Dataset, repeats: Repeats) -> None:
    config = CONFIG.model_copy(update={"repeats": repeats})
    found = []
    for data in (weighted, repeated):
        item = data.pairs.item // 3  # so that earlier parts hold items of the test
        found.append(evaluation(replace(data, pairs=replace(data.pairs, item=item)), config))
    assert found[0].rankings.weights is not None
    assert found[0].rankings.weights.total.max() > 3
    assert found[0].metrics() == pytest.approx(found[1].metrics(), rel=1e-6)


def test_weights_matter_where_rows_are_counted(weighted: Dataset) -> None:
    one, other = (
        evaluation(weighted).metrics(),
        evaluation(weighted, CONFIG.model_copy(update={"weighted": False})).metrics(),
    )
    changed = {name.partition("@")[0] for name in NAMES if one[name] != pytest.approx(other[name])}
    assert changed == {"auc", "gauc", "log_loss", "recall", "ndcg", "arp", "tail_share"}


@pytest.mark.parametrize("heavy", [1e6, 1e12])
@pytest.mark.parametrize("piece", [7, 1000])
def test_a_group_of_great_weight_changes_no_other_group(heavy: float, piece: int) -> None:
    rng = np.random.default_rng(1)
    group, scores, positive = (
        rng.integers(0, 40, 400),
        rng.integers(0, 30, 400).astype(np.float32),
        rng.random(400) < 0.5,
    )
    weights = (rng.random(400) + 0.1).astype(np.float32)
    weights[group < 3] *= heavy
    weights[(group == 5) & positive] *= heavy
    users, areas, sizes = auc_by_group(scores, positive, group, weights, piece)
    assert {0, 5, 39} <= set(users.tolist())
    for user, area, size in zip(users.tolist(), areas, sizes, strict=True):
        mine = (group == user) & (weights > 0)
        up, down = mine & positive, mine & ~positive
        pairs = weights[up, None].astype(float) * weights[None, down].astype(float)
        wins = (scores[up, None] > scores[None, down]) + 0.5 * (scores[up, None] == scores[None, down])
        assert area == pytest.approx((pairs * wins).sum() / pairs.sum(), rel=1e-9)
        assert size == pytest.approx(weights[mine].astype(float).sum(), rel=1e-9)


def test_baselines_and_comparisons_go_by_weight(weighted: Dataset, repeated: Dataset) -> None:
    for baseline in (popularity_baseline, bias_baseline):
        one, other = (baseline(d.train, 20, 16) for d in (weighted, repeated))
        np.testing.assert_allclose(one.users, other.users, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one.items, other.items, rtol=1e-5, atol=1e-6)
    found = []
    for data in (weighted, repeated):
        users = np.unique(weighted.test.user[weighted.test.target]).astype(np.int64)
        test = comparison_data(data, users, True)
        a, b = (replace(f, users=f.users[users]) for f in (random_factors(data, 1), random_factors(data, 2)))
        found.append(compare_factors(a, b, test, [3], 30, metrics=MetricSet(ADDED)))
    for x, y in zip(*found, strict=True):
        assert (x.metric, x.users) == (y.metric, y.users)
        assert [x.a, x.b, x.low, x.high] == pytest.approx([y.a, y.b, y.low, y.high], rel=1e-5)


def test_a_log_of_events_is_trained_published_and_measured_by_weight(tmp_path: Path) -> None:
    users, items, log = checkerboard(20, 16)
    types = np.where(log["liked"].to_numpy() == 1, np.where(log["at"].to_numpy() % 3 == 0, "buy", "view"), "skip")
    rules = {"label": "", "event": "type", "events": {"view": 0.2, "buy": 3, "skip": "negative"}}
    schema = Schema.model_validate(CHECKERBOARD_SCHEMA.model_dump() | rules)
    config = settings(evaluation={"weighted": True}, train={"epochs": 1})
    run = api.fit((users, items, log.with_columns(type=types)), schema, config, folder=tmp_path / "run")
    assert "Rows count by their weights." in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    loaded = api.load(tmp_path / "run")
    measured = api.evaluate(loaded)
    assert {n: run.metrics[n] for n in measured} == measured
    other = replace(loaded, config=settings())
    assert api.evaluate(other)["test.ndcg@5"] != measured["test.ndcg@5"]
    with pytest.raises(
        RunError, match=r"evaluation.weighted is true in .*run and false in .*; compare runs with the same"
    ):
        compare_runs(run, other)
    api.publish(run, tmp_path / "store", force=True)
    served = api.evaluate_bundle(api.retriever(tmp_path / "store"))
    names = ("auc", "gauc", "recall@5", "ndcg@5")
    assert {n: served["exact"][n] for n in names} == pytest.approx({n: run.metrics[f"test.{n}"] for n in names})


def test_weighted_metrics_need_weights() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.weighted = true needs weights, and the schema has none; name a"):
        api.fit(checkerboard(20, 16), CHECKERBOARD_SCHEMA, settings(evaluation={"weighted": True}))
