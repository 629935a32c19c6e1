"""The choice of `train.precision = "auto"`: bf16 for large matrix products on a device that has instructions for them, else fp32."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import JsonValue

from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.train.recipe import Recipe

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Recipe)
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

MIN_WORK = 2**27
"""Multiplications of a step's largest product below which it is in fp32: there is little to save, and a fixed seed gives the same bits."""
BF16 = {"amx_bf16", "avx512_bf16"}
"""Flags of processors whose products in bf16 are faster; others emulate them."""


def with_precision(
    recipe: R, dataset: Dataset, device: torch.device, context: DistributedContext, earlier: JsonValue = None
) -> R:
    """Return the recipe with the precision that rank 0 chooses for `train.precision = "auto"`; another is returned as it is.

    `earlier` is the precision of the training that is resumed, which stays. All ranks of the group call this. The choice and
    its reason are logged.
    """
    if recipe.train.precision != "auto":
        return recipe
    chosen: Precision = "fp32"
    if context.is_main:
        if kept := next((precision for precision in PRECISIONS if precision == earlier), None):
            chosen, reason = kept, "the training that is resumed has it"
        elif (largest := work(recipe, len(dataset.items))) < MIN_WORK:
            reason = f"the matrix products of a step are small ({largest / 1e6:,.1f} million multiplications)"
        elif has_bf16(device):
            chosen, reason = "bf16", f"this {device.type} has instructions for matrix products in bf16"
        else:
            reason = f"this {device.type} has no instructions for matrix products in bf16"
        log.info(f"train.precision = '{chosen}': {reason}")
    chosen = context.broadcast(chosen)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": chosen})})


def work(recipe: Recipe, items: int) -> int:
    """Return the multiplications of a step's largest product: a layer with its input as wide, or positives with their candidates."""
    pairs, batch = recipe.model.pairs, recipe.train.batch_size
    pairs = pairs if recipe.trained_pairs is None else tuple(pairs[pair] for pair in recipe.trained_pairs)
    layers = [tower.layers or (recipe.model.width,) for pair in pairs for tower in (pair.user, pair.item)]
    widest, vector = (
        max((max(widths) for widths in layers), default=0),
        max((widths[-1] for widths in layers), default=0),
    )
    exclusive = any(source.exclusive for source in recipe.negatives.sources)
    candidates = 0 if recipe.loss.pointwise else items if exclusive else batch
    return batch * max(widest**2, vector * candidates)


def has_bf16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True if a device has instructions for matrix products in bf16; for a CPU, if its system lists them in `cpuinfo`."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and cpuinfo.exists() and not BF16.isdisjoint(cpuinfo.read_text().split())
