"""The choice of `train.precision = "auto"`: the faster of two precisions for the matrix products of a training.

A product of a step is that of a layer with its inputs, or of the vectors of the positives with those of their candidates. It is
timed with both its gradients and the conversions that autocast makes. Small products are in fp32 without a measurement: they
take little of a step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import JsonValue
from torch.nn import functional

from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.features.side import SIDES
from twotower.model.tables import blank_tables
from twotower.model.two_tower import TwoTower
from twotower.train.recipe import Recipe

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Recipe)
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

MIN_WORK = 2**27
"""Multiplications of a step's products, without their gradients, below which they are in fp32: a few milliseconds."""
MAX_WORK, MAX_ROWS, MAX_INNER = 2**26, 1024, 2**14
"""Multiplications, rows, and summed columns of a product that is timed: of a larger one, a piece is."""
MAX_TIMED = 3
"""Products that are timed: those with most multiplications."""
ROUNDS = 5
"""Times that each product is timed, of which the first is left out and the fastest counts."""
FASTER = 0.8
"""Share of the seconds in fp32 below which bf16 is chosen: conversions beside the products are not timed."""


class Product(NamedTuple):
    """Product of `rows` x `inner` and `inner` x `columns` numbers."""

    rows: int
    inner: int
    columns: int

    @property
    def work(self) -> int:
        """Number of multiplications."""
        return math.prod(self)

    @property
    def timed(self) -> Product:
        """The product itself, or a piece of it, whose factors take at most 64 MiB."""
        rows, inner = min(self.rows, MAX_ROWS), min(self.inner, MAX_INNER)
        return Product(rows, inner, min(self.columns, max(16, MAX_WORK // (rows * inner))))


Stopwatch = Callable[[Product, Precision, torch.device], float]
"""(product, precision, device) -> seconds of the product and its gradients."""


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
        kept = next((precision for precision in PRECISIONS if precision == earlier), None)
        stays = kept and (kept, "the training that is resumed has it")
        chosen, reason = stays or choose(products(recipe, dataset), device, seconds)
        log.info(f"train.precision = '{chosen}': {reason}")
    chosen = context.broadcast(chosen)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": chosen})})


def products(recipe: Recipe, dataset: Dataset) -> list[Product]:
    """Return the products of a step, those of one shape together, without those of pairs that a step leaves out; none if the
    model cannot be built, which its builder refuses."""
    batch, exclusive = recipe.train.batch_size, any(s.exclusive for s in recipe.negatives.sources)
    candidates = len(dataset.items) if exclusive and not recipe.loss.pointwise else batch
    with torch.device("meta"), blank_tables():
        try:
            model = TwoTower(recipe.model, dataset.encoders.fields("user"), dataset.encoders.fields("item"))
        except RuntimeError:
            return []
    found: dict[tuple[int, int], int] = {}
    for side in SIDES:
        rows = batch if side == "user" else candidates
        for tower in model.towers(side, recipe.trained_pairs):
            tables = (tower.embeddings.tables, *(() if tower.augmented is None else (tower.augmented,)))
            looked_up = {id(p) for t in tables for p in t.parameters()}
            for weight in tower.parameters():
                if weight.ndim == 2 and id(weight) not in looked_up:
                    columns, inner = weight.shape
                    found[inner, columns] = found.get((inner, columns), 0) + rows
    if not recipe.loss.pointwise:
        shape = sum(t.size for t in model.towers("item", recipe.trained_pairs)), candidates
        found[shape] = found.get(shape, 0) + batch
    return [Product(rows, *shape) for shape, rows in found.items()]


def choose(found: list[Product], device: torch.device, stopwatch: Stopwatch) -> tuple[Precision, str]:
    """Return the precision for a step's products, and the reason.

    The precisions take turns, and the fastest of several times counts.
    """
    if device.type not in ("cpu", "cuda"):
        return "fp32", f"bf16 is not measured on {device.type}"
    work = sum(p.work for p in found)
    if work < MIN_WORK:
        return "fp32", f"the matrix products of a step are small ({work / 1e6:,.1f} million multiplications)"
    total = dict.fromkeys(PRECISIONS, 0.0)
    for product in sorted(found, key=lambda p: -p.work)[:MAX_TIMED]:
        timed = product.timed
        times: dict[Precision, list[float]] = {precision: [] for precision in PRECISIONS}
        for _ in range(ROUNDS):
            for precision in PRECISIONS:
                times[precision].append(stopwatch(timed, precision, device))
        for precision in PRECISIONS:
            total[precision] += min(times[precision][1:]) * product.work / timed.work
    fp32, bf16 = (total[precision] * 1e3 for precision in PRECISIONS)
    chosen: Precision = "bf16" if bf16 < FASTER * fp32 else "fp32"
    return chosen, f"the largest matrix products of a step take about {bf16:.3g} ms in bf16 and {fp32:.3g} ms in fp32"


def seconds(product: Product, precision: Precision, device: torch.device) -> float:
    """Return the seconds of a product and its gradients: on a CPU those that this process computes, without those in which
    another one has its cores."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(product.rows, product.inner).to(device).requires_grad_()
        weight = torch.randn(product.columns, product.inner).to(device).requires_grad_()
        gradient = torch.randn(product.rows, product.columns).to(device)
    with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        _wait(device)
        started = clock()
        functional.linear(x, weight).float().backward(gradient)  # type: ignore[no-untyped-call]
        _wait(device)
    return clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
