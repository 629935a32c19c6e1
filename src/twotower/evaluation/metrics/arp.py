"""Metric `arp`: the popularity of the items that are shown."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Doubles, Shaped
from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import RankingMetric


class Arp(RankingMetric):
    """Average recommendation popularity: the mean number of training interactions of the first k items (Abdollahpouri
    et al. 2019, "Managing Popularity Bias in Recommender Systems with Personalized Re-ranking"). With
    evaluation.weighted the popularity of an item is the weight of its interactions.

    Use it to see if a model shows items that are more popular than those that users choose.
    """

    kind = "arp"
    always = False
    slices = ("user",)
    higher_is_better = False

    def values(self, rankings: Rankings) -> Shaped[Doubles, "Q"]:
        """Return the mean over each user's items; 0 without any."""
        return rankings.mean_of(rankings.items.popularity.astype(np.float64))
