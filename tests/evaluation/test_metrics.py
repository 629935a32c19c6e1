"""Metrics against loops and hand-computed fractions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import naive_auc, ranked_items

from twotower.arrays.pieces import ones
from twotower.arrays.types import Bools, Codes, Doubles, Ints, Numbers
from twotower.evaluation.config import MetricSet
from twotower.evaluation.metrics.auc import auc, auc_by_group, ordered_codes
from twotower.evaluation.metrics.gauc import Gauc
from twotower.evaluation.metrics.log_loss import LogLoss
from twotower.evaluation.metrics.measured import Rankings, ScoredPairs

quick = settings(deadline=None, max_examples=40)


ROWS = st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), max_size=25)


def arrays(rows: list[tuple[int, bool, int]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    return (
        np.array([s for s, _, _ in rows], np.float32),
        np.array([p for _, p, _ in rows], bool),
        np.array([g for _, _, g in rows], np.int32),
    )


def gauc(scores: Numbers, positive: Bools, users: Codes) -> float:
    return Gauc().value(ScoredPairs(scores, positive, users, ones(len(scores))))


def log_loss(logits: Numbers, positive: Bools) -> float:
    return LogLoss().value(ScoredPairs(logits, positive, np.zeros(len(logits), np.int32), ones(len(logits))))


def ranking_metrics(hit: Bools, n_targets: Ints, k: int) -> dict[str, Doubles]:
    """The metrics of single users at a cut-off, by name."""
    rankings = Rankings.alike(np.zeros(hit.shape, np.int64), hit, n_targets, ranked_items(np.zeros(1, np.int64))).at(k)
    return {m.name: m.values(rankings) for m in MetricSet().of_users}


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


@quick
@given(ROWS, st.integers(1, 5))
def test_an_auc_read_in_small_pieces_has_the_same_bits(rows: list[tuple[int, bool, int]], piece: int) -> None:
    scores, positive, group = arrays(rows)
    whole, pieces = auc_by_group(scores, positive, group), auc_by_group(scores, positive, group, piece=piece)
    assert [x.tolist() for x in whole] == [x.tolist() for x in pieces]
    assert auc(scores, positive, piece=piece) == pytest.approx(auc(scores, positive), abs=0, nan_ok=True)
    codes = ordered_codes(scores)
    assert auc(codes, positive) == pytest.approx(auc(scores, positive), abs=0, nan_ok=True)


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


# ---- the set of metrics


def test_only_a_loss_is_better_when_lower() -> None:
    assert {name for name in MetricSet().names([3]) if not MetricSet().find(name).higher_is_better} == {"log_loss"}
    assert not MetricSet().find("validation.log_loss").higher_is_better
    assert MetricSet().find("test.ndcg@10").name == "ndcg"
    assert [name for name in MetricSet().names([3]) if not MetricSet().find(name).at_cut_offs] == [
        "auc",
        "gauc",
        "log_loss",
    ]
    with pytest.raises(KeyError):
        MetricSet().find("validation.recal@10")
