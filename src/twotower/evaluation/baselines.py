"""Baselines that a model must beat: popularity, and biases of users and items."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from twotower.arrays.pieces import mean_of, pieces
from twotower.arrays.types import Codes, Doubles, Shaped
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.evaluation.factors import Factors

SUM_ROWS = 2**22
"""Interactions whose labels are summed before the sum joins that of all; it determines the last digits."""


def popularity_baseline(train: Pairs, n_users: int, n_items: int) -> Factors:
    """Return the popularity baseline: score = sum of the weights of the training positives of the item."""
    positives = train.sums("item", n_items, train.positive)
    return Factors(torch.ones(n_users, 1), torch.from_numpy(positives.astype(np.float32))[:, None])


def bias_baseline(train: Pairs, n_users: int, n_items: int, strength: float = 10.0, rounds: int = 10) -> Factors:
    """Return the bias baseline: score = mean + user bias + item bias, ridge-regularised least squares on the labels,
    weighted, by `rounds` of alternation (Koren 2010, "Factor in the Neighbors", section
    2.1)."""
    weight, n = train.weight, len(train)
    of_positives = mean_of(n, lambda part: weight[part].astype(np.float64) * train.positive[part])
    mean = of_positives / mean_of(n, lambda part: weight[part].astype(np.float64))

    def labels_without(
        bias: Shaped[Doubles, "_"], of: Shaped[Codes, "r"], by: Shaped[Codes, "r"], n: int
    ) -> Shaped[Doubles, "_"]:
        """Return the sum by row `by` of the labels minus the mean and the bias of row `of`."""
        total = np.zeros(n)
        for start in range(0, len(train), SUM_ROWS):
            some = np.zeros(n)
            for part in pieces(min(SUM_ROWS, len(train) - start)):
                rows = slice(start + part.start, start + part.stop)
                left = train.positive[rows].astype(np.float64)
                left -= mean
                left -= bias[of[rows]]
                left *= weight[rows]
                np.add.at(some, by[rows], left)
            total += some
        return total

    bu, bi = np.zeros(n_users), np.zeros(n_items)
    nu, ni = train.sums("user", n_users), train.sums("item", n_items)
    for _ in range(rounds):
        bi = labels_without(bu, train.user, train.item, n_items) / (ni + strength)
        bu = labels_without(bi, train.item, train.user, n_users) / (nu + strength)
    one_u, one_i = np.ones(n_users), np.ones(n_items)
    return Factors(
        torch.from_numpy(np.stack([bu + mean, one_u], 1)).float(),
        torch.from_numpy(np.stack([one_i, bi], 1)).float(),
    )


BASELINES: Mapping[str, Callable[[Pairs, int, int], Factors]] = {
    "popularity": popularity_baseline, "bias": bias_baseline,
}  # fmt: skip
"""Baselines that score pairs and items, by name, from the training pairs and the numbers of users and items."""


def baseline_of(name: str, dataset: Dataset) -> Factors:
    """Return the vectors of a baseline of BASELINES for a dataset."""
    return BASELINES[name](dataset.train, len(dataset.users), len(dataset.items))
