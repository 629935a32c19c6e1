"""The model of a training at its start, within the memory of the machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from twotower.distributed import DistributedContext
from twotower.errors import ConfigError
from twotower.features.encoders import Encoders
from twotower.features.side import SIDES
from twotower.machine import physical_memory
from twotower.model.lowering import MAX_TABLE_BYTES
from twotower.model.tables import blank_tables, deferred_tables
from twotower.model.two_tower import TwoTower
from twotower.train.recipe import Recipe
from twotower.train.torchrec.embeddings import TorchRecEmbeddings

_HOW_TO_SHRINK = "lower hash_buckets, max_grams, max_length, width or layers, or raise min_count"


def build_model(
    recipe: Recipe, encoders: Encoders, context: DistributedContext, device: torch.device
) -> tuple[TwoTower, TorchRecEmbeddings | None]:
    """Build a model on a device with the initial weights of `train.seed`, and the shards of its tables, if sharded.

    Raises ConfigError if the model needs more memory than the machine has.
    """
    fields = encoders.fields("user"), encoders.fields("item")

    def build() -> TwoTower:
        return TwoTower(recipe.model, *fields, recipe.terms_for(*fields))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        if recipe.train.embedding_placement == "torchrec":
            with deferred_tables():
                model = build()
            return model, TorchRecEmbeddings(model, recipe, context, device)
        _check_size(build)
        return build().to(device), None


def _check_size(build: Callable[[], TwoTower]) -> None:
    """Raise ConfigError if weights and gradients exceed the machine's memory, or a tower the size of a published
    file."""
    with torch.device("meta"), blank_tables():  # tensors without numbers
        try:
            model = build()
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
