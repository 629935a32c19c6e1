"""Start `user_content`: what users of some columns take, by the columns of the items."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.types import F32, F64, Codes, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, TrainingError
from twotower.model.pooling.pooling import Pooling
from twotower.model.two_tower import ModelConfig
from twotower.scorers.columns import ColumnStart, ColumnVectors, ContentMatrix, PositivesAndContent
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.start import PairValues, Positive

MAX_CELLS = 2**26
"""Pairs of a value of the users and one of the items that are counted at most: 256 MiB, and some three times that for
one pair of columns."""
MAX_SIDE = 4096
"""Values of the column of fewer values, of a pair of columns, at most: a minute of a processor core."""
BLOCK = 2**24
"""Cells of the users' values that are held at a time."""


@dataclass(frozen=True)
class PositivesOfColumns(PositivesAndContent):
    """Positives of the users, with the content of the items and the columns of the users, which have a row 0 of the
    unknown user."""

    users: ContentMatrix = field(kw_only=True)


class UserContent(ColumnStart):
    """Logarithms of how much more often users of one value take items of another. For a column of the users with the
    value v, and a column of the items with the value w, the score is

        log((n_vw + r) / (n_v n_w / n + r))

    with n_vw the positives of users of v and items of w, n_v and n_w those of either, n all, and r `regularization`:
    the mean of a gamma distribution of n_vw over its expectation, 1 before anything is seen (DuMouchel 1999, "Bayesian
    Data Mining in Large Frequency Tables", of one component in place of two). A user's vector is the sum of its
    columns', an item's that of its own. Each pair of columns has as many dimensions as the one of fewer values; where
    these are too many, the directions that tell most, of all pairs together, have the width. Counts of numbers in near
    buckets are added up, by exp(-(i - j)^2 / 4.5) for the buckets i and j. A value of a list counts as its pooling
    weighs it. A missing or unknown value says nothing.

    Use it where users have columns such as age or city, in addition to other pairs: it ranks for users without a
    history, and new items too. The item tower may read the id as one of its columns. Before it is weighed each pair of
    columns gets the factor under which what users of validation take anew is most likely, as in `next_content`. Columns
    that are computed from the rows, such as a favourite, give the answers away. The time is the number of positives
    times the number of the users' values, and for each pair of columns the square of the fewer values times the others.
    """

    kind = "user_content"
    adds_users = True
    reads_ids = True
    weighs_parts = True
    choices = ("regularization",)

    regularization: tuple[Positive, ...] = Field(
        (5.0,),
        min_length=1,
        description="Addition r to each count and its expectation, in positives. Several values: the best on "
        "validation is kept.",
    )

    def check_users(self, dataset: Dataset, model: ModelConfig, is_weighted: bool) -> None:
        if dataset.users.versions is not None:
            raise ConfigError(
                f"train.start of kind '{self.kind}' counts what users of a value take, and schema.valid_from gives "
                "users several; leave out the start and its pair, or schema.valid_from"
            )
        self._check_columns("user", dataset, model)

    def item_codes(self, dataset: Dataset, model: ModelConfig) -> Shaped[Codes, "items"]:
        return np.arange(1, len(dataset.items) + 1, dtype=np.int32)

    def n_codes(self, dataset: Dataset, model: ModelConfig) -> int:
        return len(dataset.items) + 1

    def positives(self, dataset: Dataset, model: ModelConfig) -> PositivesOfColumns:
        found, n = self._with_content(dataset, model), len(dataset.users)
        fields = self._column_fields("user", dataset, model)
        users = ContentMatrix.of("user", fields, dataset, np.arange(1, n + 1, dtype=np.int32), n + 1)
        parts = found.columns, found.offsets, found.values, found.n_columns, found.histories
        return PositivesOfColumns(*parts, content=found.content, users=users)

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        assert isinstance(positives, PositivesOfColumns)
        of_users, of_items = positives.users.columns, positives.content.columns
        values, others = positives.users.matrix.n_columns, positives.content.matrix.n_columns
        smaller = min(max(one.rows for one in of_users), max(one.rows for one in of_items))
        if values * others > MAX_CELLS or smaller > MAX_SIDE:
            raise TrainingError(
                f"train.start of kind '{self.kind}' counts at most {MAX_CELLS:,} pairs of values, and {MAX_SIDE:,} "
                f"values of one column; the columns have {values:,} of users and {others:,} of items; leave the "
                "largest out"
            )
        counts = positives.once("counts", lambda: _counts(positives))
        sources = tuple(torch.zeros(one.rows, width) for one in of_users)
        targets = tuple(torch.zeros(one.rows, width) for one in of_items)
        of_user = torch.split(counts, [column.rows for column in of_users])
        blocks = [torch.split(rows, [column.rows for column in of_items], 1) for rows in of_user]
        found = [
            leading(_smoothed(block.double(), users, items), self.regularization[0], width)
            for row, users in zip(blocks, of_users, strict=True)
            for block, items in zip(row, of_items, strict=True)
        ]
        strengths = torch.cat([pair.strengths for pair in found])
        least = strengths.sort(descending=True).values[:width].min() if len(strengths) else 0.0
        at = 0
        for number, pair in enumerate(found):
            one, other = divmod(number, len(of_items))
            n = min(int(((pair.strengths >= least) & (pair.strengths > 0)).sum()), width - at)
            sources[one][:, at : at + n], targets[other][:, at : at + n] = pair.users[:, :n], pair.items[:, :n]
            at += n
        if not any(bool(rows.any()) for rows in sources):
            raise TrainingError(
                f"train.start of kind '{self.kind}' finds no column of the users that the positives tell apart; leave "
                "the start and its pair out"
            )
        return PairValues(sources[0], targets, further=sources[1:])


