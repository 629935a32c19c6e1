"""Defaults of a recipe that depend on the dataset or the device."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, JsonValue

from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.model.towers import TowerConfig
from twotower.model.two_tower import ModelConfig, PairConfig
from twotower.train.losses.softmax import Softmax
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.full import FullCatalogue
from twotower.train.negatives.random import RandomNegatives
from twotower.train.negatives.source import NegativeSource
from twotower.train.negatives.uniform import UniformNegatives
from twotower.train.recipe import Recipe, TrainConfig

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Recipe)
M = TypeVar("M", bound=BaseModel)

MAX_FULL_ITEMS = 20_000
"""Largest catalogue of which every item is a candidate of each positive."""
SAMPLED_ITEMS = 4096
"""Number of items drawn for each batch from a larger catalogue."""
STEPS_OF_EPOCH = 20
"""Minimum number of steps of an epoch."""
MIN_BATCH, MAX_BATCH = 64, 2048
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
MIN_MULTIPLICATIONS = 2**27
"""Multiplications of a step's largest product from which bf16 is used. A smaller one saves little in bf16, and in fp32
a seed gives the same bits on every machine."""
BF16 = {"amx_bf16", "avx512_bf16"}
"""Flags of processors with instructions for products in bf16."""


def batch_of(rows: int, most: int = MAX_BATCH) -> int:
    """Return the largest power of two, from MIN_BATCH to `most`, that cuts `rows` into STEPS_OF_EPOCH batches or
    more."""
    return max(MIN_BATCH, min(most, 1 << math.floor(math.log2(max(1.0, rows / STEPS_OF_EPOCH)))))


def training_rows(dataset: Dataset, recipe: Recipe) -> int:
    """Return the number of training rows of an epoch, without drawn negatives."""
    return len(dataset.train_indices if recipe.loss.pointwise else dataset.positive_indices)


def with_defaults(recipe: R, dataset: Dataset) -> R:
    """Return the recipe with values for the settings that depend on the dataset; a complete recipe is returned as it
    is.

    - Every interaction is a positive, and neither `loss` nor `negatives` is set: without features the model becomes the
      mean of a history (`_history_recipe`), with features the pointwise loss gets random negatives.
    - An empty `train.monitor` becomes the AUC. With a contrastive loss, or if the validation rows with a weight above 0
      have one class, it becomes the recall at the first cut-off.
    - A batch size of 0 becomes that of `batch_of`.
    """
    schema = dataset.schema
    if recipe.loss.pointwise and not schema.has_negatives and not recipe.negatives.pairs:
        given = recipe.model_fields_set | recipe.negatives.model_fields_set
        plain = recipe.negatives.sources == NegativesConfig().sources and not given & {"loss", "random"}
        if plain and schema.has_default_features:
            recipe = _history_recipe(recipe, dataset)
        elif "random" not in recipe.negatives.model_fields_set:
            recipe = _with_random_negatives(recipe, dataset)
    if not recipe.train.monitor:
        labels = dataset.validation.labels
        by_rank = len(labels) and (not recipe.loss.pointwise or labels.all() or not labels.any())
        monitor = f"validation.recall@{recipe.evaluation.k[0]}" if by_rank else "validation.auc"
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"monitor": monitor})})
    if not recipe.train.batch_size:
        if (batch := batch_of(rows := training_rows(dataset, recipe))) < MAX_BATCH and recipe.train.epochs:
            log.info(f"train.batch_size = {batch}: {rows:,} training rows make {-(-rows // batch)} steps an epoch")
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": batch})})
    return recipe


def _history_recipe(recipe: R, dataset: Dataset) -> R:
    """Return the recipe for positives alone: a softmax of the mean embedding of the user's other items against all
    items.

    Values that the recipe sets stay. Towers without layers learn this in few epochs; validation ends them.
    """
    n_items = len(dataset.items)
    source = FullCatalogue() if n_items <= MAX_FULL_ITEMS else UniformNegatives(n=SAMPLED_ITEMS)
    plain = PairConfig(user=TowerConfig(layers=()), item=TowerConfig(layers=()))
    model = _completed(recipe.model, ModelConfig(width=64, pairs=(plain,), similarity="dot"))
    train = _completed(recipe.train, TrainConfig(epochs=30, lr=3e-3, patience=3 if len(dataset.validation) else 0))
    if "epochs" in recipe.train.model_fields_set and "patience" not in recipe.train.model_fields_set:
        train = train.model_copy(update={"patience": 0})
    candidates = "all items" if source.exclusive else f"{source.kind} ones"
    log.info(
        f"every interaction is a positive: loss.kind = 'softmax' against {candidates}, the user's vector is a mean of "
        "the "
        f"user's other items (model.width = {model.width}, train.epochs = {train.epochs}, train.patience = "
        f"{train.patience})"
    )
    return recipe.model_copy(
        update={"loss": Softmax(), "negatives": _with_source(recipe.negatives, source), "model": model, "train": train}
    )


def _completed(given: M, defaults: M) -> M:
    """Return a section with the values that it sets, else those that `defaults` sets."""
    names = defaults.model_fields_set - given.model_fields_set
    return given.model_copy(update={name: getattr(defaults, name) for name in names})


def _with_random_negatives(recipe: R, dataset: Dataset) -> R:
    drawn = RandomNegatives()
    of = " of a weight above 0" if dataset.schema.weighted else ""
    log.info(f"every interaction{of} is a positive: each is trained with random items (negatives.random = {drawn.n})")
    return recipe.model_copy(update={"negatives": _with_source(recipe.negatives, drawn)})


def _with_source(negatives: NegativesConfig, source: NegativeSource) -> NegativesConfig:
    sources = (*negatives.sources, source)
    return negatives.model_validate({"sources": sources, "mask_positives": negatives.mask_positives})


def with_precision(
    recipe: R, dataset: Dataset, device: torch.device, context: DistributedContext, earlier: JsonValue = None
) -> R:
    """Return the recipe with the precision that rank 0 chooses for `train.precision = "auto"`, and log its reason.

    A resumed training keeps its `earlier` precision. All ranks of the group call this.
    """
    if recipe.train.precision != "auto":
        return recipe
    chosen: Precision = "fp32"
    if context.is_main:
        if kept := next((precision for precision in PRECISIONS if precision == earlier), None):
            chosen, reason = kept, "the training that is resumed has it"
        elif (largest := multiplications(recipe, len(dataset.items))) < MIN_MULTIPLICATIONS:
            reason = f"the matrix products of a step are small ({largest / 1e6:,.1f} million multiplications)"
        elif has_bf16(device):
            chosen, reason = "bf16", f"this {device.type} has instructions for matrix products in bf16"
        else:
            reason = f"this {device.type} has no instructions for matrix products in bf16"
        log.info(f"train.precision = '{chosen}': {reason}")
    chosen = context.broadcast(chosen)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": chosen})})


def multiplications(recipe: Recipe, items: int) -> int:
    """Return the multiplications of a step's largest matrix product.

    It is that of a layer, whose input counts as wide as its output, or of positives and candidates.
    """
    pairs, batch = recipe.model.pairs, recipe.train.batch_size
    pairs = pairs if recipe.trained_pairs is None else tuple(pairs[pair] for pair in recipe.trained_pairs)
    layers = [tower.layers or (recipe.model.width,) for pair in pairs for tower in (pair.user, pair.item)]
    widest = max((max(widths) for widths in layers), default=0)
    vector = max((widths[-1] for widths in layers), default=0)
    exclusive = any(source.exclusive for source in recipe.negatives.sources)
    candidates = 0 if recipe.loss.pointwise else items if exclusive else batch
    return batch * max(widest**2, vector * candidates)


def has_bf16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True if a device has instructions for products in bf16; a CPU has those that `cpuinfo` lists."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and cpuinfo.exists() and not BF16.isdisjoint(cpuinfo.read_text().split())
