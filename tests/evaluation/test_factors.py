"""Scores of pairs by vectors."""

from __future__ import annotations

import numpy as np
from scored import random_factors

from twotower.data.dataset import Dataset


def test_pairs_are_scored_alike_however_many_at_a_time(everything_data: Dataset) -> None:
    pairs, factors = everything_data.train, random_factors(everything_data)
    expected = (factors.users[pairs.user] * factors.items[pairs.item]).sum(1).numpy()
    for block in (1, 7, len(pairs)):
        assert np.array_equal(factors.scores(pairs, block), expected)
