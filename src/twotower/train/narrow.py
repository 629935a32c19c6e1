"""Narrow vectors: one short pair of vectors that ranks as the wide vectors of all pairs together.

The first maps are the best of their width for the scores of the users: singular vectors of the item vectors in the
metric of the user vectors. A softmax over all items is then fitted to that of the wide scores (Hinton et al. 2015,
"Distilling the Knowledge in a Neural Network"), as the top of a list matters more than its end; with labelled pairs
the squares of the differences of their scores. The temperature of the softmax is the likeliest for what users of the
validation part took.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.arrays.types import F32, F64, Bool, Float, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.errors import TrainingError
from twotower.evaluation.config import Repeats
from twotower.evaluation.factors import Factors
from twotower.features.values import UNKNOWN
from twotower.model.narrow import Narrow
from twotower.model.two_tower import TwoTower
from twotower.scorers.choices import Choices, later_items
from twotower.train.factors import item_codes, newest_factors
from twotower.train.recipe import Recipe
from twotower.train.stopping import at_once

log = logging.getLogger(__name__)

WIDTHS = (64, 128, 256, 512)
"""Widths of which `auto` takes the first that is good enough."""
CURVE = (32, *WIDTHS)
"""Widths whose quality is reported."""
KEPT = 0.98
"""Share of the monitored metric of the wide vectors that `auto` keeps."""
HOPEFUL = 0.85
"""Share that a projection keeps of the metric, below which `auto` tries no fit: a fit gains up to a tenth."""
STEPS, BATCH, RATE = 400, 256, 0.03
"""Steps of a fit, users of a step, and its first learning rate, relative to the root mean square of what is learned."""
PAIRS = 32 * BATCH
"""Labelled pairs of a step."""
MAX_ITEMS = 16_384
"""Items of a step at most; more are drawn."""
TEMPERATURES = 2.0 ** np.arange(-6, 0.5, 0.5)
"""Temperatures that are tried, in standard deviations of the scores that are compared: a flatter softmax has no top."""
SOME_USERS = 256
"""Users whose scores have a standard deviation."""
SMALLEST = 1e-7
"""Share of the largest variance below which a direction of vectors is left out."""


@dataclass(frozen=True)
class Maps:
    """Narrow vectors: `user_map` of the wide user vectors, and the vectors of all items."""

    user_map: F32[Tensor, "W k"]
    items: F32[Tensor, "I k"]

    @property
    def width(self) -> int:
        return self.user_map.shape[1]

    def first(self, width: int) -> Maps:
        return Maps(self.user_map[:, :width], self.items[:, :width])


@dataclass(frozen=True)
class Wide:
    """Wide vectors of all users and items, of the newest versions, and what they were trained on."""

    vectors: Factors
    dataset: Dataset
    biases: int
    """Columns of biases, at the end of both vectors, which stay as they are."""
    labelled: bool
    """True if the scores of labelled pairs are fitted, not rankings."""
    seed: int
    repeats: Repeats
    """Items of rankings, as in an evaluation."""
    temperature: float = 1.0
    max_items: int = MAX_ITEMS

    @property
    def width(self) -> int:
        return self.vectors.items.shape[1]

    @cached_property
    def users(self) -> F32[Tensor, "U W"]:
        return self.vectors.users[:, : self.width - self.biases].float()

    @cached_property
    def items(self) -> F32[Tensor, "I W"]:
        return self.vectors.items[:, : self.width - self.biases].float() - self.centre

    @cached_property
    def centre(self) -> F32[Tensor, "W"]:
        """Mean of the vectors of the items of training, which `items` lack: it adds the same to all scores of a user,
        and may be much larger than what tells items apart. Zeros for labelled pairs, whose scores count."""
        items = self.vectors.items[:, : self.width - self.biases]
        known = torch.from_numpy(np.flatnonzero(~later_items(self.dataset)))
        total = torch.zeros(items.shape[1], dtype=torch.float64, device=items.device)
        for rows in () if self.labelled else torch.split(known.to(items.device), 2**14):
            total += items[rows].double().sum(0)
        return (total / max(1, len(known))).float()

    @cached_property
    def active(self) -> Shaped[Ints, "u"]:
        """Users with training interactions."""
        return np.flatnonzero(self.dataset.seen_items.lengths)

    @cached_property
    def gram(self) -> F64[Tensor, "W W"]:
        """Mean of the products of the columns of the vectors of users with training interactions."""
        total = torch.zeros(self.users.shape[1], self.users.shape[1], dtype=torch.float64)
        for rows in torch.split(torch.from_numpy(self.active), 2**14):
            some = self.users[rows].cpu().double()
            total += some.T @ some
        return total / max(1, len(self.active))

    @cached_property
    def projection(self) -> Maps:
        """The best maps of every width up to the number of directions of the scores: their first columns."""
        unit = self.gram.diagonal().sqrt()  # of each column, as pairs of towers have different ones
        items = self.items.cpu().double()
        parts = unit.square() * items.square().mean(0)  # of the variance of the scores
        unit = unit.where(parts > SMALLEST * parts.max(), 0.0)  # a column of rounding error has no direction
        each = unit.reciprocal().where(unit > 0, 0.0)
        sizes, directions = _directions(self.gram * each[:, None] * each)
        items = items * unit @ (directions * sizes.sqrt())
        lengths, turn = _directions(items.T @ items / len(items))
        size = lengths**0.25  # makes both sides of one size
        back = directions / sizes.sqrt() * each[:, None]
        return Maps((back @ turn * size).float(), (items @ turn / size).float())

    def fit(self, width: int) -> Maps:
        """Return maps of a width whose scores come near the wide ones; without rows of items the projection."""
        start, rng = self.projection.first(width), np.random.default_rng(self.seed)
        if self.dataset.schema.id_feature("item") is None:
            return start
        # Users are whitened, so that one learning rate suits all their numbers.
        whole = self.projection.user_map.double()
        scale = ((self.gram @ whole) * whole).sum(0).sqrt().clamp(min=1e-12).float()
        white, items = self.projection.user_map / scale, self.projection.items * scale
        turn = torch.eye(len(scale))[:, :width].clone().requires_grad_()
        rows = (start.items * scale[:width]).clone().requires_grad_()
        optimizer = torch.optim.Adam(
            [
                {"params": [turn], "lr": RATE / math.sqrt(len(scale))},
                {"params": [rows], "lr": RATE * float(rows.detach().square().mean().sqrt())},
            ],
            betas=(0.9, 0.99),
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        loss_of = self._loss_of_pairs if self.labelled else self._loss_of_lists
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(white, items, turn, rows, rng).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return Maps(white @ turn.detach(), rows.detach())

    def _loss_of_lists(
        self, white: F32[Tensor, "W r"], items: F32[Tensor, "I r"], turn: F32[Tensor, "r k"], rows: F32[Tensor, "I k"],
        rng: np.random.Generator,
    ) -> F32[Tensor, ""]:  # fmt: skip
        """Return the cross-entropy of the lists of some users by the narrow scores, to those by the wide ones."""
        drawn = np.sort(rng.choice(self.active, min(BATCH, len(self.active)), replace=False))
        some = np.flatnonzero(~later_items(self.dataset))
        if len(some) > self.max_items:
            some = np.sort(rng.choice(some, self.max_items, replace=False))
        items, rows = items[torch.from_numpy(some)], rows[torch.from_numpy(some)]
        vectors, bias = self.users[torch.from_numpy(drawn)].cpu() @ white, self._biases[torch.from_numpy(some)]
        taken = None if self.repeats == "allow" else self._taken(drawn, some)
        out = ~taken if taken is not None and self.repeats == "only" else taken
        wide, narrow = (
            _masked((scores + bias) / self.temperature, out) for scores in (vectors @ items.T, vectors @ turn @ rows.T)
        )
        return F.cross_entropy(narrow, wide.softmax(1))

    def _loss_of_pairs(
        self, white: F32[Tensor, "W r"], items: F32[Tensor, "I r"], turn: F32[Tensor, "r k"], rows: F32[Tensor, "I k"],
        rng: np.random.Generator,
    ) -> F32[Tensor, ""]:  # fmt: skip
        """Return the mean square of the differences of the scores of some training pairs."""
        train = self.dataset.train
        drawn = rng.integers(len(train), size=PAIRS)
        user, item = (torch.from_numpy(side[drawn].astype(np.int64)) for side in (train.user, train.item))
        vectors = self.users[user].cpu() @ white
        wide, narrow = (vectors * items[item]).sum(1), (vectors @ turn * rows[item]).sum(1)
        return (wide - narrow).square().mean()

    @cached_property
    def _biases(self) -> F32[Tensor, "I"]:
        """The biases of the items, 0 without columns of biases."""
        return self.vectors.items[:, -1].cpu().float() if self.biases else torch.zeros(len(self.items))

    def _taken(self, users: Shaped[Ints, "B"], items: Shaped[Ints, "I"]) -> Bool[Tensor, "B I"]:
        """Return True for the items of the histories of some users."""
        seen = self.dataset.seen_items.take(users)
        place = np.full(len(self.items), -1)
        place[items] = np.arange(len(items))
        rows, columns = seen.owners, place[seen.values]
        out = torch.zeros(len(users), len(items), dtype=torch.bool)
        out[torch.from_numpy(rows[columns >= 0]), torch.from_numpy(columns[columns >= 0])] = True
        return out

    def layer(self, maps: Maps) -> Narrow:
        """Return the last layer of a model of these wide vectors. The map of the items is the best one for new items:
        its products with the narrow vectors of users differ least from the wide ones."""
        gram, user_map = self.gram, maps.user_map.cpu().double()
        inner = user_map.T @ gram @ user_map
        item_map = torch.linalg.lstsq(inner, user_map.T @ gram, driver="gelsd").solution.T.float()
        fields = self.dataset.encoders.fields("item")
        feature = self.dataset.schema.id_feature("item")
        rows = torch.zeros(0, maps.width)
        if feature is not None:
            codes = item_codes(self.dataset.items, self.dataset.schema)
            rows = torch.zeros(next(f.rows for f in fields if f.name == feature.name), maps.width)
            known = torch.from_numpy(codes != UNKNOWN)
            rows[torch.from_numpy(codes)[known]] = (maps.items - self.items.cpu() @ item_map)[known]
        return Narrow(maps.user_map, item_map, rows, self.centre, fields).to(self.vectors.items.device)


class Narrowing:
    """Adds the narrow layer to a model, on all ranks."""

    def __init__(self, model: TwoTower, dataset: Dataset, recipe: Recipe, context: DistributedContext) -> None:
        self.model, self.dataset, self.recipe, self.context = model, dataset, recipe, context
        self.temperature, self.is_fitted = 1.0, True
        """Temperature of the softmax, and False if the projection is better than a fit."""

    def add(
        self, every: Factors, measure: Callable[[Factors], float] | None
    ) -> tuple[Factors | None, dict[str, float]]:
        """Add the layer of the width that is given or that is enough. Return the narrow vectors of the wide ones of all
        rows `by_version`, None where these stay, and what was measured.

        `measure` returns the score of vectors on validation, higher is better; None: there is no validation."""
        config = self.recipe
        self.temperature = temperature(every, Choices.of(self.dataset, config.train.seed, config.evaluation.repeats))
        wide = self._wide(newest_factors(every, self.dataset), self.dataset)

        def measured(layer: Narrow | None) -> float:
            assert measure is not None
            return measure(narrowed(every, layer, self.dataset, wide.biases) if layer else every)

        given = (config.narrow.width, self._fit, measured if measure else None, config.train.monitor)
        found, self.is_fitted, curve = choose(wide, *given)
        self.model.narrow = found
        return narrowed(every, found, self.dataset, wide.biases) if found and measure else None, curve

    def add_again(self, newest: Factors, dataset: Dataset, width: int) -> None:
        """Add a layer of this width, without the columns of biases, as before of other vectors: of the newest versions,
        with the train part of another dataset."""
        wide = self._wide(newest, dataset)
        self.model.narrow = self._fit(wide, width) if self.is_fitted else wide.layer(wide.projection.first(width))

    def _wide(self, newest: Factors, dataset: Dataset) -> Wide:
        config, biases = self.recipe, 2 * self.model.bias_columns
        seed, repeats = config.train.seed, config.evaluation.repeats
        return Wide(newest, dataset, biases, config.loss.pointwise, seed, repeats, self.temperature)

    def _fit(self, wide: Wide, width: int) -> Narrow:
        maps = None
        if self.context.is_main:
            with at_once():
                maps = wide.fit(width)
        maps = self.context.broadcast(maps)
        assert maps is not None
        if not (maps.items.isfinite().all() and maps.user_map.isfinite().all()):
            raise TrainingError("narrow vectors are not finite; set narrow.width = 0, and see whether the scores are")
        return wide.layer(maps)


def choose(
    wide: Wide, width: int | Literal["auto"], fit: Callable[[Wide, int], Narrow],
    measure: Callable[[Narrow | None], float] | None, monitor: str,
) -> tuple[Narrow | None, bool, dict[str, float]]:  # fmt: skip
    """Return the layer of a width, None where the wide vectors stay, whether it is better than the projection, and the
    scores by width as `narrow.…`.

    For `auto` it is the first of WIDTHS that keeps KEPT of the score of the wide vectors. `fit` returns the layer of a
    width without biases. `measure` returns the score of a layer, or of the wide vectors, on validation."""
    if width != "auto" and width >= wide.width:
        log.warning(f"narrow.width = {width} is lowered to {wide.width}, the numbers of the vectors of all pairs")
        return None, False, {}
    most = min(wide.width, wide.projection.width + wide.biases)
    if width != "auto" and width > most:
        log.warning(f"narrow.width = {width} is lowered to {most}, as the scores have no more directions")
        width = most
    if measure is None:
        assert width != "auto"
        return fit(wide, width - wide.biases), True, {}

    def projected(n: int) -> Narrow:
        return wide.layer(wide.projection.first(n - wide.biases))

    whole, layer, is_fitted = measure(None), None, False
    scores = {n: measure(projected(n)) for n in CURVE if n <= most and n < wide.width}
    curve = {f"{n}.projected": score for n, score in scores.items()} | {str(wide.width): whole}
    tried = [width] if width != "auto" else sorted({min(n, most) for n in WIDTHS if min(n, most) < wide.width})
    for n in tried:
        if n != tried[-1] and not _keeps(scores[n], whole, HOPEFUL):
            continue
        layer, is_fitted = fit(wide, n - wide.biases), True
        curve[str(n)] = measure(layer)
        if n in scores and scores[n] > curve[str(n)]:
            layer, is_fitted, curve[str(n)] = projected(n), False, scores[n]
        if _keeps(curve[str(n)], whole, KEPT):
            break
    else:
        if width == "auto" and wide.width <= WIDTHS[-1]:
            layer = None
        elif width == "auto":
            log.warning(f"no width up to {WIDTHS[-1]} keeps {KEPT:.0%} of {monitor}; the largest is taken")
    shown = ", ".join(f"{n} {abs(score):.4f}" for n, score in curve.items())
    log.info(f"vectors of {layer.width + wide.biases if layer else wide.width} numbers: {monitor} by width: {shown}")
    return layer, is_fitted, {f"narrow.{n}": abs(score) for n, score in curve.items()}


def _keeps(score: float, whole: float, share: float) -> bool:
    """Return True if a score, higher is better and negative where a metric is to be low, has a share of the whole."""
    return score >= (whole * share if whole > 0 else whole / share)


def narrowed(every: Factors, layer: Narrow, dataset: Dataset, biases: int) -> Factors:
    """Return the narrow vectors of wide ones, of all rows `by_version`."""
    users, items = (vectors[:, : vectors.shape[1] - biases] for vectors in (every.users, every.items))
    items = (items - layer.centre) @ layer.item_map
    if len(layer.rows):
        items = items + layer.rows[torch.from_numpy(item_codes(dataset.items.by_version(), dataset.schema))]
    sides = (users @ layer.user_map, every.users), (items, every.items)
    users, items = (torch.cat([short, wide[:, wide.shape[1] - biases :]], 1) for short, wide in sides)
    return replace(every, users=users, items=items)


def temperature(wide: Factors, choices: Choices | None) -> float:
    """Return the temperature of the wide scores by which the items that users took are the likeliest; without choices
    a quarter of the standard deviation of the scores of some users."""
    if choices is None:
        return float((wide.users[:SOME_USERS] @ wide.items.T).float().std()) / 4 or 1.0
    scores, offsets = choices.scores(wide).double(), torch.from_numpy(choices.offsets).double()
    compared = torch.isfinite(offsets)
    unit = float(scores[compared].std()) or 1.0

    def loss(one: float) -> float:
        return float(((scores / one + offsets).logsumexp(1) - scores[:, 0] / one).mean())

    return min((unit * float(factor) for factor in TEMPERATURES), key=loss)


def _directions(gram: F64[Tensor, "W W"]) -> tuple[F64[Tensor, "r"], F64[Tensor, "W r"]]:
    """Return the eigenvalues that are not negligible, from the largest, and their eigenvectors; at least one."""
    sizes, directions = (x.flip(-1) for x in torch.linalg.eigh(gram))
    kept = int((sizes > SMALLEST * sizes[0]).sum()) or 1
    return sizes[:kept].clamp(min=1e-30), directions[:, :kept]


def _masked(scores: Float[Tensor, "B I"], out: Bool[Tensor, "B I"] | None) -> Float[Tensor, "B I"]:
    """Return scores that are low where an item is left out; minus infinity has no cross-entropy."""
    return scores if out is None else scores.masked_fill(out, -1e9)
