"""Metric `gauc`: the order of each user's positives and negatives."""

from __future__ import annotations

import numpy as np

from twotower.evaluation.metrics.auc import auc_by_group
from twotower.evaluation.metrics.measured import ScoredPairs
from twotower.evaluation.metrics.metric import PairMetric, Prominence, UserValues


class Gauc(PairMetric):
    """Mean AUC of the users, weighted by their pairs; users with pairs of one class are left out (Zhu et al. 2017,
    "Optimized Cost per Click in Taobao Display Advertising", section 4). Unlike AUC it does not reward telling busy
    users from others.

    Use it where each user sees a ranking of their own.
    """

    kind = "gauc"
    prominence = Prominence.EPOCH

    def value(self, pairs: ScoredPairs) -> float:
        """Return the mean; NaN without a user with both classes."""
        _, values, weights = self.by_user(pairs)
        return float(np.average(values, weights=weights)) if len(values) else float("nan")

    def by_user(self, pairs: ScoredPairs) -> UserValues:
        """Return the AUC of each user with both classes, and the number or weight of the pairs."""
        users, values, sizes = auc_by_group(pairs.scores, pairs.positive, pairs.users, weights=pairs.weights)
        return UserValues(users, values, sizes.astype(np.float64))
