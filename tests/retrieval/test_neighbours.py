"""Similar items are those whose vectors point the same way."""

from __future__ import annotations

import numpy as np
import pytest

from twotower.arrays.types import ItemRow
from twotower.index import build_index
from twotower.retrieval.neighbours import Neighbours
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
