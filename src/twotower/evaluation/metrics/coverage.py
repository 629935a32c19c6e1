"""Metric `coverage`: the share of the catalogue that is shown."""

from __future__ import annotations

import numpy as np

from twotower.evaluation.metrics.measured import Rankings
from twotower.evaluation.metrics.metric import CatalogueMetric


class Coverage(CatalogueMetric):
    """Share of the items that are among the first k of at least one user.

    Use it together with a ranking metric, to see if a model recommends the same few items to all.
    """

    kind = "coverage"

    def value(self, rankings: Rankings) -> float:
        """Return the share."""
        n_items = rankings.items.n_items
        covered = np.zeros(n_items + 1, bool)
        covered[rankings.best] = True  # -1 is the last entry
        return float(covered[:-1].sum() / n_items)
