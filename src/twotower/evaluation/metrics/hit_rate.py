"""Metric `hit_rate`: users with a hit."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Bools, Doubles, Shaped
from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import Prominence, RankingMetric


class HitRate(RankingMetric):
    """1 with a hit among the first k items, else 0.

    Use it where one hit is enough, and to compare with papers that leave one interaction out, for which it equals
    recall.
    """

    kind = "hit_rate"
    prominence = Prominence.SERVED

    def values(self, rankings: Rankings) -> Shaped[Doubles, "Q"]:
        """Return 1 or 0 for each user."""
        found: Bools = rankings.hit.max(1, initial=False)
        return found.astype(np.float64)
