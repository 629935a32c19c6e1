"""Metric `diversity`: the differences of the items of one ranking."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from twotower.arrays.pieces import pieces
from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.errors import ConfigError, did_you_mean
from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import RankingMetric

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset

BLOCK_USERS = 64
"""Users whose items are compared at a time."""


class Diversity(RankingMetric):
    """Intra-list diversity: the mean distance of two of the first k items (Ziegler et al. 2005, "Improving
    Recommendation Lists Through Topic Diversification"). The distance is that of Jaccard: the share of the values of
    both items in `column` that only one of them has. It is not computed from the model's vectors. Two items without a
    value are equal. Items with versions have the values that hold at the first row of the part.

    Use it together with a ranking metric, where a list of one genre tires.
    """

    kind = "diversity"
    always = False
    slices = ("user",)

    column: str = Field(min_length=1, description="Column of the items with their values, such as genres.")

    def check(self, dataset: Dataset) -> None:
        """Raise ConfigError if the items lack the column."""
        columns = dataset.items.frame.columns
        if self.column not in columns:
            raise ConfigError(
                f"evaluation.metrics: diversity reads the column '{self.column}', which the items lack"
                f"{did_you_mean(self.column, columns)} (found: {', '.join(columns)}); prepared data have the columns "
                "that [schema] names"
            )

    def values(self, rankings: Rankings) -> Shaped[Doubles, "Q"]:
        """Return the mean over the pairs of each user's items; 0 with fewer than two."""
        sets = rankings.items.value_sets(self.column)
        out = np.zeros(len(rankings.best))
        for part in pieces(len(out), BLOCK_USERS):
            out[part] = _mean_distances(rankings.best[part], sets)
        return out


def _mean_distances(best: Shaped[Ints, "B K"], sets: Ragged) -> Shaped[Doubles, "B"]:
    """Return the mean Jaccard distance of each row's pairs of items, which have the values `sets`; -1 is no item."""
    shown = best >= 0
    found, (user, place) = sets.take(best[shown]), np.nonzero(shown)
    owner = found.owners
    # Only the values of its own items matter to a user: they are numbered anew, so that a matrix of them stays small.
    width = int(sets.values.max(initial=0)) + 1
    distinct, number = np.unique(user[owner] * width + found.values, return_inverse=True)
    first = np.searchsorted(distinct, np.arange(len(best)) * width)
    number = number - first[user[owner]]
    has = np.zeros((*best.shape, int(number.max(initial=-1)) + 1), np.float32)
    has[user[owner], place[owner], number] = 1
    common = (has @ has.swapaxes(1, 2)).astype(np.float64)
    size = has.sum(2, dtype=np.float64)
    either = size[:, :, None] + size[:, None, :] - common
    distance = np.where(either > 0, 1 - common / np.maximum(either, 1), 0.0)
    distance *= shown[:, :, None] & shown[:, None, :]
    n = shown.sum(1)
    mean: Doubles = distance.sum((1, 2)) / np.maximum(n * (n - 1), 1)  # an item has no distance from itself
    return mean
