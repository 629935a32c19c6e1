"""Start `content`: the columns of the items as their vectors, and users solved from them."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.types import F32
from twotower.errors import TrainingError
from twotower.model.pooling.pooling import Pooling
from twotower.scorers.columns import ColumnStart, PositivesAndContent
from twotower.scorers.ease import leading, wide
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.start import PairValues, Positive


class ContentFactors(ColumnStart):
    """Item vectors v = F W of their columns: F has a 1 for each value of an item, divided by the number of its values
    in the column, and W a direction for each value, or the E leading directions of the values among the positives,
    where these are more than the width E. Numbers in buckets are alike where they are near, by exp(-(i - j)^2 / 4.5)
    for the buckets i and j, and each column gives items vectors of the root mean square length 1. User vectors u
    minimise

        sum over the history of (1 - u . v)^2  +  a sum over all items of (u . v)^2  +  lambda (n + a N) |u|^2

    with n the length of the history and N items: a half step of `ials` with vectors that no step changes (Rendle et al.
    2022, "Revisiting the Performance of iALS on Item Recommendation Benchmarks", section 3). The pooling `ridge` solves
    for u. Weights of rows count in the choice of the leading directions alone. The item tower reads columns in place of
    the id, added up, so that items without any training are ranked too.

    Use it in addition to other pairs, where users keep to categories, cities or brands and have few interactions.
    """

    kind = "content"
    poolings = ("ridge",)
    choices = ("unobserved", "regularization")

    unobserved: tuple[Positive, ...] = Field(
        (0.3,),
        min_length=1,
        description="Weight a of every pair of user and item, added to that of a positive. Several values: the best "
        "on validation is kept.",
    )
    regularization: tuple[Positive, ...] = Field(
        (0.2,),
        min_length=1,
        description="Regularisation lambda of each interaction. Several values: the best on validation is kept.",
    )

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        assert isinstance(positives, PositivesAndContent)
        a, rate, content = self.unobserved[0], self.regularization[0], positives.content
        directions = positives.once("directions", lambda: _directions(positives, width, seed))
        vectors = content.matrix.product(directions)[torch.from_numpy(np.unique(positives.columns).astype(np.int64))]
        squares, axes = torch.linalg.eigh(vectors.double().T @ vectors.double())
        if not squares.max() > 0:
            raise TrainingError(
                f"train.start of kind '{self.kind}' finds no value of a column at the items of the positives; leave "
                "the start and its pair out"
            )
        turned = (directions.double() @ axes).float()  # of the same products, and a diagonal penalty
        penalty = a * (squares.clamp(min=0) + rate * positives.n_items)
        of_values = torch.split(turned, [column.rows for column in content.columns])
        return PairValues(content.matrix.product(turned), of_values, penalty.float().diag(), rate)


def _directions(positives: PositivesAndContent, width: int, seed: int) -> F32[Tensor, "values E"]:
    """Return the rows of W: the vectors of the values, or these on the leading eigenvectors of their products among the
    positives."""
    content, n = positives.content, positives.content.matrix.n_columns
    if n <= width:
        return content.vectors(torch.eye(n, width))
    turned, taken = content.matrix.transposed(), torch.zeros(positives.n_columns)
    taken.index_add_(0, torch.from_numpy(positives.columns.astype(np.int64)), torch.from_numpy(positives.values))
    found, _ = leading(
        lambda q: content.vectors(turned.product(taken[:, None] * content.matrix.product(content.vectors(q)))),
        n,
        width,
        torch.Generator().manual_seed(seed),
    )
    return wide(content.vectors(found), width)
