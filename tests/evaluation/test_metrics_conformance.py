"""Every registered metric, and two of elsewhere, keeps the promises of its family."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mykinds.metrics import Herfindahl, TailShare
from scored import ranked_items
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api
from twotower.arrays.pieces import ones
from twotower.arrays.types import Bools, Ints
from twotower.evaluation.comparison import Comparison
from twotower.evaluation.config import EvaluationConfig, MetricSet
from twotower.evaluation.metrics import METRICS
from twotower.evaluation.metrics.diversity import Diversity
from twotower.evaluation.metrics.measured import Rankings, ScoredPairs
from twotower.evaluation.metrics.metric import CatalogueMetric, Metric, PairMetric, RankingMetric
from twotower.reports.compare import compare_runs
from twotower.reports.metric_tables import columns

ALL: list[Metric] = [
    *(Diversity(column="tags") if kind is Diversity else kind() for kind in METRICS), TailShare(), Herfindahl(),
]  # fmt: skip
PAIRS = [m for m in ALL if isinstance(m, PairMetric)]
USERS = [m for m in ALL if isinstance(m, RankingMetric)]
CATALOGUE = [m for m in ALL if isinstance(m, CatalogueMetric)]
N_ITEMS = 12


def name_of(metric: Metric) -> str:
    return metric.name


def scored(seed: int = 0) -> ScoredPairs:
    rng = np.random.default_rng(seed)
    scores, positive = rng.standard_normal(300).astype(np.float32), rng.random(300) < 0.4
    return ScoredPairs(scores, positive, rng.integers(0, 9, 300), ones(300))


def rankings(hit: Bools, n_targets: Ints | None = None, seed: int = 0) -> Rankings:
    rng = np.random.default_rng(seed)
    best = rng.permuted(np.tile(np.arange(N_ITEMS), (len(hit), 1)), axis=1)[:, : hit.shape[1]]
    items = ranked_items(rng.multinomial(200, np.full(N_ITEMS, 1 / N_ITEMS)), n_users=200)
    return Rankings.alike(best, hit, np.full(len(hit), hit.shape[1]) if n_targets is None else n_targets, items)


def sign(metric: Metric) -> int:
    """-1 if lower is better."""
    return 1 if metric.higher_is_better else -1


@pytest.mark.parametrize("metric", ALL, ids=name_of)
def test_a_metric_has_a_family_a_name_and_a_documentation(metric: Metric) -> None:
    assert sum(metric in family for family in (PAIRS, USERS, CATALOGUE)) == 1
    assert metric.at_cut_offs == (metric not in PAIRS)
    assert metric.name == metric.name.lower()
    assert not set(metric.name) & set(".@:")
    assert len(type(metric).__doc__ or "") > 20


@pytest.mark.parametrize("metric", PAIRS, ids=name_of)
def test_pairs_in_order_are_better_than_pairs_in_the_wrong_order(metric: PairMetric) -> None:
    some = scored()
    right, wrong = (replace(some, scores=s.astype(np.float32)) for s in (some.positive, ~some.positive))
    values = [sign(metric) * metric.value(pairs) for pairs in (wrong, some, right)]
    assert values == sorted(values)
    assert values[0] < values[2]


@pytest.mark.parametrize("metric", PAIRS, ids=name_of)
def test_no_pairs_have_no_value_and_their_order_does_not_matter(metric: PairMetric) -> None:
    some, order = scored(), np.random.default_rng(1).permutation(300)
    mixed = ScoredPairs(some.scores[order], some.positive[order], some.users[order], ones(300))
    assert metric.value(mixed) == pytest.approx(metric.value(some))
    assert math.isnan(metric.value(some.where(np.zeros(300, bool))))


@pytest.mark.parametrize("metric", PAIRS, ids=name_of)
def test_values_by_user_and_of_resamples_are_the_metric(metric: PairMetric) -> None:
    some, once = scored(), np.ones((1, 9))
    if by_user := metric.by_user(some):
        assert np.average(by_user.values, weights=by_user.weights) == pytest.approx(metric.value(some))
        assert by_user.users.tolist() == sorted(set(by_user.users.tolist()))
    resampled = metric.resampled(some, [once, 2 * once])
    if resampled is not None:
        assert resampled.tolist() == pytest.approx([metric.value(some)] * 2)


@pytest.mark.parametrize("metric", USERS, ids=name_of)
def test_one_more_hit_makes_no_ranking_worse(metric: RankingMetric) -> None:
    none = np.zeros((4, 5), bool)
    for rank in range(5):
        one, two = none.copy(), none.copy()
        one[:, 2] = two[:, 2] = two[:, rank] = True
        values = [sign(metric) * metric.values(rankings(hit)) for hit in (none, one, two)]
        assert (values[0] <= values[1]).all()
        assert (values[1] <= values[2]).all()


@pytest.mark.parametrize("metric", USERS, ids=name_of)
def test_a_user_has_one_finite_value_whoever_stands_beside(metric: RankingMetric) -> None:
    hit = np.random.default_rng(2).random((6, 5)) < 0.3
    all_of_them = rankings(hit)
    values = metric.values(all_of_them)
    assert values.shape == (6,)
    assert np.isfinite(values).all()
    alone = all_of_them.of_users(np.arange(6) == 2)
    assert metric.values(alone).tolist() == pytest.approx([values[2]])
    assert metric.values(all_of_them.at(3)).tolist() == metric.values(rankings(hit).at(3).at(4)).tolist()
    assert metric.values(rankings(hit[:0])).shape == (0,)


@pytest.mark.parametrize("metric", CATALOGUE, ids=name_of)
def test_rankings_of_many_items_and_of_one_lie_between_0_and_1(metric: CatalogueMetric) -> None:
    each = np.arange(N_ITEMS)[:, None]
    items, hit, one = (
        ranked_items(np.zeros(N_ITEMS, np.int64)),
        np.zeros((N_ITEMS, 1), bool),
        np.ones(N_ITEMS, np.int64),
    )
    spread, single = (Rankings.alike(best, hit, one, items) for best in (each, np.zeros_like(each)))
    low, high = sorted([metric.value(spread), metric.value(single)])
    assert 0 <= low < high <= 1
    assert sign(metric) * metric.value(spread) > sign(metric) * metric.value(single)
    padded = Rankings.alike(np.concatenate([each, np.full_like(each, -1)], 1), np.zeros((N_ITEMS, 2), bool), one, items)
    assert metric.value(padded) == metric.value(spread)


def test_metrics_of_elsewhere_by_hand() -> None:
    best = np.array([[0, 1], [2, -1]])
    shown = Rankings.alike(best, best < 0, np.array([1, 1]), ranked_items(np.array([9, 2, 1, 0, 0])))
    # A fifth of the five items, the first, is the head.
    assert TailShare().values(shown).tolist() == [1 / 2, 1]
    # Three items have a third of the three places each.
    assert Herfindahl().value(shown) == pytest.approx(1 / 3)


def test_metrics_of_elsewhere_stand_behind_those_of_their_family() -> None:
    config = EvaluationConfig.model_validate({"k": [3], "metrics": ["mykinds.metrics:Herfindahl", TailShare()]})
    names = config.metric_set.names(config.k)
    assert names == [
        *(n for n in MetricSet().names([3]) if n != "coverage@3"),
        "tail_share@3",
        "coverage@3",
        "herfindahl@3",
    ]
    assert not config.metric_set.find("test.herfindahl@3").higher_is_better


def test_two_metrics_of_one_name_are_refused() -> None:
    for metrics in (["recall"], [TailShare(), TailShare(head=0.1)]):
        with pytest.raises(ValueError, match="is measured already; leave it out"):
            EvaluationConfig.model_validate({"metrics": metrics})


def test_a_metric_of_elsewhere_stands_in_every_report_and_selects_the_epoch(tmp_path: Path) -> None:
    config = settings(
        evaluation={"k": [3], "bootstrap": 20, "metrics": ["mykinds.metrics:TailShare", "mykinds.metrics:Herfindahl"]},
        train={"epochs": 3, "monitor": "validation.herfindahl@3"},
    )
    run = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, config, folder=tmp_path / "run")
    curve = [epoch["validation.herfindahl@3"] for epoch in run.history]
    assert run.metrics["train.best_epoch"] == 1 + curve.index(min(curve))
    for name in ("test.tail_share@3", "test.tail_share@3.low", "baseline.popularity.tail_share@3", "test.herfindahl@3"):
        assert name in run.metrics
    assert {"tail_share@3", "herfindahl@3"} < set(columns(run.config.evaluation))
    bundle = api.publish(run, tmp_path / "store", force=True)
    assert "\n| herfindahl@3 | " in (bundle.folder / "README.md").read_text(encoding="utf-8")
    assert "tail_share@3" in {c.metric for c in compare_runs(run, run, resamples=10)}


def test_the_better_of_two_runs_is_the_lower_one_where_lower_is_better() -> None:
    higher = Comparison("recall@3", 0.1, 0.3, 0.2, 0.1, 0.3, 0.01, 9)
    lower = replace(higher, higher_is_better=False)
    assert (higher.verdict, lower.verdict) == ("B is better", "A is better")
    assert replace(lower, low=-0.3, high=-0.1).verdict == "B is better"
    assert replace(lower, low=-0.1).verdict == "no significant difference"
