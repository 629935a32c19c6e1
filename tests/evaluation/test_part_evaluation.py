"""Metrics, slices and baselines of a model on a dataset."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scored import naive_auc, pairs_of, random_factors

from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.evaluation.baselines import bias_baseline, popularity_baseline
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics.ndcg import Ndcg
from twotower.evaluation.part_evaluation import PartEvaluation, evaluate_model, evaluate_part


def oracle(data: Dataset, part: int) -> Factors:
    """Score 2 for a positive of the part, 1 for its other rows, 0 elsewhere."""
    pairs = data.part(part)
    scores = torch.zeros(len(data.users), len(data.items))
    scores[torch.from_numpy(pairs.user).long(), torch.from_numpy(pairs.item).long()] = torch.from_numpy(
        1.0 + pairs.positive
    ).float()
    return Factors(scores, torch.eye(len(data.items)))


@pytest.mark.parametrize("part", [TRAIN, VALIDATION, TEST])
def test_an_oracle_is_perfect_on_every_part(everything_data: Dataset, part: int) -> None:
    data = everything_data
    found = evaluate_part(oracle(data, part), data, part, EvaluationConfig(k=(1, len(data.items)), bootstrap=0))
    perfect = (
        "auc",
        "gauc",
        f"recall@{len(data.items)}",
        f"ndcg@{len(data.items)}",
        "ndcg@1",
        "mrr@1",
        "hit_rate@1",
    )
    assert {name: found[name] for name in perfect} == pytest.approx(dict.fromkeys(perfect, 1.0))
    assert evaluate_part(random_factors(data), data, part, EvaluationConfig(bootstrap=0))["mrr@10"] < 0.9


@pytest.mark.parametrize(("part", "seen_parts"), [(TRAIN, []), (VALIDATION, [TRAIN]), (TEST, [TRAIN, VALIDATION])])
def test_a_ranking_leaves_out_what_was_seen_before_its_part_and_nothing_else(
    everything_data: Dataset, part: int, seen_parts: list[int]
) -> None:
    data = everything_data
    report = PartEvaluation.from_factors(random_factors(data), data, part, EvaluationConfig(k=(len(data.items),)))
    seen = {(u, i) for p in seen_parts for u, i in zip(data.part(p).user, data.part(p).item, strict=True)}
    for u, row in zip(report.users.tolist(), report.rankings.best.tolist(), strict=True):
        assert {i for i in row if i >= 0} == {i for i in range(len(data.items)) if (u, i) not in seen}


def test_a_metric_by_user_has_the_metric_as_its_mean(board: Dataset) -> None:
    found = PartEvaluation.from_factors(random_factors(board), board, TEST, EvaluationConfig(k=(3, 7), bootstrap=0))
    metrics, means = found.metrics(), set[str]()
    for name in metrics:
        if by_user := found.by_user(f"test.{name}"):
            means.add(name)
            assert metrics[name] == pytest.approx(np.average(by_user.values, weights=by_user.weights))
            assert len(np.unique(by_user.users)) == len(by_user.users) == len(by_user.values)
    assert {"gauc", "recall@3", "ndcg@7", "mrr@7", "hit_rate@3"} <= means
    assert not {"auc", "coverage@3"} & means


def test_coverage_is_the_share_of_the_catalogue_in_somebodys_ranking(board: Dataset) -> None:
    # Users 0, 1 and 2 are shown {0, 1}, {1, 2} and {0, 2}; user 3 has no positive and is shown nothing.
    scores = torch.zeros(len(board.users), len(board.items))
    for user, shown in enumerate([(0, 1), (1, 2), (0, 2), (7, 8)]):
        scores[user, list(shown)] = torch.tensor([2.0, 1.0])
    rows = [(0, 5, True), (1, 5, True), (2, 5, True), (3, 5, False)]
    data = replace(board, pairs=pairs_of(rows), parts=np.full(4, TEST, np.int8))
    found = evaluate_part(Factors(scores, torch.eye(len(board.items))), data, TEST, EvaluationConfig(k=(1, 2)))
    assert found["coverage@1"] == pytest.approx(2 / 30)
    assert found["coverage@2"] == pytest.approx(3 / 30)


SLICED = EvaluationConfig(k=(5, 10), bootstrap=20, head_share=0.3, new_user_below=13, new_item_below=20)


def test_slices_equal_loops_over_their_users_and_items(everything_data: Dataset) -> None:
    data, k = everything_data, SLICED.k[0]
    report = PartEvaluation.from_factors(random_factors(data), data, TEST, SLICED)
    found = report.slices()
    user_n, item_n = [0] * len(data.users), [0] * len(data.items)
    for u, i in zip(data.train.user, data.train.item, strict=True):
        user_n[u] += 1
        item_n[i] += 1
    ranked = sorted(range(len(item_n)), key=lambda i: (-item_n[i], i))
    head = set(ranked[: int(0.3 * len(item_n))])
    slices: dict[str, set[int]] = {
        "new_item": {i for i, n in enumerate(item_n) if n < 20}, "head": head, "tail": set(ranked) - head,
    }  # fmt: skip
    new_users = {u for u, n in enumerate(user_n) if n < 13}
    test = list(zip(data.test.user.tolist(), data.test.item.tolist(), data.test.positive.tolist(), strict=True))
    rows = [(float(s), p, u, i) for s, (u, i, p) in zip(report.scored.scores, test, strict=True)]

    def auc_of(chosen: list[tuple[float, bool, int, int]]) -> float:
        return naive_auc([(s, p, 0) for s, p, _, _ in chosen])

    mine = [r for r in rows if r[2] in new_users]
    assert found["rows.new_user"] == len(mine) > 0
    assert found["auc.new_user"] == pytest.approx(auc_of(mine))
    shown = {u: row[:k] for u, row in zip(report.users.tolist(), report.rankings.best.tolist(), strict=True)}

    def recall(users: set[int], items: set[int]) -> float:
        each = []
        for u in shown.keys() & users:
            targets = {i for v, i, p in test if v == u and p and i in items}
            if targets:
                each.append(len(targets & set(shown[u])) / len(targets))
        return sum(each) / len(each)

    assert found[f"recall@{k}.new_user"] == pytest.approx(recall(new_users, set(range(len(item_n)))))
    everyone = set(range(len(user_n)))
    for name, items in slices.items():
        mine = [r for r in rows if r[3] in items]
        assert found[f"rows.{name}"] == len(mine) > 0
        assert found[f"auc.{name}"] == pytest.approx(auc_of(mine))
        assert found[f"recall@{k}.{name}"] == pytest.approx(recall(everyone, items))
    per_user = Ndcg().values(report.rankings.at(k))
    assert found[f"ndcg@{k}.new_user"] == pytest.approx(per_user[np.isin(report.users, list(new_users))].mean())


def test_an_empty_slice_is_left_out(everything_data: Dataset) -> None:
    config = EvaluationConfig(k=(5,), bootstrap=0, new_user_below=1, new_item_below=1)
    found = PartEvaluation.from_factors(random_factors(everything_data), everything_data, TEST, config).slices()
    assert (found["rows.new_user"], found["rows.new_item"]) == (0, 0)
    assert not {"auc.new_user", "auc.new_item", "recall@5.new_user", "recall@5.new_item"} & found.keys()


def test_evaluate_gives_every_promised_number_and_no_nan(everything_data: Dataset) -> None:
    names = SLICED.metric_set.names(SLICED.k)
    assert len(names) == 13
    spread = [n for n in names if n not in ("auc", "log_loss") and not n.startswith("coverage")]
    expected = {f"{part}.{n}" for part in ("validation", "test") for n in names}
    expected |= {f"test.{n}.{end}" for n in spread for end in ("low", "high")} | {"test.width"}
    expected |= {f"baseline.{b}.{n}" for b in ("popularity", "bias") for n in names if n != "log_loss"}
    slices = ("new_user", "new_item", "head", "tail")
    expected |= {f"test.{m}.{s}" for m in ("rows", "auc", "recall@5") for s in slices} | {"test.ndcg@5.new_user"}
    found = evaluate_model(lambda part: random_factors(everything_data), everything_data, SLICED)
    assert set(found) == expected
    assert all(math.isfinite(value) for value in found.values())
    assert all(found[f"test.{n}.low"] <= found[f"test.{n}"] <= found[f"test.{n}.high"] for n in spread)


def test_evaluate_reports_each_part_and_each_baseline_under_its_own_name(everything_data: Dataset) -> None:
    data = everything_data
    found = evaluate_model(lambda part: oracle(data, TEST), data, SLICED)
    assert found["test.auc"] == 1.0
    assert found["validation.auc"] == 0.5  # the oracle of one part knows nothing of another
    train, n_users, n_items = data.train, len(data.users), len(data.items)
    for name, factors in (
        ("popularity", popularity_baseline(train, n_users, n_items)),
        ("bias", bias_baseline(train, n_users, n_items)),
    ):
        alone = evaluate_part(factors, data, TEST, SLICED)
        assert {m: found[f"baseline.{name}.{m}"] for m in alone if m != "log_loss"} == {
            m: value for m, value in alone.items() if m != "log_loss"
        }


def test_validation_metrics_that_are_known_are_not_measured_again(everything_data: Dataset) -> None:
    data, asked, known = everything_data, [], {"validation.auc": 0.75, "loss": 0.5}

    def factors(part: int) -> Factors:
        asked.append(part)
        return random_factors(data)

    found = evaluate_model(factors, data, SLICED, known)
    assert (set(asked), found["validation.auc"]) == ({TEST}, 0.75)
    assert "loss" not in found
    measured = evaluate_model(factors, data, SLICED)
    assert {m: v for m, v in found.items() if not m.startswith("validation.")} == {
        m: v for m, v in measured.items() if not m.startswith("validation.")
    }


def test_a_part_without_positives_has_no_ranking_metrics_and_breaks_nothing(board: Dataset) -> None:
    rows = [(u, i, True) for u in range(3) for i in range(4)] + [(0, 9, True), (1, 9, False), (0, 8, False)]
    parts = np.array([TRAIN] * 12 + [VALIDATION, TEST, TEST], np.int8)
    data = replace(board, pairs=pairs_of(rows), parts=parts)
    found = evaluate_model(lambda part: random_factors(data), data, EvaluationConfig(k=(3,), bootstrap=5))
    assert "validation.recall@3" in found
    assert not [name for name in found if name.startswith("test.") and "@3" in name and "coverage" not in name]
    assert math.isfinite(found["test.log_loss"])


@pytest.mark.parametrize("metric", ["ndcg@5", "gauc", "auc"])
def test_a_difference_to_a_baseline_has_a_paired_interval(everything_data: Dataset, metric: str) -> None:
    """An interval of the same vectors is zero, and an oracle is better than popularity by more than chance."""
    data, config = everything_data, EvaluationConfig(k=(5,), bootstrap=50)
    best = PartEvaluation.from_factors(oracle(data, TEST), data, TEST, config)
    popular = PartEvaluation.from_factors(
        popularity_baseline(data.train, len(data.users), len(data.items)), data, TEST, config
    )
    difference = best.metrics()[metric] - popular.metrics()[metric]
    low, high = best.interval_of_difference(popular, metric)
    assert 0 < low < difference < high
    assert best.interval_of_difference(best, metric) == (0, 0)
    assert popular.interval_of_difference(best, metric) == pytest.approx((-high, -low))
    without = replace(best, config=EvaluationConfig(k=(5,), bootstrap=0))
    assert np.isnan(without.interval_of_difference(popular, metric)).all()


def test_the_best_baseline_by_the_monitored_metric_has_the_interval(everything_data: Dataset) -> None:
    data = everything_data
    for metric in ("ndcg@5", "auc", "log_loss"):
        found = evaluate_model(lambda part: oracle(data, TEST), data, SLICED, monitor=f"validation.{metric}")
        judged = "auc" if metric == "log_loss" else metric
        best = max(("popularity", "bias"), key=lambda of: found[f"baseline.{of}.{judged}"])
        ends = {f"difference.{best}.{judged}.low", f"difference.{best}.{judged}.high"}
        assert {name for name in found if name.startswith("difference.")} == ends
