"""Baselines against counts and alternating means by loops."""

from __future__ import annotations

import pytest
from scored import pairs_of

from twotower.data.dataset import Dataset
from twotower.evaluation.baselines import bias_baseline, popularity_baseline


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
