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
        hit, weights = rankings.hit, rankings.weights
        discount = 1 / np.log2(np.arange(2, hit.shape[1] + 2))
        if weights is not None:
            weighted: Doubles = (weights.hit * discount).sum(1) / (weights.heaviest * discount).sum(1)
            return weighted
        ideal = np.cumsum(discount)[np.minimum(rankings.n_targets, hit.shape[1]) - 1]
        gain: Doubles = (hit * discount).sum(1) / ideal
        return gain
