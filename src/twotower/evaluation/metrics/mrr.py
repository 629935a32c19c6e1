"""Metric `mrr`: the rank of the first hit."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Doubles, Shaped
from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import RankingMetric


class Mrr(RankingMetric):
    """Reciprocal rank: 1 / rank of the first hit, 0 without a hit among the first k items.

    Use it where a user looks for one item, as in a search.
    """

    kind = "mrr"

    def values(self, rankings: Rankings) -> Shaped[Doubles, "Q"]:
        """Return the reciprocal rank of each user."""
        found = rankings.hit.any(1)
        return found / np.where(found, rankings.hit.argmax(1) + 1, 1)
