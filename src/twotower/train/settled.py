"""Settings that a recipe leaves to the data."""

from __future__ import annotations

import logging
from typing import TypeVar

from twotower.data.dataset import Dataset
from twotower.train.negatives.random import RandomNegatives
from twotower.train.recipe import Recipe

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Recipe)


def settled(recipe: R, dataset: Dataset) -> R:
    """Return the recipe with values for what it leaves to the data; a recipe that leaves nothing is returned as it is.

    A pointwise loss gets random negatives where the schema knows no negatives, no source gives pairs and `negatives.random`
    is not given. An empty `train.monitor` becomes the AUC, or the recall at the first cut-off where the validation rows of a
    weight above 0 are of one class.
    """
    if (
        recipe.loss.pointwise
        and not dataset.schema.has_negatives
        and not recipe.negatives.pairs
        and "random" not in recipe.negatives.model_fields_set
    ):
        drawn = RandomNegatives()
        of = " of a weight above 0" if dataset.schema.weighted else ""
        log.info(
            f"every interaction{of} is a positive: each is trained beside random items (negatives.random = {drawn.n})"
        )
        sources = (*recipe.negatives.sources, drawn)
        negatives = recipe.negatives.model_validate(
            {"sources": sources, "mask_positives": recipe.negatives.mask_positives}
        )
        recipe = recipe.model_copy(update={"negatives": negatives})
    if not recipe.train.monitor:
        labels = dataset.validation.labels
        by_rank = len(labels) and (labels.all() or not labels.any())
        monitor = f"validation.recall@{recipe.evaluation.k[0]}" if by_rank else "validation.auc"
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"monitor": monitor})})
    return recipe
