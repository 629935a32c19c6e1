"""Rankings of the cold items, those without a training interaction, among themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twotower.arrays.types import Bools, Float, Ints, Shaped
from twotower.evaluation.config import Metrics
from twotower.evaluation.factors import CatalogueScorer

if TYPE_CHECKING:
    from twotower.evaluation.part_evaluation import PartEvaluation

SLICE, ALONE = "cold_item", "cold_item_alone"
"""Ends of the names of metrics: of cold items among all, and among themselves."""


@dataclass(frozen=True)
class SomeItems(CatalogueScorer):
    """Scores of some items, -inf for all others."""

    every: CatalogueScorer
    rows: Shaped[Bools, "I"]

    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        scores = self.every.catalogue_scores(users, interactions)
        return scores.masked_fill(~torch.from_numpy(self.rows).to(scores.device), -torch.inf)


def among_cold_items(evaluation: PartEvaluation, factors: CatalogueScorer) -> Metrics:
    """Return `recall@10.cold_item_alone`, … at the first cut-off: the metrics sliced by users, of rankings of the cold
    items alone, for the users with a target among them. Empty without such a user."""
    config, queries, k = evaluation.config, evaluation.queries, evaluation.config.k[0]
    rows = evaluation.dataset.item_counts == 0
    queries = queries.take(queries.count_targets(rows) > 0)
    if not len(queries.users):
        return {}
    rankings = queries.rankings(queries.top_k(SomeItems(factors, rows), k), evaluation.rankings.items, config.weighted)
    rankings = queries.among(rankings, rows, config.weighted)
    sliced = [m for m in config.metric_set.of_users if "user" in m.slices]
    return {f"{m.name}@{k}.{ALONE}": float(m.values(rankings).mean()) for m in sliced}
