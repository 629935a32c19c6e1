"""Start `next_content`: the columns of the next item, foretold by those of the decayed history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.ragged import offsets_of
from twotower.arrays.types import F32, F64
from twotower.errors import TrainingError
from twotower.model.pooling.pooling import Pooling
from twotower.train.starts.columns import ColumnStart, ContentMatrix, PositivesAndContent
from twotower.train.starts.ease import leading
from twotower.train.starts.positives import PositiveMatrix, PositiveSequences
from twotower.train.starts.start import PairValues, Positive

USERS = 8192
"""Users whose histories are read at a time."""
MAX_LENGTH = 2048
"""Positives of a user that are read, the latest."""
TINY = 1e-6
"""Share of the greatest eigenvalue below which another one is rounding noise."""


class NextContent(ColumnStart):
    """Linear discriminants of the next item's columns. For each column c and each rate r of the pooling the score is

        (s - m)^T A^-1 B C^-1 (f - m)

    with f the item's vector of that column, s its decayed mean over the history, m the mean of f, A and C the covariances of s and
    of the next item's f over the positives after a user's first, each plus `regularization` times its mean variance, and B that of
    both (Hastie, Tibshirani and Friedman 2009, "The Elements of Statistical Learning", section 4.3: the logarithm of how much more
    likely a next item with f is after s, if both are normal). So phones are followed by their cases, and a price by one that is
    near. A column has a direction for each value, or all columns share the E leading directions of the values among the positives,
    where these are more than the history's width E; numbers in near buckets are alike and columns have one size, as in `content`.
    The history's vector is s - m at each rate, the item's vector has the rest, in as many times the history's width as there are
    rates. A missing value counts as the mean.

    Use it where histories have an order and the items have columns, beside trained pairs, weighed by `blend`. Before that each
    column and rate gets the factor under which what users of validation take anew is most likely, and the weight 1 is then these
    factors; of fewer than 50 such rows there are none, and 1 is the root mean square of the other scores. A row's weight is that
    of the positive that follows. Of a user the latest 2,048 positives are read, without items of the unknown code. The time is the
    number of positives times the number of rates and E^2.
    """

    kind = "next_content"
    poolings = ("decay",)
    choices = ("regularization",)
    weighs_parts = True

    regularization: tuple[Positive, ...] = Field(
        (0.1,),
        min_length=1,
        description="Addition to each variance, in mean variances. Of several values the best on validation, or one beyond or between them that is better.",
    )

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        assert isinstance(positives, PositivesAndContent)
        assert positives.histories is not None
        histories, content, rates = positives.histories, positives.content, pooling.decay_rates
        directions, places = positives.once("directions", lambda: _centred_directions(positives, width, seed))
        if not directions.any():
            raise self._finds_no("column of several values at the items of the positives")
        source = content.matrix.product(directions)
        found = positives.once("moments", lambda: [_Moments.of(histories, source, rate) for rate in rates])
        if not found[0].total > 0:
            raise self._finds_no("positive that follows another of its user")
        maps = torch.zeros(len(rates), width, width)
        for start, stop in pairwise(places):
            for number, moments in enumerate(found):
                maps[number, start:stop, start:stop] = moments.discriminant(slice(start, stop), self.regularization[0])
        if not maps.any():
            raise self._finds_no("column that differs among the positives that follow others")
        of_items = torch.cat([directions @ one.T for one in maps], 1)
        return PairValues(source, torch.split(of_items, [column.rows for column in content.columns]))

    def _finds_no(self, what: str) -> TrainingError:
        return TrainingError(f"train.start of kind '{self.kind}' finds no {what}; leave the start and its pair out")


@dataclass(frozen=True)
class _Moments:
    """Covariances of decayed histories s and the items f that follow them, weighted, and the sum of the weights."""

    of_history: F64[Tensor, "E E"]
    of_both: F64[Tensor, "E E"]
    of_next: F64[Tensor, "E E"]
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
            state, weight = torch.zeros(len(some), width), 0.0
            for place in range(int(lengths[0])):
                rows = starts[: np.searchsorted(-lengths, -place)] + place  # those of longer histories come first
                following = vectors[torch.from_numpy(histories.codes[rows].astype(np.int64))]
                state = state[: len(rows)]
                if place:
                    each = (
                        torch.ones(len(rows))
                        if histories.weights is None
                        else torch.from_numpy(histories.weights[rows])
                    )
                    mean, weighted = state / weight, following * each[:, None]
                    sums += torch.stack([each @ mean, weighted.sum(0)])
                    products += torch.stack(
                        [(mean * each[:, None]).T @ mean, mean.T @ weighted, following.T @ weighted]
                    )
                    total += float(each.sum(dtype=torch.float64))
                state, weight = rate * state + following, rate * weight + 1
        before, after = sums / (total or 1.0)
        of_history, of_both, of_next = products / (total or 1.0)
        return cls(
            of_history - torch.outer(before, before),
            of_both - torch.outer(before, after),
            of_next - torch.outer(after, after),
            total,
        )

    def discriminant(self, part: slice, regularization: float) -> F32[Tensor, "k k"]:
        """Return A^-1 B C^-1 of some dimensions; zeros where histories or items do not differ in them."""
        a, b, c = (every[part, part] for every in (self.of_history, self.of_both, self.of_next))
        if not (a.trace() > 0 and c.trace() > 0):
            return torch.zeros_like(b).float()
        a, c = (m + regularization * m.trace() / len(m) * torch.eye(len(m)) for m in (a, c))
        found: Tensor = torch.linalg.solve(a, torch.linalg.solve(c, b.T).T)
        return found.float()


def _centred_directions(
    positives: PositivesAndContent, width: int, seed: int
) -> tuple[F32[Tensor, "values E"], Sequence[int]]:
    """Return a row for each value, whose mean over the positives that have the column is 0, and the dimensions at which columns begin and the
    last one ends."""
    content, taken = positives.content, torch.zeros(positives.n_columns)
    taken.index_add_(0, torch.from_numpy(positives.columns.astype(np.int64)), torch.from_numpy(positives.values))
    firsts = np.cumsum([0, *(column.rows for column in content.columns)]).tolist()
    if content.matrix.n_columns - len(content.columns) <= width:  # without the unknown values
        found = [(column.of(torch.eye(column.rows)[:, 1:]), torch.ones(column.rows - 1)) for column in content.columns]
    else:
        found = [_leading_of_column(content, taken, n, firsts[n], width, seed) for n in range(len(content.columns))]
    every = torch.cat([squares for _, squares in found])
    owner = torch.cat([torch.full((len(squares),), n) for n, (_, squares) in enumerate(found)])
    order = every.argsort(descending=True, stable=True)[:width]
    least = TINY * float(every.max()) if len(every) else 0.0
    rooms = torch.bincount(owner[order[every[order] > least]], minlength=len(found)).tolist()
    counts = content.matrix.transposed().product(taken[:, None])
    directions, places = torch.zeros(firsts[-1], width), [0, *accumulate(rooms)]
    for (vectors, _), room, at, (first, stop) in zip(found, rooms, places, pairwise(firsts), strict=False):
        of_column, count = vectors[:, :room], counts[first:stop]
        mean = (of_column * count).sum(0) / (count.sum() if count.any() else 1.0)
        directions[first:stop, at : at + room] = of_column - mean
    return directions, places


def _leading_of_column(
    content: ContentMatrix, taken: F32[Tensor, "codes"], number: int, first: int, width: int, seed: int
) -> tuple[F32[Tensor, "rows k"], F32[Tensor, "k"]]:
    """Return the vectors of a column's values on the leading eigenvectors of their products among items `taken` so often, and the eigenvalues.
    The column's values begin at `first`."""
    column, turned, n = content.columns[number], content.matrix.transposed(), content.matrix.n_columns

    def product(q: F32[Tensor, "rows k"]) -> F32[Tensor, "rows k"]:
        spread = torch.nn.functional.pad(column.of(q), (0, 0, first, n - first - column.rows))
        back = turned.product(taken[:, None] * content.matrix.product(spread))
        return column.of(back[first : first + column.rows])

    axes, squares = leading(product, column.rows, min(width, column.rows - 1), torch.Generator().manual_seed(seed))
    return column.of(axes), squares
