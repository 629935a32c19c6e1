"""Scorer `columns`: linear discriminants of the next item's columns, and the columns of items as vectors."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.ragged import Column, Ragged, offsets_of
from twotower.arrays.types import F32, F64, Codes, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.features.field import MEAN, PoolingSpec
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.values import UNKNOWN
from twotower.model.pooling import resolve
from twotower.model.pooling.decay import Rate
from twotower.model.pooling.pooling import Pooling
from twotower.model.towers import select_fields
from twotower.model.two_tower import PairConfig
from twotower.scorers.positives import PositiveMatrix, PositiveSequences
from twotower.scorers.start import PairValues, Positive, Start, history_of_positives

USERS = 8192
"""Users whose histories are read at a time."""
MAX_LENGTH = 2048
"""Positives of a user that are read, the latest."""
LEAST, LEAST_SHARE = 1e-9, 1e-6
"""Variance, and its share of the mean square, up to which a column is constant but for rounding. Values have vectors of
about the length 1."""


@dataclass(frozen=True)
class ContentMatrix:
    """Values of columns: a row for each code of items, and a column for each value of each field, one
    field after the other."""

    matrix: PositiveMatrix
    sizes: tuple[int, ...]
    """Number of values of each column, the unknown one too."""
    scales: F32[Tensor, "values 1"]
    """Lengths of the vectors of the values, by which items have the root mean square length 1 in each column."""

    @classmethod
    def of(cls, dataset: Dataset, names: tuple[str, ...], codes: Shaped[Codes, "items"], n_codes: int) -> ContentMatrix:
        """Return the values of features of the items, a row for each of `n_codes` codes, given that of each item."""
        fields = select_fields(tuple(dataset.encoders.fields("item")), names)
        first = np.cumsum([0, *(one.rows for one in fields)])
        cells = [_cells(dataset.items.columns[one.name], one.pooling) for one in fields]
        row = np.concatenate([codes[rows] for rows, _, _ in cells])
        value = np.concatenate([found + start for (_, found, _), start in zip(cells, first, strict=False)])
        share = np.concatenate([share for _, _, share in cells])
        known = row != UNKNOWN
        found = Ragged.from_pairs(row[known], value[known], n_codes, np.arange(np.count_nonzero(known)))
        assert found.source is not None
        matrix = PositiveMatrix(found.values, found.offsets, share[known][found.source], int(first[-1]))
        sizes = tuple(one.rows for one in fields)
        scales = [torch.full((n, 1), _scale(n, *of)) for n, of in zip(sizes, cells, strict=True)]
        return cls(matrix, sizes, torch.cat(scales))


@dataclass(frozen=True)
class PositivesAndContent(PositiveMatrix):
    """Positives of the users, with the content of the items."""

    content: ContentMatrix = field(kw_only=True)


class ColumnFactors(Start):
    """Linear discriminants of the next item's columns. For each column c and each rate r of the pooling the score is

        (s - m)^T A^-1 B C^-1 (f - m)

    with f the item's vector of that column, s its decayed mean over the history, m the mean of f, A and C the
    covariances of s and of the next item's f over the positives after a user's first, each plus `regularization` times
    its mean variance, and B that of both (Hastie, Tibshirani and Friedman 2009, "The Elements of Statistical Learning",
    section 4.3: the logarithm of how much more likely a next item with f is after s, if both are normal). So phones are
    followed by their cases. Columns have one size. A column has a dimension of the history's width for each value.
    Where these are too many, small columns have theirs, and large ones share what is left for their most frequent
    values. The history's vector is s - m at each rate. The item's vector has the rest, in as many times the history's
    width as there are rates. A missing value counts as the mean.

    Use it where the items have columns. Histories are pooled by `decay` where the log has times, else by `mean`, the
    rate 1. A row's weight is that of the positive that follows. Of a user the latest 2,048 positives are read, without
    items of the unknown code. The time is the number of positives times the number of rates and E^2.
    """

    kind = "columns"
    pools = MEAN
    reads_columns = True
    choices = ("regularization",)

    regularization: tuple[Positive, ...] = Field(
        (0.1,),
        min_length=1,
        description="Addition to each variance, in mean variances. Several values: the best on validation is kept.",
    )

    rates: tuple[Rate, ...] = Field(
        (0.0, 1.0), min_length=1, description="Rates of decay of a scorer's history, where the log has times."
    )

    def columns_of(self, schema: Schema) -> tuple[str, ...]:
        """Return the names of the features of the items whose values have a code each: no id, text, history or
        statistic."""
        return tuple(
            f.name
            for f in schema.columns("item")
            if f.source != schema.id_column("item")
            and not (f.computes or f.searchable)
            and (f.has_code or (f.pools is not None and resolve(f.pools).length_exponent is not None))
        )

    def histories(self, schema: Schema, name: str) -> list[Sequence]:
        decay = PoolingSpec(kind="decay", rates=[*self.rates])
        return [history_of_positives(name, decay if schema.time else self.pools)]

    def positives(self, dataset: Dataset, pair: PairConfig) -> PositiveMatrix:
        found = super().positives(dataset, pair)
        content = ContentMatrix.of(dataset, pair.item.fields, *self.item_codes(dataset, pair))
        return PositivesAndContent(
            found.columns, found.offsets, found.values, found.n_columns, found.histories, content=content
        )

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        assert isinstance(positives, PositivesAndContent)
        assert positives.histories is not None
        histories, content, rates = positives.histories, positives.content, pooling.decay_rates
        directions = positives.once("directions", lambda: _Directions.of(positives, width))
        if not directions.rows.any():
            raise self._finds_no("column of several values at the items of the positives")
        source = content.matrix.product(directions.rows)
        found = positives.once("moments", lambda: [_Moments.of(histories, source, rate) for rate in rates])
        if not found[0].total > 0:
            raise self._finds_no("positive that follows another of its user")
        maps = torch.zeros(len(rates), width, width)
        for start, stop in pairwise(directions.places):
            for number, moments in enumerate(found):
                part = slice(start, stop)
                maps[number, part, part] = moments.discriminant(part, self.regularization[0])
        if not maps.any():
            raise self._finds_no("column that differs among the positives that follow others")
        of_items = torch.cat([directions.rows @ one.T for one in maps], 1)
        return PairValues(source, torch.split(of_items, [*content.sizes]))

    def _finds_no(self, what: str) -> TrainingError:
        return TrainingError(f"the scorer '{self.kind}' finds no {what}; leave it out of scorers")


@dataclass(frozen=True)
class _Moments:
    """Covariances of decayed histories s and the items f that follow them, weighted, and the sum of the weights."""

    of_history: F64[Tensor, "E E"]
    of_both: F64[Tensor, "E E"]
    of_next: F64[Tensor, "E E"]
    squares: F64[Tensor, "2 E"]
    """Mean squares of histories and next items."""
    total: float

    @classmethod
    def of(cls, histories: PositiveSequences, vectors: F32[Tensor, "codes E"], rate: float) -> _Moments:
        """Return the moments by the vectors of the items and a rate of decay."""
        width, total = vectors.shape[1], 0.0
        sums = torch.zeros(2, width, dtype=torch.float64)
        products = torch.zeros(3, width, width, dtype=torch.float64)
        ends = offsets_of(histories.lengths)[1:]
        users = np.argsort(-histories.lengths, kind="stable")
        for first in range(0, len(users), USERS):
            some = users[first : first + USERS]
            lengths = np.minimum(histories.lengths[some], MAX_LENGTH)
            starts = ends[some] - lengths
            state, weight = torch.zeros(len(some), width, dtype=torch.float64), 0.0
            for place in range(int(lengths[0])):
                rows = starts[: np.searchsorted(-lengths, -place)] + place  # those of longer histories come first
                following = vectors[torch.from_numpy(histories.codes[rows].astype(np.int64))].double()
                state = state[: len(rows)]
                if place:
                    each = torch.from_numpy(histories.weights[rows]).double()
                    mean, weighted = state / weight, following * each[:, None]
                    sums += torch.stack([each @ mean, weighted.sum(0)])
                    products += torch.stack(
                        [(mean * each[:, None]).T @ mean, mean.T @ weighted, following.T @ weighted]
                    )
                    total += float(each.sum())
                state, weight = rate * state + following, rate * weight + 1
        before, after = sums / (total or 1.0)
        of_history, of_both, of_next = products / (total or 1.0)
        return cls(
            of_history - torch.outer(before, before),
            of_both - torch.outer(before, after),
            of_next - torch.outer(after, after),
            torch.stack([of_history.diagonal(), of_next.diagonal()]),
            total,
        )

    def discriminant(self, part: slice, regularization: float) -> F32[Tensor, "k k"]:
        """Return A^-1 B C^-1 of some dimensions; zeros where histories or items do not differ in them."""
        a, b, c = (every[part, part] for every in (self.of_history, self.of_both, self.of_next))
        least = (LEAST_SHARE * self.squares[:, part].sum(1)).clamp(min=LEAST)
        if not (a.trace() > least[0] and c.trace() > least[1]):
            return torch.zeros_like(b).float()
        a, c = (m + regularization * m.trace() / len(m) * torch.eye(len(m)) for m in (a, c))
        found: Tensor = torch.linalg.solve(a, torch.linalg.solve(c, b.T).T)
        return found.float()


class _Directions(NamedTuple):
    """Vectors of the values of all columns."""

    rows: F32[Tensor, "values E"]
    """A row for each value. The mean over the positives that have a column is 0."""
    places: Listed[int]
    """Dimensions at which columns begin, and the last one ends."""

    @classmethod
    def of(cls, positives: PositivesAndContent, width: int) -> _Directions:
        """Return a direction for each value, of large columns for the most frequent ones."""
        content, taken = positives.content, torch.zeros(positives.n_columns)
        taken.index_add_(0, torch.from_numpy(positives.columns.astype(np.int64)), torch.from_numpy(positives.values))
        counts = content.matrix.transposed().product(taken[:, None])
        rooms = shared_out([size - 1 for size in content.sizes], width)
        rows, places = torch.zeros(len(counts), width), [0, *accumulate(rooms)]
        firsts = accumulate(content.sizes, initial=0)
        for size, room, at, first in zip(content.sizes, rooms, places, firsts, strict=False):
            count = counts[first : first + size]
            frequent = count[1:, 0].argsort(descending=True, stable=True)[:room].sort().values + 1
            of_column = content.scales[first : first + size] * torch.eye(size)[:, frequent]
            mean = (of_column * count).sum(0) / (count.sum() if count.any() else 1.0)
            rows[first : first + size, at : at + room] = of_column - mean
            rows[first + UNKNOWN] = 0.0
        return cls(rows, places)


def shared_out(sizes: Listed[int], width: int) -> list[int]:
    """Return how many of `width` dimensions columns of some sizes have: as many as they want, or, where that is too
    many, the smallest ones first, none more than an equal share of what is left."""
    rooms, left = [0] * len(sizes), width
    for done, place in enumerate(sorted(range(len(sizes)), key=lambda place: sizes[place])):
        rooms[place] = min(sizes[place], left // (len(sizes) - done))
        left -= rooms[place]
    return rooms


def _cells(column: Column, pooling: PoolingSpec) -> tuple[Shaped[Ints, "L"], Shaped[Ints, "L"], Shaped[Floats, "L"]]:
    """Return the rows and codes of the known values of an encoded column, and the weight that each has in its row's
    pooling."""
    if isinstance(column, Ragged):
        known = column.values != UNKNOWN
        owners = column.owners[known]
        exponent = resolve(pooling).length_exponent
        assert exponent is not None
        share = column.lengths[owners] ** -exponent
        return owners, column.values[known].astype(np.int64), share.astype(np.float32)
    rows = np.flatnonzero(column != UNKNOWN)
    return rows, column[rows].astype(np.int64), np.ones(len(rows), np.float32)


def _scale(rows: int, items: Shaped[Ints, "L"], codes: Shaped[Ints, "L"], shares: Shaped[Floats, "L"]) -> float:
    """Return the length of the vectors of a column of so many values, from its cells."""
    _, cell = np.unique(items * rows + codes, return_inverse=True)  # a list may repeat a value
    mean = float((np.bincount(cell, shares) ** 2).sum()) / max(1, len(np.unique(items)))
    return mean**-0.5 if mean else 1.0
