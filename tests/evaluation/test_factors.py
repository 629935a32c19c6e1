"""Scores of pairs by vectors."""

from __future__ import annotations

import numpy as np
import pytest
from scored import random_factors

from twotower.data.dataset import Dataset


def test_scores_of_pairs_are_dot_products_in_blocks_of_any_size(everything_data: Dataset) -> None:
    factors, pairs = random_factors(everything_data), everything_data.test
    expected = [float(factors.users[u] @ factors.items[i]) for u, i in zip(pairs.user, pairs.item, strict=True)]
    for block in (1, 7, 10_000):
        assert factors.scores(pairs, block).tolist() == pytest.approx(expected, abs=1e-5)


def test_pairs_are_scored_alike_however_many_at_a_time(everything_data: Dataset) -> None:
    pairs, factors = everything_data.train, random_factors(everything_data)
    expected = (factors.users[pairs.user] * factors.items[pairs.item]).sum(1).numpy()
    for block in (1, 7, len(pairs)):
        assert np.array_equal(factors.scores(pairs, block), expected)
