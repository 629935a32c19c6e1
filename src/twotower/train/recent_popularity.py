"""Recent popularity: the bias of what is popular now, fitted to the validation part."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.recent_popularity import PopularityTerms, RecentPopularity
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
SIGNED_WEIGHTS = (-3.0, -1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0, 3.0)
"""Weights of the count by all rows and of the age that are tried: an item that was popular long ago may be past, and a
new one rise."""
SPREAD_USERS = 256
"""Rankings whose added scores give their standard deviation."""


def recent_scores(model: TwoTower, dataset: Dataset, part: int) -> RecentScores | None:
    """Return what is popular at the times of the rankings of a part; None of a model without recent popularity, or
    whose weight is 0."""
    if not model.config.recent_popularity or not model.recent_popularity.is_fitted:
        return None
    bias, codes = model.recent_popularity, _codes(model, dataset)
    found = RecentScores.of_part(dataset, part, bias.terms, bias.values.cpu().numpy()[codes])
    return replace(found, cold=_bias_of_cold(model, codes))


def with_popularity_at_end(items: Float[Tensor, "I D"], model: TwoTower, dataset: Dataset) -> Float[Tensor, "I D"]:
    """Return the vectors of all items with the recent popularity at the end of what comes before the test part also of
    those of an unknown id, whose code is not theirs alone, in place of the bias of cold items where they have a row; as
    they are of a model without."""
    if not model.config.recent_popularity or not model.recent_popularity.is_fitted:
        return items
    bias, unknown = model.recent_popularity, _codes(model, dataset) == UNKNOWN
    if unknown.any():
        known = RecentPopularity.before(dataset, TEST)
        own = known.scores_at_end(bias.terms) - float(bias.values[UNKNOWN])
        if (cold := _bias_of_cold(model, _codes(model, dataset))) is not None:
            own -= cold * known.have_rows_at_end
        items = items.clone()
        items[:, -1] += torch.from_numpy(np.where(unknown, own, 0)).to(items)
    return items


def _bias_of_cold(model: TwoTower, codes: Shaped[Ints, "I"]) -> Shaped[Floats, "I"] | None:
    """Return the bias of items of an unknown id, 0 of others; None of a model without, or if it is 0."""
    bias = float(model.cold_items.values[UNKNOWN]) if model.config.cold_item_bias else 0.0
    return np.where(codes == UNKNOWN, np.float32(bias), np.float32(0)) if bias else None


def check_recent_popularity(dataset: Dataset, stacking: bool) -> None:
    """Raise ConfigError if a log cannot say what is popular now."""
    if dataset.times is None:
        raise ConfigError(
            "model.recent_popularity counts the latest rows of the log, and they have no time; name its column in "
            "schema.time, or set model.recent_popularity = false"
        )
    if not len(dataset.validation):
        raise ConfigError(
            "model.recent_popularity is fitted to the validation part, and the split has none; set "
            "model.recent_popularity = false"
        )
    if stacking:
        raise ConfigError(
            "model.stacking weighs the terms of a logit, and model.recent_popularity would be added to it; set one of "
            "them to false"
        )


Chance = Callable[[Scorer, Scorer], float]
"""By how much one scorer may be better than another by chance."""


@dataclass(frozen=True)
class PopularityFit:
    """Terms of the recent popularity that is best in addition to some scores."""

    terms: PopularityTerms
    """The weight of the latest rows is 0 if nothing is better than nothing by more than chance may give."""
    score: float
    """Validation score by the best terms; higher is better."""
    score_without: float
    spread: float
    """Standard deviation of a user's scores without them."""


def popularity_beside(
    dataset: Dataset,
    found: Factors | ContextFactors,
    score: Callable[[Scorer], float],
    context: DistributedContext,
    chance: Chance,
) -> RecentScores | None:
    """Return what is popular at the times of the validation part by the terms that are best in addition to scores; None
    if it adds nothing."""
    fit = best_terms(dataset, found, score, context, chance)
    held = np.zeros(len(dataset.items), np.float32)
    return RecentScores.of_part(dataset, VALIDATION, fit.terms, held) if fit.terms.recent else None


def fit_recent_popularity(
    model: TwoTower,
    dataset: Dataset,
    found: Factors | ContextFactors,
    score: Callable[[Scorer], float],
    context: DistributedContext,
    chance: Chance,
    told: str = "",
) -> None:
    """Overwrite the recent popularity of the model with the one whose validation score is highest. `found` are the
    scores without it, and `score` a validation metric, higher is better; all ranks call it. `told` says by how many
    users it is measured."""
    fit = best_terms(dataset, found, score, context, chance)
    hold_popularity(model, dataset, fit.terms)
    terms, without = fit.terms, abs(fit.score_without)
    if not terms.recent:
        log.info(
            "recent popularity adds nothing: by its best weight the monitored metric of validation changes by "
            f"{fit.score - fit.score_without:.4f} from {without:.4f}{told}"
        )
        return
    log.info(
        f"recent popularity: {described(terms, dataset)}, the standard deviation of a user's scores is "
        f"{fit.spread:.3g}; the monitored metric of validation is {abs(fit.score):.4f}, without it {without:.4f}{told}"
    )


