"""Metric `gini`: the inequality of the items in how often they are shown."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Ints, Shaped
from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import CatalogueMetric


class Gini(CatalogueMetric):
    """Gini coefficient of the numbers of users to whom the items of the catalogue are shown among the first k: 0 if all
    items are shown equally often, near 1 if all users are shown the same few (Fleder and Hosanagar 2009, "Blockbuster
    Culture's Next Rise or Fall").

    Use it together with coverage, which counts an item that is shown once as one that is shown to all.
    """

    kind = "gini"
    always = False
    higher_is_better = False

    def value(self, rankings: Rankings) -> float:
        """Return the coefficient; NaN if nothing is shown."""
        best, n_items = rankings.best, rankings.items.n_items
        times: Shaped[Ints, "I"] = np.sort(np.bincount(best[best >= 0], minlength=n_items))
        if not times.any():
            return float("nan")
        weights = 2 * np.arange(1, n_items + 1) - n_items - 1
        return float((weights * times).sum() / (n_items * times.sum()))
