"""Similar items have vectors of the same direction; popular items are ranked by their positives, then by row."""

from __future__ import annotations

import numpy as np
import pytest

from twotower.arrays.types import ItemRow
from twotower.index import build_index
from twotower.retrieval.catalogue import Neighbours, Popularity
from twotower.retrieval.request import Answer, UnknownId
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run


def ids(answer: Answer) -> list[str]:
    return [i.id for i in answer.items]


def test_similar_items_point_the_same_way(run: Run, retriever: Retriever) -> None:
    vectors = run.factors().items.numpy()[:, :-2]  # without the biases
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = unit @ unit[6]
    expected[6] = -np.inf
    answer = retriever.similar("i6", 4)
    assert ids(answer) == [f"i{i}" for i in np.argsort(-expected)[:4]]
    np.testing.assert_allclose([i.score for i in answer.items], np.sort(expected)[::-1][:4], atol=1e-5)
    assert len(retriever.similar("i6", 100).items) == 39

    with pytest.raises(UnknownId):
        retriever.similar("zz")


def test_equal_cosines_are_ordered_by_row() -> None:
    vectors = np.tile(np.eye(3, dtype=np.float32), (4, 1))
    neighbours = Neighbours(build_index("exact", vectors, np.arange(12), "dot"), bias=False, similarity="dot")
    for k, wanted in ((2, [0, 3]), (3, [0, 3, 9]), (5, [0, 3, 9, 1, 2]), (50, [0, 3, 9, 1, 2, 4, 5, 7, 8, 10, 11])):
        nearest = neighbours.nearest(ItemRow(6), k)
        assert nearest is not None
        assert nearest[0].tolist() == wanted
    zero = Neighbours(
        build_index("exact", np.r_[vectors, np.zeros((1, 3), np.float32)], np.arange(13), "cosine"), False, ""
    )
    assert zero.nearest(ItemRow(12), 3) is None


@pytest.mark.parametrize("k", [1, 7, 60, 500])
@pytest.mark.parametrize("most", [1, 3, 1000], ids=["all equal", "ties", "few ties"])
def test_the_most_popular_as_a_sort_finds_them(k: int, most: int) -> None:
    rng = np.random.default_rng(k)
    positives = rng.integers(0, most, 200)
    for n_excluded in (0, 5, 200):
        for n_allowed in (None, 0, 1, 30, 200):
            excluded = rng.permutation(200)[:n_excluded]
            allowed = None if n_allowed is None else np.sort(rng.permutation(200)[:n_allowed])
            left = sorted(set(range(200) if allowed is None else allowed.tolist()) - set(excluded.tolist()))
            rows, scores = Popularity(positives).top(k, excluded, allowed)
            assert rows.tolist() == sorted(left, key=lambda row: -positives[row])[:k]
            assert scores.tolist() == [0.0] * len(rows)


def test_what_is_popular_now_comes_before_all_that_was() -> None:
    rng = np.random.default_rng(0)
    positives, recent = rng.integers(0, 50, 80), rng.integers(0, 6, 80).astype(np.float32)
    rows, _ = Popularity(positives, recent).top(80, np.zeros(0, np.int64), None)
    assert rows.tolist() == sorted(range(80), key=lambda row: (-recent[row], -positives[row], row))
