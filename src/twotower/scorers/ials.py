"""Scorer `ials`: implicit alternating least squares with a regularisation that grows with frequency."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.types import F32
from twotower.errors import TrainingError
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.ridge import MAX_NUMBERS_PER_PASS, conjugate_gradients
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.start import PairValues, Positive, Start

VANISHED = 1e-6
"""Root mean square of the scores, of which those of positives are near 1, at which a regularisation has removed the
vectors."""


class Ials(Start):
    """Implicit alternating least squares: user vectors u and item vectors v that minimise

        sum over positives of w (1 - u . v)^2  +  a sum over all pairs of (u . v)^2
          +  lambda sum_u (n_u + a N) |u|^2  +  lambda sum_v (n_v + a U) |v|^2

    with w the weight of a positive, n the sum of a row's weights, N items and U users (Rendle et al. 2022, "Revisiting
    the Performance of iALS on Item Recommendation Benchmarks", section 3, exponent 1). The pooling `ridge` then solves
    for u from the history. Each half step continues each row's vector by a few steps of conjugate gradients (Takács et
    al. 2011).

    Use it for tastes in no order. Memory is that of the vectors and some 60 bytes a positive, the time of a sweep that
    of positives times width and of users and items times its square.
    """

    kind = "ials"
    choices = ("unobserved", "regularization")

    unobserved: tuple[Positive, ...] = Field(
        (0.03, 0.3),
        min_length=1,
        description="Weight a of every pair of user and item, added to that of a positive. Several values: the best "
        "on validation is kept.",
    )
    regularization: tuple[Positive, ...] = Field(
        (0.004, 0.032),
        min_length=1,
        description="Regularisation lambda of each interaction. Several values: the best on validation is kept.",
    )
    sweeps: int = Field(8, ge=1, description="Number of alternations over users and items.")
    steps: int = Field(4, ge=1, description="Number of steps of conjugate gradients in a half step.")

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        a, rate = self.unobserved[0], self.regularization[0]
        users, items = positives, positives.once("transposed", positives.transposed)
        n_users, n_items = items.n_items, users.n_items
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(len(items), width, generator=generator) * (0.1 / width**0.5)
        vectors[torch.from_numpy(items.offsets[1:] == items.offsets[:-1])] = 0.0
        of_users = torch.zeros(len(users), width)
        for _ in range(self.sweeps):
            of_users = half_step(users, vectors, of_users, a, rate, n_items, self.steps)
            vectors = half_step(items, of_users, vectors, a, rate, n_users, self.steps)
        size = _root_mean_square(of_users, vectors, n_users, n_items)
        if size <= VANISHED:
            raise TrainingError(
                f"the scorer '{self.kind}': regularization = {rate:g} and unobserved = {a:g} leave nothing "
                f"of the vectors (scores of {size:.0e}); lower regularization"
            )
        vectors, of_users = _turned(vectors, of_users)
        penalty = _penalty(vectors, a, rate, n_items).diagonal().diag()
        return PairValues(vectors, (vectors,), penalty, rate)


def _turned(items: F32[Tensor, "C E"], users: F32[Tensor, "R E"]) -> tuple[F32[Tensor, "C E"], F32[Tensor, "R E"]]:
    """Return vectors of the same products, turned so that the items' squares have a diagonal matrix, which the pooling
    `ridge` is fast and exact with."""
    axes = torch.linalg.eigh(items.double().T @ items.double()).eigenvectors
    return (items.double() @ axes).float(), (users.double() @ axes).float()


def _root_mean_square(users: F32[Tensor, "U E"], items: F32[Tensor, "codes E"], n_users: int, n_items: int) -> float:
    """Return the root mean square of the scores of n_users and n_items, whose vectors alone are not 0."""
    square = ((users.T @ users).double() * (items.T @ items).double()).sum().clamp(min=0)
    return math.sqrt(float(square) / (n_users * n_items))


def half_step(
    rows: PositiveMatrix, other: F32[Tensor, "C E"], start: F32[Tensor, "R E"], a: float, rate: float,
    n_other: int, steps: int,
) -> F32[Tensor, "R E"]:  # fmt: skip
    """Return the vectors of `rows` that minimise the loss given the vectors of the `other` side's n_other rows with
    positives, after `steps` steps from `start`. A row without positives keeps its vector."""
    penalty, found = _penalty(other, a, rate, n_other), start.clone()
    for numbers, columns, weights in rows.passes(MAX_NUMBERS_PER_PASS // other.shape[1]):
        x = torch.nn.functional.embedding(columns, other)
        right = torch.bmm(weights[:, None], x)[:, 0]
        found[numbers] = conjugate_gradients(x, penalty, rate * weights.sum(1), right, steps, start[numbers], weights)
    return found


def _penalty(vectors: F32[Tensor, "C E"], a: float, rate: float, n: int) -> F32[Tensor, "E E"]:
    """Return what every row of the other side adds to its normal equations."""
    return a * (vectors.T @ vectors + rate * n * torch.eye(vectors.shape[1]))
