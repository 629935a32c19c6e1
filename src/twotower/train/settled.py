"""Settings that a recipe leaves to the data."""

from __future__ import annotations

import logging
import math
from typing import TypeVar

from pydantic import BaseModel

from twotower.data.dataset import Dataset
from twotower.model.towers import TowerConfig
from twotower.model.two_tower import ModelConfig, PairConfig
from twotower.train.losses.softmax import Softmax
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.full import FullCatalogue
from twotower.train.negatives.random import RandomNegatives
from twotower.train.negatives.uniform import UniformNegatives
from twotower.train.recipe import Recipe, TrainConfig

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Recipe)
M = TypeVar("M", bound=BaseModel)

MAX_FULL_ITEMS = 20_000
"""Items up to which all of them are candidates of each positive."""
SAMPLED_ITEMS = 4096
"""Items drawn for each batch of a larger catalogue."""
STEPS_OF_EPOCH = 20
"""Steps that an epoch has at least."""
MIN_BATCH, MAX_BATCH = 64, 2048


def batch_of(rows: int, most: int = MAX_BATCH) -> int:
    """Return the largest power of two of which so many rows make STEPS_OF_EPOCH batches, from MIN_BATCH to `most`."""
    return max(MIN_BATCH, min(most, 1 << math.floor(math.log2(max(1.0, rows / STEPS_OF_EPOCH)))))


def training_rows(dataset: Dataset, recipe: Recipe) -> int:
    """Return the number of training rows of an epoch, without negatives that are drawn."""
    return len(dataset.train_indices if recipe.loss.pointwise else dataset.positive_indices)


def settled(recipe: R, dataset: Dataset) -> R:
    """Return the recipe with values for what it leaves to the data; a recipe that leaves nothing is returned as it is.

    Where every interaction is a positive and neither `loss` nor `negatives` is given: a schema without features gets the model of a
    history (`_of_clicks`), and another one random negatives for the pointwise loss. An empty `train.monitor` becomes the AUC, or
    the recall at the first cut-off where the loss ranks candidates, or the validation rows of a weight above 0 are of
    one class. A batch size of 0 becomes the one of `batch_of`.
    """
    schema = dataset.schema
    if recipe.loss.pointwise and not schema.has_negatives and not recipe.negatives.pairs:
        given = recipe.model_fields_set | recipe.negatives.model_fields_set
        plain = recipe.negatives.sources == NegativesConfig().sources and not given & {"loss", "random"}
        if plain and schema.has_default_features:
            recipe = _of_clicks(recipe, dataset)
        elif "random" not in recipe.negatives.model_fields_set:
            recipe = _with_random_negatives(recipe, dataset)
    if not recipe.train.monitor:
        labels = dataset.validation.labels
        by_rank = len(labels) and (not recipe.loss.pointwise or labels.all() or not labels.any())
        monitor = f"validation.recall@{recipe.evaluation.k[0]}" if by_rank else "validation.auc"
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"monitor": monitor})})
    if not recipe.train.batch_size:
        if (batch := batch_of(rows := training_rows(dataset, recipe))) < MAX_BATCH and recipe.train.epochs:
            log.info(
                f"train.batch_size = {batch}, by which {rows:,} training rows make {-(-rows // batch)} steps an epoch"
            )
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": batch})})
    return recipe


def _of_clicks(recipe: R, dataset: Dataset) -> R:
    """Return the recipe for positives alone: the mean of the embeddings of the user's other items against those of all items, by a
    softmax. What the recipe gives stays. Towers without layers learn it in a few epochs, which validation counts."""
    n_items = len(dataset.items)
    source = FullCatalogue() if n_items <= MAX_FULL_ITEMS else UniformNegatives(n=SAMPLED_ITEMS)
    negatives = recipe.negatives.model_validate(
        {"sources": (*recipe.negatives.sources, source), "mask_positives": recipe.negatives.mask_positives}
    )
    plain = PairConfig(user=TowerConfig(layers=()), item=TowerConfig(layers=()))
    model = _completed(recipe.model, ModelConfig(width=64, pairs=(plain,), similarity="dot"))
    train = _completed(recipe.train, TrainConfig(epochs=30, lr=3e-3, patience=3 if len(dataset.validation) else 0))
    if "epochs" in recipe.train.model_fields_set and "patience" not in recipe.train.model_fields_set:
        train = train.model_copy(update={"patience": 0})
    candidates = "all items" if source.exclusive else f"{source.kind} ones"
    log.info(
        f"every interaction is a positive: loss.kind = 'softmax' against {candidates}, the user's vector is a mean of the user's other "
        f"items (model.width = {model.width}, train.epochs = {train.epochs}, train.patience = {train.patience})"
    )
    return recipe.model_copy(update={"loss": Softmax(), "negatives": negatives, "model": model, "train": train})


def _completed(given: M, defaults: M) -> M:
    """Return a section with the values that are given, and those of `defaults` for the others that `defaults` names."""
    names = defaults.model_fields_set - given.model_fields_set
    return given.model_copy(update={name: getattr(defaults, name) for name in names})


def _with_random_negatives(recipe: R, dataset: Dataset) -> R:
    drawn = RandomNegatives()
    of = " of a weight above 0" if dataset.schema.weighted else ""
    log.info(f"every interaction{of} is a positive: each is trained beside random items (negatives.random = {drawn.n})")
    sources = (*recipe.negatives.sources, drawn)
    negatives = recipe.negatives.model_validate({"sources": sources, "mask_positives": recipe.negatives.mask_positives})
    return recipe.model_copy(update={"negatives": negatives})
