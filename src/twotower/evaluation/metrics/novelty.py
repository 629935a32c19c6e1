"""Metric `novelty`: the surprise of the items that are shown."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Doubles, Shaped
from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import RankingMetric


class Novelty(RankingMetric):
    """Mean self-information -log2 p of the first k items, in bits; p is the share of the training users who have
    interacted with the item (Zhou et al. 2010, "Solving the Apparent Diversity-Accuracy Dilemma of Recommender
    Systems"). An item without a training user counts as one of a single user.

    Use it together with a ranking metric, to see if a model finds more than what everybody knows.
    """

    kind = "novelty"
    always = False
    slices = ("user",)

    def values(self, rankings: Rankings) -> Shaped[Doubles, "Q"]:
        """Return the mean over each user's items; 0 without any."""
        items = rankings.items
        return rankings.mean_of(np.log2(max(items.n_users, 1) / np.maximum(items.user_counts, 1)))
