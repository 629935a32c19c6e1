"""Own counts: the score that items of a user's own history have in addition to the product."""

from __future__ import annotations

import numpy as np
import torch

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Doubles, Floats, Shaped
from twotower.data.dataset import Dataset
from twotower.data.own_items import Recency, rows_of_codes
from twotower.data.splits import VALIDATION
from twotower.errors import ConfigError
from twotower.evaluation.own_scores import OwnScores
from twotower.features.feature import HistorySpec
from twotower.features.values import UNKNOWN
from twotower.model.two_tower import TwoTower

PRIOR = 10.0
"""Interactions with an item at which its own share of repeats weighs as much as that of all items."""
SMALL = 0.2
"""Unit of an item's sum within its logarithm, in mean sums: the likelihood of what users took is nearly the same from
.1 to .3, and lower beyond (docs/log.md)."""
HALF_LIVES, EXPONENTS = (400, 200, 100, 50, 25, 12, 6, 3, 1), (0.1, 0.25, 0.5, 1.0, 2.0)
"""Numbers of interactions after which one counts half, and exponents of their places, which are tried in addition
to equal counts where the log has times."""


def own_scores(model: TwoTower, dataset: Dataset, part: int) -> OwnScores | None:
    """Return what the histories before a part add to scores; None of a model without own counts, or whose are 0."""
    name = model.config.own_counts
    if not name or not model.own_counts.are_fitted:
        return None
    weights = model.own_counts.weights.cpu().numpy()
    own = model.own_counts
    return _scores(dataset, name, part, weights, own.recency, float(own.factor))


def check_own_counts(dataset: Dataset, name: str, repeats: str) -> None:
    """Raise ConfigError if a history cannot say what its users take again."""
    schema = dataset.schema
    spec = next((h for h in schema.histories("user") if h.name == name), None)
    if spec is None or spec.feature or spec.codes or spec.interactions == "negative":
        fits = [h.name for h in schema.histories("user") if not (h.feature or h.codes) and h.interactions != "negative"]
        raise ConfigError(
            f"model.own_counts = '{name}' is no history of what users took (found: {', '.join(fits) or 'none'}); name "
            "a feature of kind 'sequence' of the users that holds ids of the items, or leave it out"
        )
    if spec.interactions == "all" and not dataset.pairs.labels.all():
        fits = [h.name for h in schema.histories("user") if not (h.feature or h.codes) and h.interactions == "positive"]
        raise ConfigError(
            f"model.own_counts = '{name}' holds all interactions, so that what a user disliked would count as taken; "
            f"set interactions = 'positive' of feature '{name}', or name a history of positives (found: "
            f"{', '.join(fits) or 'none'})"
        )
    codes = dataset.encoders.history_codes(spec, dataset.items.frame)
    known = codes[codes != UNKNOWN]
    if len(np.unique(known)) < len(known):
        raise ConfigError(
            f"model.own_counts = '{name}': several items have one code; leave hash_buckets of the item's id at its "
            f"default, or set share_embedding = false of feature '{name}'"
        )
    if not len(dataset.validation):
        raise ConfigError(
            "the scorer 'repeats' (model.own_counts) is fitted to the validation part, and the split has none; leave "
            "it out"
        )
    if schema.duplicates != "keep":
        raise ConfigError(
            f"the scorer 'repeats' (model.own_counts) scores what users take again, and schema.duplicates = "
            f"'{schema.duplicates}' leaves none of it; set schema.duplicates = 'keep', or leave it out"
        )
    if repeats == "exclude":
        raise ConfigError(
            "the scorer 'repeats' (model.own_counts) scores what users take again, and evaluation.repeats = 'exclude' "
            "ranks none of it; set evaluation.repeats = 'allow', or leave it out"
        )


def recencies(dataset: Dataset) -> list[Recency]:
    """Return the recencies that a fit compares: equal counts, and more for a log with times."""
    found = [Recency()]
    if dataset.times is not None:
        found += [Recency(exponent=exponent) for exponent in EXPONENTS]
        found += [Recency(rate=0.5 ** (1 / n)) for n in HALF_LIVES]
    return found


def own_scores_by(model: TwoTower, dataset: Dataset, recency: Recency) -> tuple[OwnScores, Shaped[Floats, "codes"]]:
    """Return the scores of the factor 1 that the histories before validation add by a recency, and the weights of the
    codes: their shares of repeats, in units of SMALL times the mean sum of an item."""
    name = model.config.own_counts
    weights = shares_of_repeats(dataset, name, len(model.own_counts.weights))
    sums = np.expm1(_scores(dataset, name, VALIDATION, weights, recency, 1.0).values)
    if len(sums) and (mean := float(sums.mean())):
        weights /= np.float32(SMALL * mean)
    return _scores(dataset, name, VALIDATION, weights, recency, 1.0), weights


def write_own_counts(model: TwoTower, weights: Shaped[Floats, "codes"] | None, recency: Recency, factor: float) -> None:
    """Overwrite the own counts of the model; None: 0 for all codes."""
    own = model.own_counts
    with torch.no_grad():
        own.weights.copy_(torch.zeros_like(own.weights) if weights is None else torch.from_numpy(weights))
        for number, value in ((own.rate, recency.rate), (own.exponent, recency.exponent), (own.factor, factor)):
            number.fill_(value)


def shares_of_repeats(dataset: Dataset, name: str, n_codes: int) -> Shaped[Floats, "codes"]:
    """Return for each code the share of its training interactions that repeat an earlier one of their user, shrunk
    towards the share of all (Hu et al. 2020, "Modeling Personalized Item Frequency Information for Next-basket
    Recommendation")."""
    histories, _ = _histories(dataset, name, VALIDATION)
    codes = histories.values.astype(np.int64)
    first = np.unique(histories.owners * n_codes + codes, return_index=True)[1]
    again = np.ones(len(codes), bool)
    again[first] = False
    taken, repeats = np.bincount(codes, minlength=n_codes), np.bincount(codes[again], minlength=n_codes)
    taken[UNKNOWN] = repeats[UNKNOWN] = 0
    of_all = repeats.sum() / max(1, taken.sum())
    shares: Doubles = (repeats + PRIOR * of_all) / (taken + PRIOR)
    shares[UNKNOWN] = 0
    return shares.astype(np.float32)


def _scores(
    dataset: Dataset, name: str, part: int, weights: Shaped[Floats, "codes"], recency: Recency, factor: float
) -> OwnScores:
    histories, spec = _histories(dataset, name, part)
    rows = rows_of_codes(dataset, spec, len(weights))
    return OwnScores.of(histories, rows, weights, recency, factor, len(dataset.items))


def _histories(dataset: Dataset, name: str, part: int) -> tuple[Ragged, HistorySpec]:
    """Return a history of the users, as it is known before a part, and what it holds."""
    spec = next(h for h in dataset.schema.histories("user") if h.name == name)
    histories = dataset.side_before("user", part).columns[name]
    assert isinstance(histories, Ragged)
    return histories, spec
