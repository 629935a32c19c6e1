"""The most popular items are ranked by their positives and then by row, among the allowed and without the excluded."""

from __future__ import annotations

import numpy as np
import pytest

from twotower.retrieval.popularity import Popularity


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
