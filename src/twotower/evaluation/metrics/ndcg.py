"""Metric `ndcg`: hits discounted by rank."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Doubles, Shaped
from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import Prominence, RankingMetric


class Ndcg(RankingMetric):
    """Discounted cumulative gain with gain 1 and discount log2(rank + 1), divided by that of the ideal ranking
    (Järvelin and Kekäläinen 2002). With evaluation.weighted the gain is the weight of the target.

    Use it where the order of the first k items is seen.
    """

    kind = "ndcg"
    prominence = Prominence.EPOCH
    slices = ("user",)

    def values(self, rankings: Rankings) -> Shaped[Doubles, "Q"]:
        """Return the gain of each user."""
        weights = rankings.weights
        discount = 1 / np.log2(np.arange(2, weights.hit.shape[1] + 2))
        gain: Doubles = (weights.hit * discount).sum(1) / (weights.heaviest * discount).cumsum(1)[:, -1]
        return gain
