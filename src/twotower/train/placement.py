"""Model of a training, with its embedding tables whole on every rank or sharded."""

from __future__ import annotations

import torch

from twotower.distributed import DistributedContext
from twotower.errors import ConfigError
from twotower.features.encoders import Encoders
from twotower.features.field import InputField
from twotower.features.side import SIDES
from twotower.machine import physical_memory
from twotower.model.lowering import MAX_TABLE_BYTES
from twotower.model.tables import blank_tables, deferred_tables
from twotower.model.two_tower import TwoTower
from twotower.train.recipe import Recipe
from twotower.train.torchrec.embeddings import TorchRecEmbeddings


def build_model(
    recipe: Recipe, encoders: Encoders, context: DistributedContext, device: torch.device
) -> tuple[TwoTower, TorchRecEmbeddings | None]:
    """Build a model with the initial weights of `train.seed` on a device, and the shards of its tables, if they are sharded.

    Raises ConfigError if the machine cannot hold it.
    """
    user_fields, item_fields = encoders.fields("user"), encoders.fields("item")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        if recipe.train.embedding_placement == "torchrec":
            with deferred_tables():
                model = TwoTower(recipe.model, user_fields, item_fields)
            return model, TorchRecEmbeddings(model, recipe, context, device)
        _check_size(recipe, user_fields, item_fields)
        return TwoTower(recipe.model, user_fields, item_fields).to(device), None


def _check_size(recipe: Recipe, user_fields: tuple[InputField, ...], item_fields: tuple[InputField, ...]) -> None:
    """Raise ConfigError if the weights and their gradients take more bytes than the machine's memory, or a tower more
    than a published file may have."""
    with torch.device("meta"), blank_tables():  # tensors with shapes and without numbers
        try:
            model = TwoTower(recipe.model, user_fields, item_fields)
        except RuntimeError as e:  # a weight has more numbers than torch can count
            raise ConfigError(f"the model cannot be built ({str(e).splitlines()[0]}); {_HOW_TO_SHRINK}") from None
    weights = dict(model.named_parameters())
    need = 2 * sum(w.numel() * w.element_size() for w in weights.values())
    have = physical_memory()
    name, largest = max(weights.items(), key=lambda named: named[1].numel())
    advice = f"(the largest: {name}, {' x '.join(f'{n:,}' for n in largest.shape)}); {_HOW_TO_SHRINK}"
    if need > have:
        raise ConfigError(
            f"the model's weights and gradients take {need / 1e9:,.0f} GB and this machine has {have / 1e9:,.0f} GB of "
            f"memory {advice}"
        )
    for side in SIDES:
        if (size := model.exported_bytes(side)) > MAX_TABLE_BYTES:
            raise ConfigError(
                f"the {side} tower reads weights of {size / 1e6:,.0f} MB, and a published tower has at most "
                f"{MAX_TABLE_BYTES / 1e6:,.0f} MB {advice}"
            )


_HOW_TO_SHRINK = "lower hash_buckets, max_grams, max_length, width or layers, or raise min_count"
