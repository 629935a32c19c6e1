"""Baseline of order: the items that came after a user's latest ones, in the histories of all users."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import pair_keys
from twotower.arrays.types import F32, Codes, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.evaluation.factors import CatalogueScorer

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
MAX_CELLS = 1 << 24
"""Pairs of items up to which every pair has a count in memory, 128 MiB, which is faster than to sort the
transitions."""
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
        items = dataset.pairs.item[histories.values].astype(np.int64)
        table = _table(items, histories.lengths, len(dataset.items))
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
    items: Shaped[Ints, "n"], lengths: Shaped[Ints, "U"], n_items: int, span: int = SPAN, lag: float = LAG,
    weights: Shaped[Floats, "n"] | None = None, max_cells: int = MAX_CELLS,
) -> TransitionCounts:  # fmt: skip
    """Return the transitions within histories, which stand one after another, the oldest item first. A transition of
    gap g, at most `span`, weighs g^-lag, times the weight of the interaction that follows over the mean weight. Up to
    `max_cells` pairs of items each has a count in memory; the transitions of more are sorted. The counts are the
    same."""
    user = np.repeat(np.arange(len(lengths)), lengths)
    counted, mean = [], 1.0 if weights is None else float(weights.mean())
    whole = np.zeros(n_items**2 if n_items**2 <= max_cells else 0)  # of whole numbers, which float64 adds exactly
    for gap in range(1, min(span, len(items) - 1) + 1):
        same = user[gap:] == user[:-gap]
        keys = pair_keys(items[:-gap][same], items[gap:][same], n_items)
        ones = np.ones(len(keys), np.float32) if weights is None else weights[gap:][same]
        units = np.rint(ones * (gap**-lag / UNIT / mean)).astype(np.int64)
        if len(whole):
            np.add.at(whole, keys, units.astype(np.float64))
            continue
        counted.append(pl.DataFrame({"key": keys, "n": units}).group_by("key").agg(pl.col("n").sum()))
    if len(whole):
        cells = np.flatnonzero(whole)
        before, after = np.divmod(cells, n_items)
        return TransitionCounts(before, after, whole[cells].astype(np.int64) * np.float32(UNIT))
    every = pl.concat(counted) if counted else pl.DataFrame(schema={"key": pl.Int64, "n": pl.Int64})
    sums = every.group_by("key").agg(pl.col("n").sum()).filter(pl.col("n") > 0).sort("key")
    before, after = np.divmod(sums["key"].to_numpy(), n_items)
    return TransitionCounts(before, after, sums["n"].to_numpy() * np.float32(UNIT))


def _table(items: Shaped[Ints, "n"], lengths: Shaped[Ints, "U"], n_items: int) -> F32[Tensor, "I I"]:
    """Return the sparse table of the transitions within histories, which stand one after another, the oldest item
    first."""
    found = count_transitions(items, lengths, n_items)
    values, places = found.logarithms(FREQUENCY), torch.from_numpy(np.stack([found.before, found.after]))
    return torch.sparse_coo_tensor(
        places,
        torch.from_numpy(values),
        (n_items, n_items),
        is_coalesced=True,
        check_invariants=False,
    )


def _follow(dataset: Dataset, part: int) -> bool:
    """Return True if no row of `part` is earlier than one of its user in an earlier part."""
    if dataset.times is None:
        return False
    latest = np.full(len(dataset.users), np.iinfo(np.int64).min)
    before = dataset.parts < part
    np.maximum.at(latest, dataset.pairs.user[before], dataset.times[before])
    of_part = dataset.parts == part
    return bool((dataset.times[of_part] >= latest[dataset.pairs.user[of_part]]).all())
