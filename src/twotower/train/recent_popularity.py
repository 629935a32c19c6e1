"""Recent popularity: the bias of what is popular now."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.recent_popularity import PopularityTerms, RecentPopularity
from twotower.data.splits import TEST, VALIDATION
from twotower.errors import ConfigError
from twotower.evaluation.recent_scores import RecentScores
from twotower.features.values import UNKNOWN
from twotower.model.two_tower import TwoTower

HALF_LIVES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Rows after which one counts half that are tried, in shares of the rows before validation."""


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
            "the scorer 'trending' counts the latest rows of the log, and they have no time; name its column in "
            "schema.time, or set model.recent_popularity = false and leave the scorer out"
        )
    if not len(dataset.validation):
        raise ConfigError(
            "the scorer 'trending' is fitted to the validation part, and the split has none; set "
            "model.recent_popularity = false and leave the scorer out"
        )
    if stacking:
        raise ConfigError(
            "model.stacking weighs the terms of a logit, and model.recent_popularity would be added to it; set one of "
            "them to false"
        )


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


def _codes(model: TwoTower, dataset: Dataset) -> Shaped[Ints, "I"]:
    """Return the code of the id of each item."""
    field = model.recent_popularity.field
    assert field is not None
    return np.asarray(dataset.items.columns[field.name]).astype(np.int64)
