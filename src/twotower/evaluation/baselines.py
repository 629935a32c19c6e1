"""Baselines that a model must beat: popularity, and biases of users and items."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.data.pairs import COUNT_BLOCK_ROWS, Pairs, counts
from twotower.evaluation.factors import Factors


def popularity_baseline(train: Pairs, n_users: int, n_items: int) -> Factors:
    """Return the popularity baseline: score = number of training positives of the item."""
    positives = np.zeros(n_items, np.int64)
    for start in range(0, len(train), COUNT_BLOCK_ROWS):
        part = slice(start, start + COUNT_BLOCK_ROWS)
        positives += np.bincount(train.item[part][train.positive[part]], minlength=n_items)
    return Factors(torch.ones(n_users, 1), torch.from_numpy(positives.astype(np.float32))[:, None])


def bias_baseline(train: Pairs, n_users: int, n_items: int, strength: float = 10.0, rounds: int = 10) -> Factors:
    """Return the bias baseline: score = mean + user bias + item bias, ridge-regularised least squares on the labels,
    by `rounds` of alternation (Koren 2010, "Factor in the Neighbors", section 2.1)."""
    mean = float(train.positive.mean())

    def pieces() -> Iterator[tuple[Shaped[Ints, "n"], Shaped[Ints, "n"], Shaped[Doubles, "n"]]]:
        for start in range(0, len(train), COUNT_BLOCK_ROWS):
            part = slice(start, start + COUNT_BLOCK_ROWS)
            user, item, label = train.user[part], train.item[part], train.positive[part]
            yield user.astype(np.int64), item.astype(np.int64), label.astype(np.float64) - mean

    kept = list(pieces()) if len(train) <= COUNT_BLOCK_ROWS else None
    bu, bi = np.zeros(n_users), np.zeros(n_items)
    nu, ni = counts(train.user, n_users), counts(train.item, n_items)
    for _ in range(rounds):
        total = np.zeros(n_items)
        for user, item, y in kept or pieces():
            total += np.bincount(item, y - bu[user], minlength=n_items)
        bi = total / (ni + strength)
        total = np.zeros(n_users)
        for user, item, y in kept or pieces():
            total += np.bincount(user, y - bi[item], minlength=n_users)
        bu = total / (nu + strength)
    one_u, one_i = np.ones(n_users), np.ones(n_items)
    return Factors(
        torch.from_numpy(np.stack([bu + mean, one_u], 1)).float(),
        torch.from_numpy(np.stack([one_i, bi], 1)).float(),
    )
