"""Scorer `columns`: linear discriminants of the next item's columns, and the columns of items as vectors."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

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

BUCKETS_ALIKE = 1.5
"""Distance in buckets at which two numbers have e^(-1/2) of their likeness."""
MAX_BUCKETS = 1024
"""Buckets up to which those that are near are alike."""


USERS = 8192
"""Users whose histories are read at a time."""
MAX_LENGTH = 2048
"""Positives of a user that are read, the latest."""
LEAST, LEAST_SHARE = 1e-9, 1e-6
"""Variance, and its share of the mean square, up to which a column is constant but for rounding. Values have vectors of
about the length 1."""


@dataclass(frozen=True)
class ColumnVectors:
    """Vectors of the values of a column, before they are projected: a direction each, or, of numbers in buckets,
    vectors that are the more alike the nearer the buckets are. Items have the root mean square length 1."""

    rows: int
    """Number of values, the unknown one too."""
    likeness: F32[Tensor, "rows rows"] | None
    scale: float

    def of(self, directions: F32[Tensor, "rows E"]) -> F32[Tensor, "rows E"]:
        """Return the vectors, each direction projected to E numbers."""
        return self.scale * (directions if self.likeness is None else self.likeness @ directions)


@dataclass(frozen=True)
class ContentMatrix:
    """Values of columns: a row for each code of items, and a column for each value of each field, one
    field after the other."""

    matrix: PositiveMatrix
    columns: tuple[ColumnVectors, ...]

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
        encoders = dataset.encoders.by_side["item"]
        vectors = (
            _column_vectors(one.rows, encoders[one.name].is_ordered, *of) for one, of in zip(fields, cells, strict=True)
        )
        return cls(matrix, tuple(vectors))

    def vectors(self, directions: F32[Tensor, "values E"]) -> F32[Tensor, "values E"]:
        """Return the vectors of all values."""
        parts = torch.split(directions, [column.rows for column in self.columns])
        return torch.cat([column.of(part) for column, part in zip(self.columns, parts, strict=True)])


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
    followed by their cases, and a price by one that is near. Numbers in near buckets are alike and columns have one
    size. A column has a dimension of the history's width for each value. Where these are too many,
    small columns have theirs, and large ones share what is left: their values are random signs there, and A^-1 B C^-1
    is 1, so that the score is roughly that of equal values. A second map is of equal values alone, the rarer the more,
    and has weights of its own. The history's vector is s - m at each rate, the item's vector
    has the rest, in as many times the history's width as there are rates. A missing value counts as the mean.

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
        return value_columns(schema)

    def histories(self, schema: Schema, name: str) -> list[Sequence]:
        decay = PoolingSpec(kind="decay", rates=[*self.rates])
        return [history_of_positives(name, decay if schema.time else self.pools)]

    def positives(self, dataset: Dataset, pair: PairConfig) -> PositiveMatrix:
        return with_content(super().positives(dataset, pair), dataset, pair.item.fields, self.item_codes(dataset, pair))

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        assert isinstance(positives, PositivesAndContent)
        assert positives.histories is not None
        histories, content, rates = positives.histories, positives.content, pooling.decay_rates
        directions = positives.once("directions", lambda: _Directions.of(positives, width, seed))
        if not directions.rows.any():
            raise self._finds_no("column of several values at the items of the positives")
        source = content.matrix.product(directions.rows)
        found = positives.once("moments", lambda: [_Moments.of(histories, source, rate) for rate in rates])
        if not found[0].total > 0:
            raise self._finds_no("positive that follows another of its user")
        maps = torch.zeros(len(rates), width, width)
        for is_whole, (start, stop) in zip(directions.whole, pairwise(directions.places), strict=True):
            for number, moments in enumerate(found):
                alike = torch.eye(stop - start)
                own = moments.discriminant(slice(start, stop), self.regularization[0]) if is_whole else alike
                maps[number, start:stop, start:stop] = own
        if not maps.any():
            raise self._finds_no("column that differs among the positives that follow others")
        sizes = [column.rows for column in content.columns]
        of_items = torch.cat([directions.rows @ one.T for one in maps], 1)
        equal = torch.cat([directions.equal] * len(rates), 1)
        return PairValues(source, torch.split(of_items, sizes), alternative=torch.split(equal, sizes))

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


@dataclass(frozen=True)
class _Directions:
    """Vectors of the values of all columns."""

    rows: F32[Tensor, "values E"]
    """A row for each value. The mean over the positives that have a column is 0."""
    equal: F32[Tensor, "values E"]
    """The same weighted by rarity, so that products are of equal values, the more the rarer; 0 in columns whose own map
    is that."""
    places: Listed[int]
    """Dimensions at which columns begin, and the last one ends."""
    whole: Listed[bool]
    """False for a column of more values than dimensions."""

    @classmethod
    def of(cls, positives: PositivesAndContent, width: int, seed: int) -> _Directions:
        """Return a direction for each value, or for those of large columns random signs in the dimensions that smaller
        ones leave (Achlioptas 2003, "Database-friendly Random Projections")."""
        content, taken = positives.content, torch.zeros(positives.n_columns)
        taken.index_add_(0, torch.from_numpy(positives.columns.astype(np.int64)), torch.from_numpy(positives.values))
        counts, generator = content.matrix.transposed().product(taken[:, None]), torch.Generator().manual_seed(seed)
        sizes = [column.rows - 1 for column in content.columns]
        rooms = shared_out(sizes, width)
        rows, equal, places = torch.zeros(len(counts), width), torch.zeros(len(counts), width), [0, *accumulate(rooms)]
        firsts = accumulate((column.rows for column in content.columns), initial=0)
        for column, room, at, first in zip(content.columns, rooms, places, firsts, strict=False):
            count = counts[first : first + column.rows]
            if room == column.rows - 1:
                axes = torch.eye(column.rows)[:, 1:]
            else:
                signs = 2.0 * torch.randint(2, (column.rows, room), generator=generator) - 1
                axes = _rarity(count) * signs / max(1, room) ** 0.5
            of_column = column.of(axes)
            mean = (of_column * count).sum(0) / (count.sum() if count.any() else 1.0)
            rows[first : first + column.rows, at : at + room] = of_column - mean
            rows[first + UNKNOWN] = 0.0
            if room == column.rows - 1:
                whole = slice(first, first + column.rows), slice(at, at + room)
                equal[whole] = _rarity(count).square() * rows[whole]
        return cls(rows, equal, places, [room == size for room, size in zip(rooms, sizes, strict=True)])


def _rarity(counts: F32[Tensor, "rows 1"]) -> F32[Tensor, "rows 1"]:
    """Return log((n + 1) / (n_w + 1)) of each value's positives n_w and those of all, n, over its root mean square
    among the positives (Spärck Jones 1972, "A Statistical Interpretation of Term Specificity and Its Application in
    Retrieval")."""
    found = ((counts.sum() + 1) / (counts + 1)).log()
    mean_square = (counts * found.square()).sum() / counts.sum().clamp(min=1)
    return found / mean_square.sqrt() if mean_square > 0 else torch.ones_like(found)


def shared_out(sizes: Listed[int], width: int) -> list[int]:
    """Return how many of `width` dimensions columns of some sizes have: as many as they want, or, where that is too
    many, the smallest ones first, none more than an equal share of what is left."""
    rooms, left = [0] * len(sizes), width
    for done, place in enumerate(sorted(range(len(sizes)), key=lambda place: sizes[place])):
        rooms[place] = min(sizes[place], left // (len(sizes) - done))
        left -= rooms[place]
    return rooms


def with_content(
    found: PositiveMatrix, dataset: Dataset, names: tuple[str, ...], codes: tuple[Shaped[Codes, "items"], int]
) -> PositivesAndContent:
    """Return positives with these columns of the items, given the code of each item and the number of codes."""
    content = ContentMatrix.of(dataset, names, *codes)
    return PositivesAndContent(
        found.columns, found.offsets, found.values, found.n_columns, found.histories, content=content
    )


def value_columns(schema: Schema) -> tuple[str, ...]:
    """Return the names of the features of the items whose values have a code each: no id, text, history or
    statistic."""
    return tuple(
        f.name
        for f in schema.columns("item")
        if f.source != schema.id_column("item")
        and not (f.computes or f.searchable)
        and (f.has_code or (f.pools is not None and resolve(f.pools).length_exponent is not None))
    )


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


def _column_vectors(
    rows: int, is_ordered: bool, items: Shaped[Ints, "L"], codes: Shaped[Ints, "L"], shares: Shaped[Floats, "L"]
) -> ColumnVectors:
    """Return the vectors of a column of so many values, from its cells."""
    likeness = None
    if is_ordered and rows <= MAX_BUCKETS:
        place = torch.arange(rows, dtype=torch.float32)
        likeness = torch.exp(-(((place[:, None] - place) / BUCKETS_ALIKE) ** 2) / 2)
        likeness[UNKNOWN, :] = likeness[:, UNKNOWN] = 0.0
    if likeness is None:
        _, cell = np.unique(items * rows + codes, return_inverse=True)  # a list may repeat a value
        squares = np.bincount(cell, shares) ** 2
    else:
        squares = likeness.square().sum(1).numpy()[codes]
    mean = float(squares.sum()) / max(1, len(np.unique(items)))
    return ColumnVectors(rows, likeness, mean**-0.5 if mean else 1.0)