def best_terms(
    dataset: Dataset,
    found: Factors | ContextFactors,
    score: Callable[[Scorer], float],
    context: DistributedContext,
    chance: Chance,
) -> PopularityFit:
    """Return the recent popularity whose validation score is highest in addition to scores without it; all ranks call
    it. A term is in it if it gains more than CLOSE of the score, or than chance may give by `chance`."""
    unit = RecentScores.of_part(
        dataset, VALIDATION, PopularityTerms(1.0, 1.0), np.zeros(len(dataset.items), np.float32)
    )
    half_lives = half_lives_of(len(unit.popularity.items))
    spread = context.broadcast(spread_of_scores(found, dataset) if context.is_main else 0.0)
    tried = dict[PopularityTerms, float]()

    def scale(terms: PopularityTerms) -> float:
        return spread / (_spread(replace(unit, terms=terms), dataset) or np.inf)

    def scorer(terms: PopularityTerms) -> Factors | ContextFactors:
        return replace(found, recent=replace(unit, terms=terms) if any(terms[1:]) else None)

    def of(terms: PopularityTerms) -> float:
        if terms not in tried:
            tried[terms] = score(scorer(terms))
        return tried[terms]

    def gains(more: PopularityTerms, than: PopularityTerms) -> bool:
        gain = of(more) - of(than)
        return gain > CLOSE * abs(of(than)) or (gain > 0 and gain > chance(scorer(more), scorer(than)))

    units = {half_life: scale(PopularityTerms(half_life, 1.0)) for half_life in half_lives}

    def by(weight: float, half_life: float) -> PopularityTerms:
        return PopularityTerms(half_life, weight * units[half_life]) if weight else PopularityTerms(1.0, 0.0)

    terms = max((by(w, h) for h in half_lives for w in FIRST_WEIGHTS), key=of)
    weight = best_weight(WEIGHTS, lambda w: of(by(w, terms.half_life)))
    terms = max((by(weight, h) for h in half_lives), key=of)
    nothing = PopularityTerms(1.0, 0.0)

    def also(name: str, weight: float) -> PopularityTerms:
        """Return the terms with one more; an item without a row gains by no age."""
        new = min(weight, 0.0) if name == "age" else terms.new
        return terms._replace(**{name: weight, "new": new})

    if not gains(terms, nothing):
        return PopularityFit(nothing, of(terms), of(nothing), spread)
    other = {name: scale(nothing._replace(**{name: 1.0})) for name in ("total", "age")}
    for _ in other:
        more = [
            also(name, weight * of_one)
            for name, of_one in other.items()
            for weight in SIGNED_WEIGHTS
            if not getattr(terms, name)
        ]
        best = max(more, key=of)
        if not gains(best, terms):
            break
        terms = best
    return PopularityFit(terms, of(terms), of(nothing), spread)


def half_lives_of(rows: int) -> list[float]:
    """Return the half-lives that are tried of a log of so many rows before validation, rising."""
    return sorted({max(1.0, round(share * rows)) for share in HALF_LIVES})


def described(terms: PopularityTerms, dataset: Dataset) -> str:
    """Return the terms in words."""
    return (
        f"{terms.recent:.3g} log(1 + count by a half-life of {terms.half_life:,.0f} of "
        f"{len(RecentPopularity.before(dataset, VALIDATION).items):,} rows)"
        + (f" {terms.total:+.3g} log(1 + count by all)" if terms.total else "")
        + (f" {terms.age:+.3g} log(1 + rows since the first)" if terms.age else "")
        + (f", and of an item without a row {terms.new:+.3g} log(1 + all rows)" if terms.new else "")
    )


def hold_popularity(model: TwoTower, dataset: Dataset, terms: PopularityTerms) -> None:
    """Give the items of a model the recent popularity at the end of what comes before the test part."""
    bias, numbers = model.recent_popularity, torch.tensor(terms)
    terms = PopularityTerms(*numbers.tolist())
    known = RecentPopularity.before(dataset, TEST)
    held = torch.from_numpy(known.scores_at_end(terms))
    with torch.no_grad():
        bias.values.zero_()
        bias.values[torch.from_numpy(_codes(model, dataset)).to(bias.values.device)] = held.to(bias.values)
        bias.values[UNKNOWN] = float(known.scores_of_new(np.array(len(known.items)), terms))
        bias.numbers.copy_(numbers)


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
