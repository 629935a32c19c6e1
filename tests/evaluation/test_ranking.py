"""Rankings of the catalogue against a full sort."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import pairs_of, rank_catalogue

from twotower.data.pairs import GroupedPairs, counts
from twotower.evaluation.factors import Factors
from twotower.evaluation.ranking import EvaluationQueries, top_items

quick = settings(deadline=None, max_examples=40)


@st.composite
def catalogues(
    draw: st.DrawFn,
) -> tuple[npt.NDArray[np.float32], list[tuple[int, int, bool]], list[Any], int]:
    """Distinct scores (users, items), wanted pairs, up to three sets of seen pairs, and k."""
    n_users, n_items = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    order = draw(st.permutations(range(n_users * n_items)))
    pair = st.tuples(st.integers(0, n_users - 1), st.integers(0, n_items - 1), st.booleans())
    wanted = draw(st.lists(pair, max_size=15))
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
        grouped = [GroupedPairs.of(pairs_of(p), len(scores)) for p in (wanted, *seen)]
        positives = counts(pairs_of(wanted).user, len(scores), pairs_of(wanted).positive)
        queries = EvaluationQueries.build(grouped[0], grouped[1:], positives, n_items, block=block)
        assert queries.n_targets.tolist() == [sum(u == user for u, _ in want) for user in users]
        for repeats in ("allow", "only"):
            of_all = {(u, i) for u, i, positive in wanted if positive}
            ranked = {
                (u, i) for u in range(len(scores)) for i in range(n_items) if repeats == "allow" or (u, i) in gone
            }
            asked = EvaluationQueries.build(
                grouped[0],
                grouped[1:],
                positives,
                n_items,
                block=block,
                repeats=repeats,
            )
            assert asked.users.tolist() == sorted({u for u, _ in of_all & ranked})
            assert asked.n_targets.tolist() == [
                sum((u, i) in of_all & ranked for i in range(n_items)) for u in asked.users
            ]
            top = asked.top_k(Factors(*vectors), k)
            assert asked.target_weights(top).total.tolist() == [
                sum(positive and u == user and (u, i) in ranked for u, i, positive in wanted) for user in asked.users
            ]
            for u, row, mask in zip(asked.users.tolist(), top.tolist(), asked.hits(top).tolist(), strict=True):
                expected = sorted((i for i in range(n_items) if (u, i) in ranked), key=lambda i: -scores[u, i])[:k]
                assert row == expected + [-1] * (len(row) - len(expected))
                assert mask == [(u, i) in of_all for i in row]
        first = np.arange(n_items) == 0
        assert queries.count_targets(first).tolist() == [(user, 0) in want for user in users]


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


def test_equal_scores_are_ordered_by_item_row_and_still_none_that_was_seen() -> None:
    seen = pairs_of([(0, 2, False), (0, 5, True), (1, 0, True)])
    wanted = pairs_of([(0, 1, True), (1, 5, True)])
    _, best, hit = rank_catalogue(torch.ones(2, 1), torch.ones(6, 1), wanted, [seen], k=6)
    assert best.tolist() == [[0, 1, 3, 4, -1, -1], [1, 2, 3, 4, 5, -1]]
    assert hit.sum(1).tolist() == [1, 1]


EQUAL = [-math.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38]


@quick
@given(
    st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from(EQUAL), min_size=n, max_size=n), min_size=1, max_size=70)
    ),
    st.data(),
)
def test_the_best_items_are_those_of_a_stable_sort_whatever_scores_are_equal(
    scores: list[list[float]], data: st.DataObject
) -> None:
    n = len(scores[0])
    k = data.draw(st.integers(1, n))
    excluded = data.draw(st.lists(st.integers(0, len(scores) * n - 1), unique=True))
    expected = []
    for b, row in enumerate(scores):
        may = [i for i in range(n) if row[i] > -math.inf and b * n + i not in excluded]
        best = sorted(may, key=lambda i: (-row[i], i))[:k]
        expected.append(best + [-1] * (k - len(best)))
    found = top_items(torch.tensor(scores), np.array(excluded, np.int64), k)
    assert found.tolist() == expected
