"""Metrics of one's own: recommendations that are not the popular items.

    [evaluation]
    metrics = ["mykinds.metrics:Novelty", "mykinds.metrics:Gini"]

They are measured at every cut-off of evaluation.k and stand in metrics.json, in the report, in the model card and in
comparisons as novelty@10 and gini@10; `train.monitor = "validation.novelty@10"` selects the epoch by one.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import CatalogueMetric, RankingMetric


class Novelty(RankingMetric):
    """Mean self-information -log2 p(i) of the first k items, p the share of the training interactions that are with the item
    (Vargas and Castells 2011, "Rank and Relevance in Novelty and Diversity Metrics", section 4)."""

    smoothing: float = Field(1.0, gt=0, description="Number of interactions added to each item, so that p is not 0.")

    def values(self, rankings: Rankings) -> Shaped[Doubles, "Q"]:
        """Return the mean over each user's items; 0 without any."""
        n = rankings.items.popularity + self.smoothing
        surprise, shown = -np.log2(n / n.sum()), rankings.best >= 0
        mean: Doubles = np.where(shown, surprise[rankings.best], 0.0).sum(1) / np.maximum(shown.sum(1), 1)
        return mean


class Gini(CatalogueMetric):
    """Gini coefficient of the numbers of users to whom the items are shown: 0 if all items are shown equally often, near 1 if
    one item is shown alone (Fleder and Hosanagar 2009)."""

    higher_is_better = False

    def value(self, rankings: Rankings) -> float:
        """Return the coefficient; NaN if nothing is shown."""
        best, n_items = rankings.best, rankings.items.n_items
        times: Ints = np.sort(np.bincount(best[best >= 0], minlength=n_items))
        if not times.any():
            return float("nan")
        weights = 2 * np.arange(1, n_items + 1) - n_items - 1
        return float((weights * times).sum() / (n_items * times.sum()))
