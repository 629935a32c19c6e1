"""Measured quantities, from which metrics are computed: scored pairs and rankings of a part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from twotower.arrays.pieces import ones, pieces, selected
from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Bools, Doubles, Floats, Ints, Numbers, Shaped, WholeNumbers
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.data.splits import TEST
from twotower.evaluation.moments import items_during
from twotower.features.schema import Schema
from twotower.features.values import TEXT_TYPES

BLOCK_RANKINGS = 65_536
"""Rankings of which a number is averaged at a time."""


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of a part: scores, labels and users. Arrays of many pairs are mapped from a disk: a metric that reads them
    in pieces (`twotower.arrays.pieces`) takes no memory that grows with the pairs."""

    scores: Shaped[Numbers, "n"]
    positive: Shaped[Bools, "n"]
    users: Shaped[WholeNumbers, "n"]
    weights: Shaped[Floats, "n"]
    """Weights above 0; `ones` if all count alike."""

    @classmethod
    def of(cls, scores: Shaped[Numbers, "n"], pairs: Pairs, weighted: bool = False) -> ScoredPairs:
        """Return the scored pairs of a weight above 0, with their weights if `weighted`."""
        scored = cls(scores, pairs.positive, pairs.user, pairs.weight if weighted else ones(len(pairs)))
        return scored.where(pairs.weight > 0) if pairs.weighted else scored

    def where(self, keep: Shaped[Bools, "n"]) -> ScoredPairs:
        """Return some of the pairs."""
        return ScoredPairs(
            selected(self.scores, keep), selected(self.positive, keep), selected(self.users, keep),
            selected(self.weights, keep),
        )  # fmt: skip


@dataclass(frozen=True)
class RankedItems:
    """Items that are ranked."""

    popularity: Shaped[Numbers, "I"]
    """Number of training interactions of each item, or the sum of their weights."""
    user_counts: Shaped[Ints, "I"]
    """Number of users with a training interaction with each item."""
    n_users: int
    """Number of users with a training interaction."""
    table: pl.DataFrame
    """Table of the items; of versions those that hold at the first pair of the part."""
    schema: Schema

    @classmethod
    def of(
        cls, dataset: Dataset, rows: Shaped[Ints, "I"] | None = None, weighted: bool = False, part: int = TEST
    ) -> RankedItems:
        """Return some items of a dataset, by default all, for rankings of a part, with their popularity by weight if
        `weighted`."""
        n_users = int(np.count_nonzero(dataset.user_counts))
        popularity = dataset.item_weights if weighted else dataset.item_counts
        found = cls(popularity, dataset.item_user_counts, n_users, items_during(dataset, part), dataset.schema)
        if rows is None:
            return found
        some = found.popularity[rows], found.user_counts[rows]
        return replace(found, popularity=some[0], user_counts=some[1], table=found.table[rows])

    @property
    def n_items(self) -> int:
        return len(self.popularity)

    def value_sets(self, column: str) -> Ragged:
        """Return the distinct values of each item in a column of the table, as numbers from 0: of a list or separated
        text several, of a missing value none."""
        series = self.table[column]
        for feature in self.schema.columns("item"):
            if feature.source == column:
                series = feature.values(series)
        if isinstance(series.dtype, pl.Array):
            series = series.arr.to_list()
        flat = pl.DataFrame({"value": series}).with_row_index("row")
        if isinstance(series.dtype, pl.List):
            flat = flat.explode("value")
        flat = flat.drop_nulls().unique()
        if flat["value"].dtype in TEXT_TYPES:
            flat = flat.filter(pl.col("value") != "")
        codes = flat["value"].rank("dense").to_numpy().astype(np.int64) - 1
        return Ragged.from_pairs(flat["row"].to_numpy().astype(np.int64), codes, self.n_items)


@dataclass(frozen=True)
class TargetWeights:
    """Weights of the targets of Q rankings; those of rows of one target are added. In masks True is 1."""

    hit: Shaped[Doubles | Bools, "Q K"]
    """Weight of each item of a ranking as a target; 0 of another item."""
    total: Shaped[Doubles | Ints, "Q"]
    """Weight of all targets of each user."""
    heaviest: Shaped[Doubles | Bools, "Q K"]
    """Weights of the K heaviest targets of each user, falling; 0 after the last."""

    def at(self, k: int) -> TargetWeights:
        """Return the weights for the first `k` ranks."""
        return replace(self, hit=self.hit[:, :k], heaviest=self.heaviest[:, :k])

    def of_users(self, keep: Shaped[Bools, "Q"]) -> TargetWeights:
        """Return the weights of some rankings."""
        return TargetWeights(self.hit[keep], self.total[keep], self.heaviest[keep])


@dataclass(frozen=True)
class Rankings:
    """Rankings of Q users with something to find: their best K items."""

    best: Shaped[Ints, "Q K"]
    """Item rows in rank order; -1 after the last item that may be ranked."""
    hit: Shaped[Bools, "Q K"]
    """True where an item is a target of its user."""
    n_targets: Shaped[Ints, "Q"]
    items: RankedItems
    weights: TargetWeights

    @classmethod
    def alike(
        cls, best: Shaped[Ints, "Q K"], hit: Shaped[Bools, "Q K"], n_targets: Shaped[Ints, "Q"], items: RankedItems
    ) -> Rankings:
        """Return rankings whose targets all count alike."""
        heaviest = np.arange(hit.shape[1]) < n_targets[:, None]
        return cls(best, hit, n_targets, items, TargetWeights(hit, n_targets, heaviest))

    def mean_of(self, values: Shaped[Doubles, "I"]) -> Shaped[Doubles, "Q"]:
        """Return the mean of a number of the items over each ranking; 0 of one without an item."""
        out = np.zeros(len(self.best))
        for part in pieces(len(out), BLOCK_RANKINGS):
            rows, shown = self.best[part], self.best[part] >= 0
            out[part] = np.where(shown, values[rows], 0.0).sum(1) / np.maximum(shown.sum(1), 1)
        return out

    def at(self, k: int) -> Rankings:
        """Return the first `k` ranks."""
        return replace(self, best=self.best[:, :k], hit=self.hit[:, :k], weights=self.weights.at(k))

    def of_users(self, keep: Shaped[Bools, "Q"]) -> Rankings:
        """Return some of the rankings."""
        return Rankings(self.best[keep], self.hit[keep], self.n_targets[keep], self.items, self.weights.of_users(keep))
