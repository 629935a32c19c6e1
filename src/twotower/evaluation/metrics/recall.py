"""Metric `recall`: the share of targets that is found."""

from __future__ import annotations

from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import Prominence, RankingMetric


class Recall(RankingMetric):
    """Hits among the first k items, divided by the number of the user's targets. With evaluation.weighted both are
    weights.

    Use it to choose a model that retrieves candidates for a ranker, which orders them again.
    """

    kind = "recall"
    prominence = Prominence.EPOCH
    slices = ("user", "item")

    def values(self, rankings: Rankings) -> Shaped[Doubles, "Q"]:
        """Return the share of each user's targets."""
        found: Doubles | Ints = rankings.weights.hit.sum(1)
        return found / rankings.weights.total