def fewer_columns(users: Mapping[str, int], items: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Return the names of the columns of users and of items that are few enough to be counted, given the numbers of
    values of all: without the largest of the users, and, of one of these, without the largest of the items; empty lists
    if no two are small enough."""
    of_users, of_items = (sorted(values, key=lambda name: values[name]) for values in (users, items))
    while of_users and of_items:
        cells = (sum(users[name] for name in of_users), sum(items[name] for name in of_items))
        if math.prod(cells) <= MAX_CELLS and min(users[of_users[-1]], items[of_items[-1]]) <= MAX_SIDE:
            return of_users, of_items
        (of_users if len(of_users) > 1 else of_items).pop()
    return [], []


def _counts(positives: PositivesOfColumns) -> F32[Tensor, "V W"]:
    """Return the positives, by their weights, of each value of the users and of the items."""
    by_item, of_items = positives.transposed(), positives.content.matrix.transposed()
    by_value, n = positives.users.matrix.transposed(), len(positives)
    size, found = max(1, BLOCK // max(1, n, len(by_item))), list[Tensor]()
    for first in range(0, len(by_value), size):
        some = range(first, min(first + size, len(by_value)))
        dense = torch.zeros(n + 1, len(some))
        for place, value in enumerate(some):
            cells = slice(by_value.offsets[value], by_value.offsets[value + 1])
            rows = torch.from_numpy(by_value.columns[cells].astype(np.int64))
            dense[:, place].index_add_(0, rows, torch.from_numpy(by_value.values[cells]))  # a list may repeat a value
        found.append(of_items.product(by_item.product(dense[1:])).T)
    return torch.cat(found)


def _smoothed(counts: F64[Tensor, "v w"], users: ColumnVectors, items: ColumnVectors) -> F64[Tensor, "v w"]:
    """Return counts, to which those of near buckets are added."""
    if users.likeness is not None:
        counts = users.likeness.double() @ counts
    return counts if items.likeness is None else counts @ items.likeness.double()


class ColumnPair(NamedTuple):
    """Vectors of two columns, the directions that tell most first."""

    users: F32[Tensor, "v F"]
    items: F32[Tensor, "w F"]
    strengths: F64[Tensor, "F"]
    """Mean squares of the products of each direction, over all positives if the columns were independent."""


def leading(counts: F64[Tensor, "v w"], regularization: float, width: int) -> ColumnPair:
    """Return vectors of both columns whose products are the logarithms of the counts over their expectations, or the
    nearest to them of this width, by the squares over all positives if the columns were independent."""
    total, (v, w) = counts.sum(), counts.shape
    if not total > 0:
        return ColumnPair(torch.zeros(v, 0), torch.zeros(w, 0), torch.zeros(0, dtype=torch.float64))
    rows, columns = counts.sum(1) / total, counts.sum(0) / total
    weighted = counts.add_(regularization).div_(torch.outer(rows * total, columns).add_(regularization)).log_()
    roots, others = rows.sqrt(), columns.sqrt()
    weighted *= roots[:, None] * others
    flipped = w < v
    side = weighted.T if flipped else weighted
    squares, axes = torch.linalg.eigh(side @ side.T)
    squares, axes = squares.flip(0)[:width].clamp(min=0), axes.flip(1)[:, :width]
    pair = axes, side.T @ axes
    left, right = pair[::-1] if flipped else pair
    left = torch.where(roots[:, None] > 0, left / roots[:, None], 0.0)
    right = torch.where(others[:, None] > 0, right / others[:, None], 0.0)
    return ColumnPair(left.float(), right.float(), squares)
