"""Scorer `transitions`: counts of which item follows which, as a product of two tables."""

from __future__ import annotations

import logging

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.ragged import offsets_of
from twotower.arrays.types import F32, Floats, Shaped
from twotower.errors import TrainingError
from twotower.evaluation.transitions import FREQUENCY, LAG, SPAN, UNIT, TransitionCounts, count_transitions
from twotower.features.field import PoolingSpec
from twotower.model.pooling.pooling import Pooling
from twotower.scorers.ease import leading, scaled_values
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.start import PairValues, Start

log = logging.getLogger(__name__)
ITERATIONS = 4
"""Iterations of the subspace iteration: the scores of a width of hundreds are those of twelve to the third digit."""


class TransitionFactors(Start):
    """Transition counts: the table T of log(1 + C_ij / (c_j / c)^frequency). C_ij is how often item j follows item i
    within `span` positives of a user, a gap of g weighing g^-lag, c_j the sum of column j, and c the mean of these. A
    history's vector is its rows of T, decayed or averaged by its pooling, an item's vector an axis of its own: the
    score is the baseline of transition counts (`evaluation/transitions.py`) with the pooling's weights.

    In a width E below the number of items, rows of T are divided by the root of their sums, else those of frequent
    items take all directions. With V the E leading right singular vectors of T, its rows weighted by the fourth root of
    the sums of C, a history's vector is its rows of T V, an item's vector its row of V.

    Use it where histories have an order. Scores are scaled so
    that those of all items after one positive have the root mean square 1. A transition weighs as the positive that
    follows. Memory grows with the different transitions, at most `span` a positive, and time with these times width.
    """

    kind = "transitions"
    pools = PoolingSpec(kind="decay", rates=[0.7])
    needs_time = True

    span: int = Field(SPAN, ge=1, description="Largest gap of a transition, in positives of a user.")
    lag: float = Field(LAG, ge=0, description="Exponent of the gap: a transition of gap g weighs g^-lag.")
    frequency: float = Field(
        FREQUENCY,
        ge=0,
        description="Exponent of the sum by which transitions to an item are divided, to discount popular items.",
    )
    max_transitions: int = Field(
        24_000_000,
        ge=1,
        description="Number of counted transitions above which span is lowered; 24 million take about a gigabyte.",
    )

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        n, counts = positives.n_columns, self._counts(positives)
        if not len(counts.count):
            raise TrainingError(
                "the scorer 'transitions' finds no positive that follows another of its user; leave it out of "
                "scorers, or give more data"
            )
        values = counts.logarithms(self.frequency)
        sums = torch.from_numpy(np.bincount(counts.before, counts.count, n).astype(np.float32))
        if width >= n - 1:  # no less than an axis for each item: its score is that of the table itself
            target, source = torch.eye(n)[:, 1:], _square(counts, values, n)[:, 1:]
            scores = source
        else:
            roots = np.sqrt(np.maximum(np.bincount(counts.before, values), UNIT)).astype(np.float32)
            offsets = offsets_of(np.bincount(counts.before, minlength=n))
            table = PositiveMatrix(counts.after.astype(np.int32), offsets, values / roots[counts.before], n)
            ahead, back = table.product, table.transposed().product
            generator = torch.Generator().manual_seed(seed)
            target, _ = leading(lambda q: back(sums.sqrt()[:, None] * ahead(q)), n, width, generator, ITERATIONS)
            source = ahead(target)
            scores = source @ (target.T @ target)
        squares = (scores * source).sum(1)  # of the scores of all items after one item
        return scaled_values(source, target, (sums @ squares) / (sums.sum() * positives.n_items), width)

    def _counts(self, positives: PositiveMatrix) -> TransitionCounts:
        """Return the transitions of the histories; with a line in the log, of fewer gaps than `span`."""
        histories = positives.histories
        assert histories is not None
        n = len(histories.codes)
        span = min(self.span, max(self.max_transitions // max(n, 1), 1))
        if span < self.span:
            log.warning(
                f"scorer transitions: {n:,} positives have more than max_transitions = {self.max_transitions:,} within "
                f"a span of {self.span}, so gaps up to {span} are counted"
            )
        return count_transitions(
            histories.codes.astype(np.int64), histories.lengths, positives.n_columns, span, self.lag, histories.weights
        )


def _square(counts: TransitionCounts, values: Shaped[Floats, "T"], n: int) -> F32[Tensor, "n n"]:
    """Return the square table of some values of the transitions."""
    table = torch.zeros(n, n)
    table[torch.from_numpy(counts.before), torch.from_numpy(counts.after)] = torch.from_numpy(values)
    return table
