"""Scorer `ials`: implicit alternating least squares with a regularisation that grows with frequency."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from twotower.arrays.types import F32
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, TrainingError
from twotower.features.schema import Schema
from twotower.kinds import Written
from twotower.model.pooling import resolve
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.ridge import MAX_NUMBERS_PER_PASS, conjugate_gradients
from twotower.model.two_tower import ModelConfig, PairConfig
from twotower.scorers.columns import ContentMatrix, PositivesAndContent, value_columns, with_content
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.start import PairValues, Positive, Start

PRIOR_ITEMS = 10.0
"""Items of a value of a column, and positives of an item, by which half of its vector is believed."""
VANISHED = 1e-6
"""Root mean square of the scores, of which those of positives are near 1, at which a regularisation has removed the
vectors."""
REGRESSION_STEPS = 64
"""Steps of conjugate gradients to the vectors of the values."""


class Ials(Start):
    """Implicit alternating least squares: user vectors u and item vectors v that minimise

        sum over positives of w (1 - u . v)^2  +  a sum over all pairs of (u . v)^2
          +  lambda sum_u (n_u + a N) |u|^2  +  lambda sum_v (n_v + a U) |v|^2

    with w the weight of a positive, n the sum of a row's weights, N items and U users (Rendle et al. 2022, "Revisiting
    the Performance of iALS on Item Recommendation Benchmarks", section 3, exponent 1). The pooling `ridge` then solves
    for u from the history. Each half step continues each row's vector by a few steps of conjugate gradients (Takács et
    al. 2011).

    With `columns` items that training lacks are ranked too: the columns have the vectors whose sum is nearest to v, by
    a ridge regression in which an item of n positives, of the mean weight, weighs n / (n + 10), and the id has what is
    left of v.

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
    columns: bool = Field(
        False, description="Vectors of the items' columns in a scorer, so that items without training are ranked too."
    )
    sweeps: int = Field(8, ge=1, description="Number of alternations over users and items.")
    steps: int = Field(4, ge=1, description="Number of steps of conjugate gradients in a half step.")

    def columns_of(self, schema: Schema) -> tuple[str, ...]:
        own = super().columns_of(schema)
        return own + value_columns(schema) if own and self.columns else own

    def positives(self, dataset: Dataset, pair: PairConfig) -> PositiveMatrix:
        found, (_, *names) = super().positives(dataset, pair), pair.item.fields
        return with_content(found, dataset, tuple(names), self.item_codes(dataset, pair)) if names else found

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
        targets = [vectors]
        if isinstance(positives, PositivesAndContent):
            sums = np.bincount(items.owners, items.values, len(items))
            counts = torch.from_numpy(sums * (len(items.values) / sums.sum())).float()
            of_values = nearest(positives.content, vectors, counts / (counts + PRIOR_ITEMS))
            own = (vectors - positives.content.matrix.product(of_values)).where(counts[:, None] > 0, 0.0)
            targets = [own, *torch.split(of_values, [column.rows for column in positives.content.columns])]
        return PairValues(vectors, tuple(targets), penalty, rate)


class TowerStart(Ials):
    """Vectors of `ials` that a pair of towers is trained on from.

    Use it where few epochs are to be enough for ids.

    Its user tower reads one history of positives, with the pooling `ridge` and a table of its own, and its item tower
    the item's id, both with `layers = []`.
    """

    kind = "ials"

    width: Annotated[int, Written] = 128
    columns: Annotated[bool, Written] = False
    pair: int = Field(0, ge=0, description="Number of the pair of model.pairs that begins so, from 0.")
    scale: float = Field(
        1.0, gt=0, description="Factor of the pair's scores before the first step, relative to others and in a softmax."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.columns or self.width != 128:
            option = "columns" if self.columns else "width"
            raise ValueError(f"{option} is an option of scorers; a tower has its own width and fields")
        return self

    def check(self, dataset: Dataset, model: ModelConfig, pair: int) -> None:
        towers, own = model.pairs[pair], dataset.schema.id_feature("item")
        history = next((f for f in dataset.schema.tower("user") if towers.user.fields == (f.name,)), None)
        spec = history.history if history else None
        are_plain = all(
            one.join == "concat"
            and not (one.layers or one.branches or one.senet.enabled or one.augment or one.field_norm)
            and not one.output_norm
            for one in (towers.user, towers.item)
        )
        if not (
            are_plain
            and own
            and towers.item.fields == (own.name,)
            and history
            and history.pools
            and resolve(history.pools).kind == self.pools.kind
            and spec
            and not (spec.feature or spec.share_embedding)
            and (spec.interactions == "positive" or (spec.interactions == "all" and dataset.train.labels.all()))
        ):
            raise ConfigError(
                f"train.start begins pair {pair}, whose user tower must then be one sequence of positives "
                "(interactions = 'positive', pooling = 'ridge', share_embedding = false), its item tower the item's "
                f"id: set model.pairs.{pair} = {{ user = {{ fields = ['history'], layers = [] }}, item = {{ fields = "
                "['item_id'], layers = [] } } by their names, without other options"
            )
        super().check(dataset, model, pair)

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        found = super().solve(positives, pooling, width, seed)
        return replace(found, targets=tuple(self.scale * rows for rows in found.targets))


def nearest(
    content: ContentMatrix, vectors: F32[Tensor, "codes E"], weights: F32[Tensor, "codes"]
) -> F32[Tensor, "values E"]:
    """Return vectors of the values of columns whose sums are nearest to the vectors of the items, by a ridge regression
    with a weight of each item, whose penalty is that of PRIOR_ITEMS items: x of (A + PRIOR_ITEMS) x = b, by steps of
    conjugate gradients for each of the E numbers."""
    by_value = content.matrix.transposed()

    def to_values(rows: F32[Tensor, "codes E"]) -> F32[Tensor, "values E"]:
        return content.vectors(by_value.product(weights[:, None] * rows))

    found, left = torch.zeros(content.matrix.n_columns, vectors.shape[1]), to_values(vectors)
    step, square = left.clone(), left.square().sum(0)
    for _ in range(REGRESSION_STEPS):
        moved = to_values(content.matrix.product(content.vectors(step))) + PRIOR_ITEMS * step
        size = (square / (step * moved).sum(0)).where(square > 0, 0.0)
        found += size * step
        left = left - size * moved
        square, before = left.square().sum(0), square
        step = left + (square / before).where(before > 0, 0.0) * step
    return content.vectors(found)


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
