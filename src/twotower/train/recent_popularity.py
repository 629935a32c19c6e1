"""Recent popularity: the bias of what is popular now, fitted to the validation part."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Float, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.recent_popularity import RecentPopularity
from twotower.data.splits import TEST, VALIDATION
from twotower.distributed import DistributedContext
from twotower.errors import ConfigError
from twotower.evaluation.context_factors import ContextFactors
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.recent_scores import RecentScores
from twotower.features.values import UNKNOWN
from twotower.model.two_tower import TwoTower
from twotower.train.cold_items import spread_of_scores
from twotower.train.starts.search import CLOSE, best_weight

log = logging.getLogger(__name__)

HALF_LIVES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Rows after which one counts half that are tried, in shares of the rows before validation."""
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Weights that are tried: standard deviations of the added scores, in those of a user's scores."""
FIRST_WEIGHTS = (0.3, 1.0)
"""Weights by which the half-lives are compared at first."""
SPREAD_USERS = 256
"""Rankings whose added scores give their standard deviation."""


def recent_scores(model: TwoTower, dataset: Dataset, part: int) -> RecentScores | None:
    """Return what is popular at the times of the rankings of a part; None of a model without recent popularity, or whose weight is 0."""
    if not model.config.recent_popularity or not model.recent_popularity.is_fitted:
        return None
    bias = model.recent_popularity
    held = bias.values.cpu().numpy()[_codes(model, dataset)]
    return RecentScores.of_part(dataset, part, float(bias.half_life), float(bias.weight), held)


def with_popularity_at_end(items: Float[Tensor, "I D"], model: TwoTower, dataset: Dataset) -> Float[Tensor, "I D"]:
    """Return the vectors of all items with the recent popularity at the end of what comes before the test part also of those of an unknown id,
    whose code is not theirs alone; as they are of a model without."""
    if not model.config.recent_popularity or not model.recent_popularity.is_fitted:
        return items
    bias, unknown = model.recent_popularity, _codes(model, dataset) == UNKNOWN
    at_end = RecentPopularity.before(dataset, TEST).at_end(float(bias.half_life)) if unknown.any() else unknown
    items = items.clone()
    items[:, -1] += torch.from_numpy(np.where(unknown, at_end * np.float32(bias.weight), 0)).to(items)
    return items


def check_recent_popularity(dataset: Dataset, stacking: bool) -> None:
    """Raise ConfigError if a log cannot say what is popular now."""
    if dataset.times is None:
        raise ConfigError(
            "model.recent_popularity counts the latest rows of the log, and they have no time; name its column in schema.time, or set "
            "model.recent_popularity = false"
        )
    if not len(dataset.validation):
        raise ConfigError(
            "model.recent_popularity is fitted to the validation part, and the split has none; set model.recent_popularity = false"
        )
    if stacking:
        raise ConfigError(
            "model.stacking weighs the terms of a logit, and model.recent_popularity would be added to it; set one of them to false"
        )


def fit_recent_popularity(
    model: TwoTower,
    dataset: Dataset,
    found: Factors | ContextFactors,
    score: Callable[[Scorer], float],
    context: DistributedContext,
    told: str = "",
) -> None:
    """Overwrite the recent popularity of the model with the one whose validation score is highest. `found` are the scores without it, and `score` a
    validation metric, higher is better; all ranks call it. `told` says by how many users it is measured."""
    bias, nothing = model.recent_popularity, np.zeros(len(dataset.items), np.float32)
    unit = RecentScores.of_part(dataset, VALIDATION, 1.0, 1.0, nothing)
    rows = len(unit.popularity.items)
    half_lives = sorted({max(1.0, round(share * rows)) for share in HALF_LIVES})
    units = {half_life: replace(unit, half_life=half_life) for half_life in half_lives}
    spread = context.broadcast(spread_of_scores(found, dataset) if context.is_main else 0.0)
    scale = {half_life: spread / (_spread(unit, dataset) or np.inf) for half_life, unit in units.items()}
    tried = dict[tuple[float, float], float]()

    def of(weight: float, half_life: float) -> float:
        key = weight, half_life if weight else 0.0
        if key not in tried:
            recent = replace(units[half_life], weight=weight * scale[half_life]) if weight else None
            tried[key] = score(replace(found, recent=recent))
        return tried[key]

    half_life = max(((w, h) for h in half_lives for w in FIRST_WEIGHTS), key=lambda pair: of(*pair))[1]
    weight = best_weight(WEIGHTS, lambda w: of(w, half_life))
    half_life = max(half_lives, key=lambda h: of(weight, h)) if weight else half_life
    gain, plain = of(weight, half_life) - of(0.0, half_life), abs(of(0.0, half_life))
    if gain <= CLOSE * plain:  # no more than chance may give
        weight = 0.0
    added = np.float32(weight * scale[half_life])
    with torch.no_grad():
        values = bias.values.new_zeros(len(bias.values))
        held = added * RecentPopularity.before(dataset, TEST).at_end(half_life)
        values[torch.from_numpy(_codes(model, dataset)).to(values.device)] = torch.from_numpy(held).to(values.device)
        values[UNKNOWN] = 0
        bias.values.copy_(values)
        bias.weight.fill_(float(added))
        bias.half_life.fill_(half_life)
    log.info(
        f"recent popularity: weight {weight:g} in standard deviations of a user's scores, half-life {half_life:,.0f} of {rows:,} rows"
        + ("" if weight else f" (it adds nothing: the best one gains {gain:.4f}, a hundredth or less)")
        + f"; the monitored metric of validation is {abs(of(weight, half_life)):.4f}, without it {abs(of(0.0, half_life)):.4f}{told}"
    )


def _spread(unit: RecentScores, dataset: Dataset) -> float:
    """Return the standard deviation of the added scores over all items, a mean over rankings of the validation part."""
    users = np.unique(dataset.validation.user)
    users = users[np.linspace(0, len(users) - 1, min(len(users), SPREAD_USERS)).astype(int)].astype(np.int64)
    size = max(1, 2**25 // len(dataset.items))
    blocks = [users[start : start + size] for start in range(0, len(users), size)]
    every = [unit.added_to(torch.zeros(len(some), len(dataset.items)), some).std(1) for some in blocks]
    return float(torch.cat(every).double().mean())


def _codes(model: TwoTower, dataset: Dataset) -> Shaped[Ints, "I"]:
    """Return the code of the id of each item."""
    field = model.recent_popularity.field
    assert field is not None
    return np.asarray(dataset.items.columns[field.name]).astype(np.int64)
