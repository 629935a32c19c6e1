"""Scorer `slit`: the ridge regression of the next item on the decayed history, as a product of two tables."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.types import F32, F64, Doubles, Ints, Shaped
from twotower.errors import TrainingError
from twotower.features.field import PoolingSpec
from twotower.model.pooling.decay import reach
from twotower.model.pooling.pooling import Pooling
from twotower.scorers.ease import leading, scaled_values
from twotower.scorers.positives import PositiveMatrix, PositiveSequences
from twotower.scorers.start import PairValues, Positive, Start

SPARSE = 0.1
"""Share of pairs of items that follow one another from which a dense matrix of them is multiplied faster."""


class Slit(Start):
    """SLIT: the matrix W (N, N) that minimises

        sum over positives of w c^2 |y - x W|^2  +  lambda |W|^2

    with y the positive as a row of one 1, x the mean of the user's positives before it by the weights of the pooling, c
    the sum of these weights, and w the positive's weight (Choi et al. 2021, "Session-aware Linear Item-Item Models for
    Session-based Recommendation", SLIT, of the one next item). With V the E leading eigenvectors of the regression's
    W^T C, C the products of histories and next items (reduced-rank ridge regression: Mukherjee and Zhu 2011), a
    history's vector is the mean of its rows of W V, an item's vector its row of V, and with E = N the score is that of
    W.

    Use it where histories have an order, together with pairs that are trained. Scores are scaled so that those of all
    items after a history have the root mean square 1. Items of the unknown code are left out of histories. Memory is
    N^2 and some 80 bytes a positive, time N^3 / 3 for each value and, once, positives times the gaps that the decay
    rate reaches (75 at .8, 823 at .98).
    """

    kind = "slit"
    pools = PoolingSpec(kind="decay", rates=[0.8])
    needs_time = True
    choices = ("regularization",)

    regularization: tuple[Positive, ...] = Field(
        (40.0, 400.0),
        min_length=1,
        description="Regularisation lambda. Several values: the best on validation is kept.",
    )
    max_items: int = Field(
        10_000,
        ge=0,
        description="Maximum number of items N; 10,000 items take 2.8 GB.",
    )

    def is_solved(self, items: int, common: int) -> bool:
        return items <= self.max_items

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        n, histories, rate = positives.n_columns, positives.histories, pooling.decay_rate
        assert histories is not None
        assert rate is not None
        if n - 1 > self.max_items:
            raise TrainingError(
                f"the scorer 'slit' is solved for max_items = {self.max_items:,} items, and the log has {n - 1:,}; "
                "raise max_items, or leave it out of scorers"
            )
        gram, ahead, total = positives.once("products", lambda: decayed_products(histories, n, rate))
        if not total:
            raise TrainingError(
                "the scorer 'slit' finds no positive that follows another of its user; leave it out of scorers, or "
                "give more data"
            )
        regular = gram.clone()
        regular.diagonal().add_(self.regularization[0])
        factor = torch.linalg.cholesky(regular).float()
        del regular
        if int(ahead.count_nonzero()) < SPARSE * n * n:
            ahead = ahead.to_sparse()

        def weights(vectors: F32[Tensor, "n k"]) -> F32[Tensor, "n k"]:
            """Return W times some vectors, without W itself."""
            return torch.cholesky_solve(ahead @ vectors, factor)

        target = leading(lambda q: ahead.T @ weights(q), n, width, torch.Generator().manual_seed(seed))
        source = weights(target)
        squares = ((gram @ source.double()) * source).sum().float()
        return scaled_values(source, target, squares / (total * positives.n_items), width)


def decayed_products(
    histories: PositiveSequences, n: int, rate: float
) -> tuple[F64[Tensor, "n n"], F32[Tensor, "n n"], float]:
    """Return the products of decayed sums of histories, of such sums and their next items, both over the positives
    after a user's first, and the sum of the latter's weights w c^2.

    Two positives of one user and gap g are in every later sum with rate^g of the square of the nearer one's weight, so
    one pass over the gaps adds all up.
    """
    codes, lengths = histories.codes.astype(np.int64), histories.lengths
    user = np.repeat(np.arange(len(lengths)), lengths)
    age = np.arange(len(codes)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    weight = histories.weights.astype(np.float64)
    weight[age == 0] = 0.0  # nothing comes before it
    total_weight = (1 - rate**age) / (1 - rate)
    gram, products = torch.zeros(n * n, dtype=torch.float64), torch.zeros(n * n, dtype=torch.float64)
    squares = _later_squares(user, weight, rate)
    for gap in range((reach([rate]) or 0) + 1):
        later = np.arange(gap, len(codes))[user[gap:] == user[: len(codes) - gap]]
        if not len(later):
            break
        keys = torch.from_numpy(codes[later - gap] * n + codes[later])
        gram.index_add_(0, keys, torch.from_numpy(squares[later] * (rate**gap / (1 if gap else 2))))
        if gap:
            products.index_add_(0, keys, torch.from_numpy((weight * total_weight)[later] * rate ** (gap - 1)))
    gram = gram.view(n, n)
    return gram.add_(gram.T.clone()), products.view(n, n).float(), float(weight @ total_weight**2)


def _later_squares(user: Shaped[Ints, "n"], weight: Shaped[Doubles, "n"], rate: float) -> Shaped[Doubles, "n"]:
    """Return the sum over each user's later positives of their weight times the square of a positive's decay weight
    there."""
    found = np.zeros(len(weight))
    found[:-1] = weight[1:] * (user[1:] == user[:-1])
    # found has the sum of `gap` later positives; that of twice as many is its own and, decayed, that of the last of
    # them
    gap = 1
    while (same := user[gap:] == user[:-gap]).any():
        found[:-gap] += found[gap:] * same * rate ** (2 * gap)
        gap *= 2
    return found
