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

SPAN = 20
"""Largest gap of a transition, and number of latest items of a query."""
LAG = 0.75
"""Exponent p: a transition of gap g weighs g^-p."""
RECENCY = 1.0
"""Exponent r: the n-th latest item of a query weighs n^-r."""
FREQUENCY = 0.2
"""Exponent q: the transitions to an item are divided by their sum^q, which takes a part of its popularity away. The
exponents are the best on the validation part of MovieLens 1M (`benchmarks/quality/baselines.toml`)."""
MAX_INTERACTIONS = 1_200_000
"""Training positives above which the baseline is left out: it holds up to `SPAN` transitions of each, up to 2.5 GB."""
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

    def shares(self, n_items: int, frequency: float) -> Shaped[Floats, "T"]:
        """Return the numbers over the sum of their row, and over the sum of their column to the power of
        `frequency`."""
        from_item, to_item = (np.bincount(rows, self.count, n_items) for rows in (self.before, self.after))
        shares: Floats = (self.count / (from_item[self.before] * to_item[self.after] ** frequency)).astype(np.float32)
        return shares


@dataclass(frozen=True)
class Transitions(CatalogueScorer):
    """Transition counts: how often item j follows item i within `SPAN` interactions of a user, by the gap between them.
    Each row of counts is scaled to sum 1. The score of j for a user is the sum over the latest items i."""

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
        table = _shares(items, histories.lengths, len(dataset.items))
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
        weights = torch.from_numpy(((n + 1.0) ** -RECENCY).astype(np.float32))
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


def _shares(items: Shaped[Ints, "n"], lengths: Shaped[Ints, "U"], n_items: int) -> F32[Tensor, "I I"]:
    """Return the sparse table of the transitions within histories, which stand one after another, the oldest item
    first."""
    found = count_transitions(items, lengths, n_items)
    share, places = found.shares(n_items, FREQUENCY), torch.from_numpy(np.stack([found.before, found.after]))
    return torch.sparse_coo_tensor(
        places,
        torch.from_numpy(share),
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
