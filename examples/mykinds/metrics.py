"""Metrics of one's own: recommendations that are not the popular items.

    [evaluation]
    metrics = ["mykinds.metrics:TailShare", "mykinds.metrics:Herfindahl"]

They are measured at every cut-off of evaluation.k and stand in metrics.json, in the report, in the model card and in
comparisons as tail_share@10 and herfindahl@10; `train.monitor = "validation.tail_share@10"` selects the epoch by one.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import CatalogueMetric, RankingMetric


class TailShare(RankingMetric):
    """Share of the first k items that are in the tail (Abdollahpouri et al. 2019, "Managing Popularity Bias in
    Recommender Systems with Personalized Re-ranking")."""

    head: float = Field(
        0.2, gt=0, lt=1, description="Share of the items, the most popular ones, that are not in the tail."
    )

    def values(self, rankings: Rankings) -> Shaped[Doubles, "Q"]:
        """Return the share of each user; 0 without any item."""
        popularity, shown = rankings.items.popularity, rankings.best >= 0
        tail = np.ones(len(popularity), bool)
        tail[np.argsort(-popularity, kind="stable")[: int(self.head * len(popularity))]] = False
        share: Doubles = (tail[rankings.best] & shown).sum(1) / np.maximum(shown.sum(1), 1)
        return share


class Herfindahl(CatalogueMetric):
    """Herfindahl index: the sum of the squares of the items' shares of all places of the rankings. 1 if one item is
    shown alone, 1 / n if n items are shown equally often."""

    higher_is_better = False

    def value(self, rankings: Rankings) -> float:
        """Return the index; NaN if nothing is shown."""
        best = rankings.best
        times: Ints = np.bincount(best[best >= 0])
        return float(np.square(times / times.sum()).sum()) if times.any() else float("nan")
