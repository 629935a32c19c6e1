"""Scorer `transitions`: counts of which item follows which, as a product of two tables; alone, as they are."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import polars as pl
import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.pieces import ones
from twotower.arrays.ragged import Ragged, offsets_of
from twotower.arrays.sets import pair_keys
from twotower.arrays.types import F32, Codes, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.evaluation.added_scores import AddedScores
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import CatalogueScorer
from twotower.features.field import PoolingSpec
from twotower.model.pooling.pooling import Pooling
from twotower.scorers.ease import leading, scaled_values
from twotower.scorers.positives import PositiveMatrix, PositiveSequences
from twotower.scorers.start import PairValues, Start

log = logging.getLogger(__name__)

SPAN = 10
"""Largest gap of a transition, and number of latest items of a query."""
LAG = 0.75
"""Exponent p: a transition of gap g weighs g^-p."""
RATE = 0.7
"""Rate r: the n-th latest item of a query weighs r^(n-1)."""
FREQUENCY = 0.2
"""Exponent q: counts are divided by (sum of their column / mean sum)^q, which takes a part of an item's popularity
away. SPAN, LAG, RATE and FREQUENCY are the best on the validation parts of four logs (`docs/log.md`)."""
MAX_INTERACTIONS = 1_200_000
"""Training positives above which the baseline is left out: it holds up to `SPAN` transitions of each, up to 1.3 GB."""
UNIT = 2.0**-16
"""Weights are counted in multiples of this, so that no sum depends on its order."""


@dataclass(frozen=True)
class TransitionCounts:
    """Transitions from item `before[t]` to item `after[t]`, each pair once, in the order of these, and their weighted
    numbers."""

    before: Shaped[Ints, "T"]
    after: Shaped[Ints, "T"]
    count: Shaped[Floats, "T"]

    def logarithms(self, frequency: float) -> Shaped[Floats, "T"]:
        """Return log(1 + C_ij / (c_j / c)^q) of the numbers C_ij, for the sums c_j of columns, their mean c over items
        that follow any, and q the `frequency`."""
        of_item = np.bincount(self.after, self.count)
        follows = of_item > 0
        discount = np.zeros(len(of_item), np.float32)
        if follows.any():
            discount[follows] = frequency * np.log(of_item[follows] / of_item[follows].mean())
        values: Floats = np.logaddexp(0, np.log(self.count.astype(np.float32)) - discount[self.after])
        return values


class TransitionFactors(Start):
    """Transition counts: the table T of log(1 + C_ij / (c_j / c)^frequency). C_ij is how often item j follows item i
    within `span` positives of a user, a gap of g weighing g^-lag, c_j the sum of column j, and c the mean of these. A
    history's vector is its rows of T, decayed or averaged by its pooling, an item's vector an axis of its own: the
    score is the baseline `Transitions` with the pooling's weights.

    In a width E below the number of items, rows of T are divided by the root of their sums, else those of frequent
    items take all directions. With V the E leading right singular vectors of T, its rows weighted by the fourth root of
    the sums of C, a history's vector is its rows of T V, an item's vector its row of V.

    Use it where histories have an order. Scores are scaled so
    that those of all items after one positive have the root mean square 1. A transition weighs as the positive that
    follows. Memory grows with the different transitions, at most `span` a positive, and time with these times width.
    """

    kind, label = "transitions", "transition counts"
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

    @classmethod
    def alone(
        cls, dataset: Dataset, part: int, config: EvaluationConfig, added: Sequence[AddedScores]
    ) -> CatalogueScorer | None:
        return Transitions.of(dataset, part) if dataset.time_ordered else None

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
            target, source = torch.eye(n)[:, 1:], _table(counts, values, n).to_dense()[:, 1:]
            scores = source
        else:
            roots = np.sqrt(np.maximum(np.bincount(counts.before, values), UNIT)).astype(np.float32)
            offsets = offsets_of(np.bincount(counts.before, minlength=n))
            table = PositiveMatrix(counts.after.astype(np.int32), offsets, values / roots[counts.before], n)
            ahead, back = table.product, table.transposed().product
            generator = torch.Generator().manual_seed(seed)
            target = leading(lambda q: back(sums.sqrt()[:, None] * ahead(q)), n, width, generator)
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
        return count_transitions(histories, positives.n_columns, span, self.lag)


def _table(counts: TransitionCounts, values: Shaped[Floats, "T"], n: int) -> F32[Tensor, "n n"]:
    """Return the sparse table of some values of the transitions."""
    places = torch.from_numpy(np.stack([counts.before, counts.after]))
    return torch.sparse_coo_tensor(places, torch.from_numpy(values), (n, n), is_coalesced=True, check_invariants=False)


@dataclass(frozen=True)
class Transitions(CatalogueScorer):
    """Transition counts C_ij: how often item j follows item i within `SPAN` interactions of a user, by the gap between
    them. The score of j for a user is the sum over the latest items i of r^(n-1) log(1 + C_ij / (c_j / c)^q): i is the
    n-th latest, c_j the sum of the counts of j, c the mean of such sums, r the `RATE` and q the `FREQUENCY`.

    This is the smoothed log-probability that j follows i, log((C_ij + k) / (C_i + n k)), without what is equal for all
    j, of PCTM (Petrov et al. 2026, "Do Sequential Recommendation Benchmarks Really Require Higher-Order Sequence
    Modelling?"), at k = 1. PCTM adds a multiple of log popularity in place of the division of the counts."""

    table: F32[Tensor, "I I"]  # sparse: the item before, the item that follows
    latest: Shaped[Codes, "U L"]  # latest item of each user first, -1 where there are fewer

    @classmethod
    def of(cls, dataset: Dataset, part: int, max_interactions: int = MAX_INTERACTIONS) -> Self | None:
        """Count the transitions of the training positives, for users as they are before `part`; None for users of whom
        `part` has rows before others, without times, and, with a line in the log, above `max_interactions`
        positives."""
        if not _follow(dataset, part):
            return None
        histories = dataset.positives_by_user
        if (n := len(histories.values)) > max_interactions:
            log.info(
                f"no baseline of transitions: {n:,} training positives, and it is for at most {max_interactions:,}"
            )
            return None
        items = dataset.pairs.item[histories.values]
        counts = count_transitions(PositiveSequences(items, histories.lengths, ones(len(items))), len(dataset.items))
        table = _table(counts, counts.logarithms(FREQUENCY), len(dataset.items))
        known = dataset.sort_by_time((dataset.parts < part) & dataset.pairs.target)
        before = Ragged.from_pairs(dataset.pairs.user[known], dataset.pairs.item[known], len(dataset.users))
        at = before.offsets[1:, None] - np.arange(1, SPAN + 1)
        latest = np.where(at >= before.offsets[:-1, None], np.append(before.values, -1)[np.maximum(at, 0)], -1)
        return cls(table, latest.astype(np.int32))

    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> F32[Tensor, "B I"]:
        """Return the scores of all items for some user rows."""
        latest = self.latest[users]
        row, n = np.nonzero(latest >= 0)
        places = torch.from_numpy(np.stack([row, latest[row, n].astype(np.int64)]))
        weights = torch.from_numpy((RATE**n).astype(np.float32))
        query = torch.sparse_coo_tensor(places, weights, (len(users), len(self.table)), check_invariants=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # of the product, once
            scores: Tensor = torch.sparse.mm(query, self.table).to_dense()
        return scores


def count_transitions(
    histories: PositiveSequences, n_items: int, span: int = SPAN, lag: float = LAG
) -> TransitionCounts:
    """Return the transitions within histories. A transition of gap g, at most `span`, weighs g^-lag, times the weight
    of the interaction that follows over the mean weight."""
    items, weights = histories.codes.astype(np.int64), histories.weights
    user = np.repeat(np.arange(len(histories.lengths)), histories.lengths)
    counted, mean = [], float(weights.sum(dtype=np.float64)) / max(1, len(items))
    for gap in range(1, min(span, len(items) - 1) + 1):
        same = user[gap:] == user[:-gap]
        keys = pair_keys(items[:-gap][same], items[gap:][same], n_items)
        units = np.rint(weights[gap:][same] * (gap**-lag / UNIT / mean)).astype(np.int64)
        counted.append(pl.DataFrame({"key": keys, "n": units}).group_by("key").agg(pl.col("n").sum()))
    every = pl.concat(counted) if counted else pl.DataFrame(schema={"key": pl.Int64, "n": pl.Int64})
    sums = every.group_by("key").agg(pl.col("n").sum()).filter(pl.col("n") > 0).sort("key")
    before, after = np.divmod(sums["key"].to_numpy(), n_items)
    return TransitionCounts(before, after, sums["n"].to_numpy() * np.float32(UNIT))


def _follow(dataset: Dataset, part: int) -> bool:
    """Return True if no row of `part` is earlier than one of its user in an earlier part."""
    if not dataset.schema.time:
        return False
    latest = np.full(len(dataset.users), np.iinfo(np.int64).min)
    before = dataset.parts < part
    np.maximum.at(latest, dataset.pairs.user[before], dataset.times[before])
    of_part = dataset.parts == part
    return bool((dataset.times[of_part] >= latest[dataset.pairs.user[of_part]]).all())
