"""Metrics against loops and hand-computed fractions, rankings against a full sort, a model on a dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import settings as config_of

from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.evaluation.baselines import bias_baseline, popularity_baseline
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics import auc, auc_by_group, bootstrap, gauc, log_loss, metric_names, ranking_metrics
from twotower.evaluation.part import PartEvaluation, evaluate_model, evaluate_part
from twotower.evaluation.ranking import EvaluationConfig, rank_catalogue
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower
from twotower.train.factors import model_factors

quick = settings(deadline=None, max_examples=80)
ROWS = st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), max_size=25)


def arrays(rows: list[tuple[int, bool, int]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    return (
        np.array([s for s, _, _ in rows], np.float32),
        np.array([p for _, p, _ in rows], bool),
        np.array([g for _, _, g in rows], np.int32),
    )


def naive_auc(rows: Sequence[tuple[float, bool, int]]) -> float:
    above = [(s > t) + 0.5 * (s == t) for s, p, _ in rows if p for t, q, _ in rows if not q]
    return sum(above) / len(above) if above else math.nan


def pairs_of(rows: list[tuple[int, int, bool]]) -> Pairs:
    return Pairs(
        np.array([u for u, _, _ in rows], np.int32),
        np.array([i for _, i, _ in rows], np.int32),
        np.array([p for _, _, p in rows], bool),
    )


def random_factors(data: Dataset, seed: int = 0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(len(data.users), 4, generator=rng), torch.randn(len(data.items), 4, generator=rng))


# ---- pairs


@quick
@given(ROWS)
def test_auc_counts_the_pairs_that_are_in_order_and_half_the_ties(rows: list[tuple[int, bool, int]]) -> None:
    scores, positive, _ = arrays(rows)
    assert auc(scores, positive) == pytest.approx(naive_auc(rows), nan_ok=True)


@quick
@given(ROWS)
def test_gauc_is_the_mean_over_groups_with_both_classes_weighted_by_their_rows(
    rows: list[tuple[int, bool, int]],
) -> None:
    groups = {g: [r for r in rows if r[2] == g] for g in sorted({r[2] for r in rows})}
    kept = {g: mine for g, mine in groups.items() if len({p for _, p, _ in mine}) == 2}
    names, values, sizes = auc_by_group(*arrays(rows))
    assert names.tolist() == list(kept)
    assert values.tolist() == pytest.approx([naive_auc(mine) for mine in kept.values()])
    assert sizes.tolist() == [len(mine) for mine in kept.values()]
    n = sum(len(mine) for mine in kept.values())
    expected = sum(len(mine) / n * naive_auc(mine) for mine in kept.values()) if n else math.nan
    assert gauc(*arrays(rows)) == pytest.approx(expected, nan_ok=True)


@quick
@given(st.lists(st.tuples(st.floats(-15, 15), st.booleans()), min_size=1, max_size=20))
def test_log_loss_is_the_mean_of_minus_log_of_the_probability_of_the_label(
    rows: list[tuple[float, bool]],
) -> None:
    expected = 0.0
    for x, positive in rows:
        p = 1 / (1 + math.exp(-x))
        expected -= (math.log(p) if positive else math.log1p(-p)) / len(rows)
    logits, labels = np.array([x for x, _ in rows]), np.array([p for _, p in rows])
    assert log_loss(logits, labels) == pytest.approx(expected, rel=1e-7)


def test_log_loss_of_a_huge_logit_is_finite() -> None:
    assert log_loss(np.array([1000.0, -2000.0], np.float32), np.array([False, True])) == pytest.approx(1500.0)


def test_pair_metrics_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.8, 0.1], np.float32)
    positive = np.array([True, False, True, False])
    # Of the four (positive, negative) pairs three are in order and one is a tie.
    assert auc(scores, positive) == 3.5 / 4
    # User 0 has (0.9+, 0.8-): 1. User 1 has (0.8+, 0.1-): 1. User 2 has one class only.
    assert gauc(np.r_[scores, 5.0], np.r_[positive, True], np.array([0, 0, 1, 1, 2])) == 1.0
    assert gauc(scores, positive, np.array([0, 1, 1, 0])) == (2 * 1 + 2 * 0.5) / 4


EDGES = [-math.inf, -1e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1e38, math.inf]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@quick
@given(st.lists(st.tuples(st.sampled_from(EDGES), st.booleans(), st.sampled_from([0, 2**31 - 1])), max_size=25))
def test_scores_of_any_size_and_both_zeros_are_ordered_as_numbers(
    kind: type[np.floating[Any]], rows: list[tuple[float, bool, int]]
) -> None:
    scores = np.array([r[0] for r in rows], kind)
    positive = np.array([r[1] for r in rows], bool)
    group = np.array([r[2] for r in rows], np.int32)
    known = [(float(s), p, g) for s, (_, p, g) in zip(scores, rows, strict=True)]
    assert auc(scores, positive) == pytest.approx(naive_auc(known), nan_ok=True)
    names, values, _ = auc_by_group(scores, positive, group)
    for name, value in zip(names, values, strict=True):
        assert value == pytest.approx(naive_auc([r for r in known if r[2] == name]))


@pytest.mark.parametrize("labels", [[True, True], [False, False], []])
def test_auc_of_one_class_is_nan(labels: list[bool]) -> None:
    scores, positive, group = np.arange(len(labels)), np.array(labels, bool), np.zeros(len(labels), np.int32)
    assert math.isnan(auc(scores, positive))
    assert math.isnan(gauc(scores, positive, group))


@quick
@given(ROWS, st.sampled_from([np.exp, np.arctan, lambda x: x**3, lambda x: 5 * x - 2]))
def test_a_strictly_monotone_map_of_the_scores_changes_no_ranking_of_pairs(
    rows: list[tuple[int, bool, int]], f: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> None:
    scores, positive, group = arrays(rows)
    assert auc(f(scores), positive) == pytest.approx(auc(scores, positive), nan_ok=True)
    assert gauc(f(scores), positive, group) == pytest.approx(gauc(scores, positive, group), nan_ok=True)
    assert auc(-f(scores), positive) == pytest.approx(1 - auc(scores, positive), nan_ok=True)


# ---- ranking metrics


HITS = st.integers(1, 7).flatmap(
    lambda k: st.lists(st.tuples(st.lists(st.booleans(), min_size=k, max_size=k), st.integers(0, 4)), min_size=1)
)


def hits_of(users: list[tuple[list[bool], int]]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """(Q, K) hits and as many wanted items as were hit and some more, at least one."""
    return np.array([h for h, _ in users]), np.array([max(1, sum(h) + more) for h, more in users])


@quick
@given(HITS, st.integers(1, 9))
def test_ranking_metrics_equal_loops_over_the_ranks(users: list[tuple[list[bool], int]], k: int) -> None:
    hit, wanted = hits_of(users)
    found = ranking_metrics(hit, wanted, k)
    for q, (row, n) in enumerate(zip(hit.tolist(), wanted.tolist(), strict=True)):
        ranks = [r for r, h in enumerate(row[:k], start=1) if h]
        ideal = sum(1 / math.log2(r + 1) for r in range(1, min(n, k, len(row)) + 1))
        assert found["recall"][q] == pytest.approx(len(ranks) / n)
        assert found["ndcg"][q] == pytest.approx(sum(1 / math.log2(r + 1) for r in ranks) / ideal)
        assert found["mrr"][q] == pytest.approx(1 / ranks[0] if ranks else 0)
        assert found["hit_rate"][q] == (1.0 if ranks else 0.0)


@pytest.mark.parametrize(
    ("k", "recall", "ndcg", "mrr", "hit_rate"),
    [
        (1, [1 / 2, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]),
        (2, [1 / 2, 0, 1 / 5], [1 / 1.6309298, 0, 0.6309298 / 1.6309298], [1, 0, 1 / 2], [1, 0, 1]),
        (3, [2 / 2, 0, 1 / 5], [1.5 / 1.6309298, 0, 0.6309298 / 2.1309298], [1, 0, 1 / 2], [1, 0, 1]),
    ],
)
def test_ranking_metrics_by_hand(
    k: int, recall: list[float], ndcg: list[float], mrr: list[float], hit_rate: list[float]
) -> None:
    # Discounts of the ranks 1, 2, 3 are 1, 1 / log2(3) = 0.6309298 and 1 / 2.
    hit = np.array([[True, False, True], [False, False, False], [False, True, False]])
    found = ranking_metrics(hit, np.array([2, 1, 5]), k)
    assert found["recall"].tolist() == pytest.approx(recall)
    assert found["ndcg"].tolist() == pytest.approx(ndcg)
    assert found["mrr"].tolist() == pytest.approx(mrr)
    assert found["hit_rate"].tolist() == pytest.approx(hit_rate)


@quick
@given(HITS)
def test_recall_mrr_and_hit_rate_grow_with_k(users: list[tuple[list[bool], int]]) -> None:
    hit, wanted = hits_of(users)
    before = {name: np.zeros(len(hit)) for name in ("recall", "mrr", "hit_rate")}
    for k in range(1, hit.shape[1] + 1):
        found = ranking_metrics(hit, wanted, k)
        assert all((found[name] >= before[name]).all() for name in before)
        assert all((values <= 1 + 1e-12).all() for values in found.values())
        before = {name: found[name] for name in before}
    assert before["recall"].tolist() == pytest.approx((hit.sum(1) / wanted).tolist())


# ---- rankings of the catalogue


@st.composite
def catalogues(
    draw: st.DrawFn,
) -> tuple[npt.NDArray[np.float32], list[tuple[int, int, bool]], list[Any], int]:
    """Distinct scores (users, items), wanted pairs, up to three sets of seen pairs, and k."""
    n_users, n_items = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    order = draw(st.permutations(range(n_users * n_items)))
    pair = st.tuples(st.integers(0, n_users - 1), st.integers(0, n_items - 1), st.booleans())
    wanted = draw(st.lists(pair, max_size=15, unique_by=lambda row: row[:2]))
    seen = draw(st.lists(st.lists(pair, max_size=25), max_size=3))
    scores = np.array(order, np.float32).reshape(n_users, n_items) - n_users * n_items // 2
    return scores, wanted, seen, draw(st.integers(1, 9))


@quick
@given(catalogues())
def test_a_ranking_equals_a_full_sort_of_the_unseen_items_in_blocks_of_any_size(
    world: tuple[npt.NDArray[np.float32], list[tuple[int, int, bool]], list[Any], int],
) -> None:
    scores, wanted, seen, k = world
    n_items = scores.shape[1]
    gone = {(u, i) for part in seen for u, i, _ in part}
    want = {(u, i) for u, i, positive in wanted if positive} - gone
    users = sorted({u for u, _ in want})
    best, hit = [], []
    for u in users:
        unseen = [i for i in range(n_items) if (u, i) not in gone]
        row = sorted(unseen, key=lambda i: -scores[u, i])[:k]
        row += [-1] * (min(k, n_items) - len(row))
        best.append(row)
        hit.append([(u, i) in want for i in row])
    # With the identity as item vectors a user's vector is the row of scores.
    vectors = torch.from_numpy(scores), torch.eye(n_items)
    for block in (1, 2, 7):
        found = rank_catalogue(*vectors, pairs_of(wanted), [pairs_of(p) for p in seen], k, block=block)
        assert found[0].tolist() == users
        assert found[1].shape == found[2].shape == (len(users), min(k, n_items))
        assert found[1].tolist() == best
        assert found[2].tolist() == hit


def test_so_many_users_are_ranked_at_a_time_as_their_scores_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, 3, generator=rng), torch.randn(30, 3, generator=rng)
    wanted = pairs_of([(u, u, True) for u in range(20)])
    expected = rank_catalogue(*vectors, wanted, [], 5)
    sizes: list[int] = []
    topk = torch.Tensor.topk

    def watched(scores: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(scores.numel())
        return topk(scores, *args, **options)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    for cells in (310, 7):  # of 30 items: ten users, and eight even if that is too many
        found = rank_catalogue(*vectors, wanted, [], 5, max_scores=cells)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        assert max(sizes) == max(240, cells // 30 * 30)
        sizes.clear()


def test_equal_scores_give_each_item_once_and_still_none_that_was_seen() -> None:
    seen = pairs_of([(0, 2, False), (0, 5, True), (1, 0, True)])
    wanted = pairs_of([(0, 1, True), (1, 5, True)])
    _, best, hit = rank_catalogue(torch.ones(2, 1), torch.ones(6, 1), wanted, [seen], k=6)
    assert [sorted(row) for row in best.tolist()] == [[-1, -1, 0, 1, 3, 4], [-1, 1, 2, 3, 4, 5]]
    assert hit.sum(1).tolist() == [1, 1]


def test_pairs_are_scored_alike_however_many_at_a_time(everything_data: Dataset) -> None:
    pairs, factors = everything_data.train, random_factors(everything_data)
    expected = (factors.users[pairs.user] * factors.items[pairs.item]).sum(1).numpy()
    for block in (1, 7, len(pairs)):
        assert np.array_equal(factors.scores(pairs, block), expected)


def test_a_monotone_map_of_the_scores_changes_no_ranking() -> None:
    scores = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    wanted = pairs_of([(u, i, True) for u in range(5) for i in (u, u + 3)])
    rankings = [
        rank_catalogue(f(scores), torch.eye(12), wanted, [], k=5)[1]
        for f in (torch.clone, torch.exp, lambda x: 3 * x - 100)
    ]
    assert np.array_equal(rankings[0], rankings[1])
    assert np.array_equal(rankings[0], rankings[2])


# ---- intervals


def test_an_interval_holds_the_weighted_mean_and_is_the_same_every_time() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, 400)
    weights = np.where(values > 3, 9.0, 1.0)  # far from the plain mean
    low, high = bootstrap(values, weights, 500)
    assert low < np.average(values, weights=weights) < high
    assert bootstrap(values, weights, 500) == (low, high)
    assert bootstrap(values, weights, 500, seed=1) != (low, high)


def test_an_interval_is_that_of_the_means_over_drawn_users_for_every_column_as_if_alone() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.random((40, 3)), rng.random(40)
    draws = np.random.default_rng(7)
    picks = [draws.integers(0, 40, 40) for _ in range(30)]
    low, high = bootstrap(values, weights, 30, seed=7)
    for i, column in enumerate(values.T):
        means = [np.average(column[pick], weights=weights[pick]) for pick in picks]
        assert [low[i], high[i]] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), rel=1e-12)
        assert [low[i], high[i]] == pytest.approx(bootstrap(column, weights, 30, seed=7), rel=1e-12)


def test_an_interval_is_as_wide_as_the_normal_one_for_many_users() -> None:
    values = np.random.default_rng(0).normal(0, 2, 1000)
    low, high = bootstrap(values, np.ones(1000), 1000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(1000), rel=0.1)


def test_no_spread_gives_a_point_and_no_resamples_or_users_give_nothing() -> None:
    assert bootstrap(np.full(9, 0.25), np.ones(9), 20) == (0.25, 0.25)
    assert all(math.isnan(x) for x in bootstrap(np.ones(9), np.ones(9), 0))
    assert all(math.isnan(x) for x in bootstrap(np.ones(0), np.ones(0), 20))


# ---- baselines


def test_popularity_counts_the_positives_of_an_item_in_training(everything_data: Dataset) -> None:
    data = everything_data
    factors = popularity_baseline(data.train, len(data.users), len(data.items))
    counts = [0] * len(data.items)
    for item, positive in zip(data.train.item, data.train.positive, strict=True):
        counts[item] += int(positive)
    assert factors.scores(data.test).tolist() == [counts[i] for i in data.test.item]
    assert 0 < min(counts) < max(counts)


def test_biases_equal_alternating_shrunk_means(everything_data: Dataset) -> None:
    data = everything_data
    train = list(zip(data.train.user.tolist(), data.train.item.tolist(), data.train.positive.tolist(), strict=True))
    mean = sum(p for _, _, p in train) / len(train)
    bu, bi = [0.0] * len(data.users), [0.0] * len(data.items)
    for _ in range(3):
        for i in range(len(bi)):
            rest = [p - mean - bu[u] for u, j, p in train if j == i]
            bi[i] = sum(rest) / (len(rest) + 4)
        for u in range(len(bu)):
            rest = [p - mean - bi[i] for v, i, p in train if v == u]
            bu[u] = sum(rest) / (len(rest) + 4)
    factors = bias_baseline(data.train, len(bu), len(bi), strength=4, rounds=3)
    everywhere = pairs_of([(u, i, True) for u in range(len(bu)) for i in range(len(bi))])
    expected = [mean + bu[u] + bi[i] for u in range(len(bu)) for i in range(len(bi))]
    assert factors.scores(everywhere).tolist() == pytest.approx(expected, abs=1e-6)


def test_scores_of_pairs_are_dot_products_in_blocks_of_any_size(everything_data: Dataset) -> None:
    factors, pairs = random_factors(everything_data), everything_data.test
    expected = [float(factors.users[u] @ factors.items[i]) for u, i in zip(pairs.user, pairs.item, strict=True)]
    for block in (1, 7, 10_000):
        assert factors.scores(pairs, block).tolist() == pytest.approx(expected, abs=1e-5)


# ---- a model on a dataset


def test_vectors_come_from_evaluation_mode_in_blocks_and_leave_the_mode_as_it_was(
    everything_data: Dataset,
) -> None:
    data = everything_data
    fields = data.encoders.fields("user"), data.encoders.fields("item")
    tower = {"layers": [8], "field_dropout": 0.5}
    model = TwoTower(config_of(model={"width": 4, "pairs": [{"user": tower, "item": tower}]}).model, *fields)
    users, items = SideTensors(data.users, fields[0]), SideTensors(data.items, fields[1])
    model.train()
    whole, parts = model_factors(model, users, items), model_factors(model, users, items, block=7)
    assert model.training
    assert torch.allclose(whole.users, parts.users, atol=1e-6)
    assert torch.allclose(whole.items, parts.items, atol=1e-6)
    assert not whole.users.requires_grad
    model.eval()
    model_factors(model, users, items)
    assert not model.training


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
    for u, row in zip(report.users.tolist(), report.best.tolist(), strict=True):
        assert {i for i in row if i >= 0} == {i for i in range(len(data.items)) if (u, i) not in seen}


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


def test_coverage_does_not_count_the_places_that_no_item_fills(board: Dataset) -> None:
    n = len(board.items)
    rows = [(0, i, True) for i in range(n)]
    data = replace(board, pairs=pairs_of(rows), parts=np.array([TRAIN] * (n - 3) + [TEST] * 3, np.int8))
    found = evaluate_part(random_factors(data), data, TEST, EvaluationConfig(k=(2, n)))
    assert found[f"coverage@{n}"] == pytest.approx(3 / n)
    assert found[f"recall@{n}"] == 1.0
    assert found["recall@2"] == pytest.approx(2 / 3)


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
    rows = [(float(s), p, u, i) for s, (u, i, p) in zip(report.scores, test, strict=True)]

    def auc_of(chosen: list[tuple[float, bool, int, int]]) -> float:
        return naive_auc([(s, p, 0) for s, p, _, _ in chosen])

    mine = [r for r in rows if r[2] in new_users]
    assert found["rows.new_user"] == len(mine) > 0
    assert found["auc.new_user"] == pytest.approx(auc_of(mine))
    shown = {u: row[:k] for u, row in zip(report.users.tolist(), report.best.tolist(), strict=True)}

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
    per_user = ranking_metrics(report.hit, report.n_targets, k)["ndcg"]
    assert found[f"ndcg@{k}.new_user"] == pytest.approx(per_user[np.isin(report.users, list(new_users))].mean())


def test_head_and_tail_share_out_the_rows_and_the_finds(everything_data: Dataset) -> None:
    data = everything_data
    # Over the whole catalogue the oracle finds every target of either slice; popularity finds the head first.
    whole = EvaluationConfig(k=(len(data.items),), bootstrap=0)
    found = PartEvaluation.from_factors(oracle(data, TEST), data, TEST, whole).slices()
    assert found["rows.head"] + found["rows.tail"] == len(data.test)
    assert found[f"recall@{len(data.items)}.head"] == found[f"recall@{len(data.items)}.tail"] == 1.0
    popular = popularity_baseline(data.train, len(data.users), len(data.items))
    found = PartEvaluation.from_factors(popular, data, TEST, EvaluationConfig(k=(5,), bootstrap=0)).slices()
    assert found["recall@5.head"] > found["recall@5.tail"]


def test_an_empty_slice_is_left_out(everything_data: Dataset) -> None:
    config = EvaluationConfig(k=(5,), bootstrap=0, new_user_below=1, new_item_below=1)
    found = PartEvaluation.from_factors(random_factors(everything_data), everything_data, TEST, config).slices()
    assert (found["rows.new_user"], found["rows.new_item"]) == (0, 0)
    assert not {"auc.new_user", "auc.new_item", "recall@5.new_user", "recall@5.new_item"} & found.keys()


def test_evaluate_gives_every_promised_number_and_no_nan(everything_data: Dataset) -> None:
    names = metric_names(SLICED.k)
    assert len(names) == 13
    spread = [n for n in names if n not in ("auc", "log_loss") and not n.startswith("coverage")]
    expected = {f"{part}.{n}" for part in ("validation", "test") for n in names}
    expected |= {f"test.{n}.{end}" for n in spread for end in ("low", "high")}
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


def test_a_part_without_positives_has_no_ranking_metrics_and_breaks_nothing(board: Dataset) -> None:
    rows = [(u, i, True) for u in range(3) for i in range(4)] + [(0, 9, True), (1, 9, False), (0, 8, False)]
    parts = np.array([TRAIN] * 12 + [VALIDATION, TEST, TEST], np.int8)
    data = replace(board, pairs=pairs_of(rows), parts=parts)
    found = evaluate_model(lambda part: random_factors(data), data, EvaluationConfig(k=(3,), bootstrap=5))
    assert "validation.recall@3" in found
    assert not [name for name in found if name.startswith("test.") and "@3" in name and "coverage" not in name]
    assert math.isfinite(found["test.log_loss"])
