"""Own counts: the score that items of a user's own history have beside the product, fitted to the validation part."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Doubles, Floats, Shaped
from twotower.data.dataset import Dataset
from twotower.data.own_items import rows_of_codes
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.errors import ConfigError
from twotower.evaluation.context_factors import ContextFactors
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.own_scores import OwnScores
from twotower.features.feature import HistorySpec
from twotower.features.values import UNKNOWN
from twotower.model.two_tower import TwoTower
from twotower.train.cold_items import spread_of_scores
from twotower.train.starts.search import best_weight

log = logging.getLogger(__name__)
F = TypeVar("F", Factors, ContextFactors)

PRIOR = 10.0
"""Interactions with an item at which its own share of repeats weighs as much as that of all items."""
EXPONENTS = (0.0, 0.1, 0.25, 0.5)
"""Exponents of the places of interactions that are tried."""
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Root mean squares of the added scores that are tried, in standard deviations of a user's scores."""
USUAL_WEIGHT, USUAL_EXPONENT = 3.0, 0.1
"""Those beside which other values are chosen before these are fitted."""


def own_scores(model: TwoTower, dataset: Dataset, part: int) -> OwnScores | None:
    """Return what the histories before a part add to scores; None of a model without own counts, or whose are 0."""
    name = model.config.own_counts
    if not name or not model.own_counts.are_fitted:
        return None
    weights = model.own_counts.weights.cpu().numpy()
    return _scores(dataset, name, part, weights, float(model.own_counts.exponent))


def check_own_counts(dataset: Dataset, name: str, repeats: str) -> None:
    """Raise ConfigError if a history cannot say what its users take again."""
    schema = dataset.schema
    spec = next((h for h in schema.histories("user") if h.name == name), None)
    if spec is None or spec.feature or spec.codes or spec.interactions == "negative":
        fits = [h.name for h in schema.histories("user") if not (h.feature or h.codes) and h.interactions != "negative"]
        raise ConfigError(
            f"model.own_counts = '{name}' is no history of what users took (found: {', '.join(fits) or 'none'}); name a feature of "
            "kind 'sequence' of the users that holds ids of the items, or leave it out"
        )
    codes = dataset.encoders.history_codes(spec, dataset.items.frame)
    known = codes[codes != UNKNOWN]
    if len(np.unique(known)) < len(known):
        raise ConfigError(
            f"model.own_counts = '{name}': several items have one code; leave hash_buckets of the item's id at its default, or set "
            f"share_embedding = false of feature '{name}'"
        )
    if not len(dataset.validation):
        raise ConfigError("model.own_counts is fitted to the validation part, and the split has none; leave it out")
    if repeats == "exclude" or schema.duplicates != "keep":
        raise ConfigError(
            "model.own_counts scores what users take again, and evaluation.repeats = 'exclude' or schema.duplicates = "
            f"'{schema.duplicates}' leaves none of it; set evaluation.repeats = 'allow' and schema.duplicates = 'keep', or leave it out"
        )


class OwnCountsFit:
    """Own counts beside other scores, and their fit to validation.

    An item weighs as the share of its training interactions that repeat an earlier one of their user (Hu et al. 2020, "Modeling
    Personalized Item Frequency Information for Next-basket Recommendation").
    """

    def __init__(self, model: TwoTower, dataset: Dataset) -> None:
        self._own, self._dataset, self._name = model.own_counts, dataset, model.config.own_counts
        self._shares = shares_of_repeats(dataset, self._name, len(self._own.weights))
        self._known = dict[float, OwnScores]()
        """Scores of validation by exponent, of the root mean square 1."""

    def beside(self, found: F, weight: float = USUAL_WEIGHT, exponent: float = USUAL_EXPONENT) -> F:
        """Return scores with own counts of a weight, in standard deviations of a user's scores; as they are if no user takes an item again."""
        spread = spread_of_scores(found, self._dataset)
        return replace(found, own=self._unit(exponent).scaled(weight * spread)) if self._shares.any() else found

    def fit(
        self,
        found: Factors | ContextFactors,
        score: Callable[[Scorer], float],
        context: DistributedContext,
        told: str = "",
    ) -> None:
        """Overwrite the own counts of the model with those whose validation score is highest. `found` are the scores without them, and `score` a
        validation metric, higher is better; all ranks call it. `told` says by how many users it is measured."""
        spread = context.broadcast(spread_of_scores(found, self._dataset) if context.is_main else 0.0)
        if not self._shares.any() or not spread > 0:
            why = (
                "each user scores all items alike" if self._shares.any() else "no user takes an item again in training"
            )
            log.warning(f"model.own_counts fits nothing, and adds nothing: {why}")
            return
        tried = dict[tuple[float, float], float]()

        def of(weight: float, exponent: float) -> float:
            key = weight, exponent if weight else 0.0
            if key not in tried:
                tried[key] = score(replace(found, own=self._unit(exponent).scaled(weight * spread)))
            return tried[key]

        exponent = max(EXPONENTS, key=lambda e: of(USUAL_WEIGHT, e))
        weight = best_weight(WEIGHTS, lambda w: of(w, exponent))
        exponent = max(EXPONENTS, key=lambda e: of(weight, e)) if weight else 0.0
        scores = _scores(self._dataset, self._name, VALIDATION, self._shares, exponent)
        with torch.no_grad():
            self._own.weights.copy_(
                torch.from_numpy(self._shares * np.float32(weight * spread / scores.root_mean_square))
            )
            self._own.exponent.fill_(exponent)
        log.info(
            f"own counts: weight {weight:g} in standard deviations of a user's scores, exponent {exponent:g}"
            + ("" if weight else " (they add nothing)")
            + f"; the monitored metric of validation is {abs(of(weight, exponent)):.4f}, without them {abs(of(0.0, 0.0)):.4f}{told}"
        )

    def _unit(self, exponent: float) -> OwnScores:
        if exponent not in self._known:
            scores = _scores(self._dataset, self._name, VALIDATION, self._shares, exponent)
            self._known[exponent] = scores.scaled(1 / (scores.root_mean_square or 1.0))
        return self._known[exponent]


def shares_of_repeats(dataset: Dataset, name: str, n_codes: int) -> Shaped[Floats, "codes"]:
    """Return for each code the share of its training interactions that repeat an earlier one of their user, drawn to that of all."""
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


def _scores(dataset: Dataset, name: str, part: int, weights: Shaped[Floats, "codes"], exponent: float) -> OwnScores:
    histories, spec = _histories(dataset, name, part)
    rows = rows_of_codes(dataset, spec, len(weights))
    return OwnScores.of(histories, rows, weights, exponent, len(dataset.items))


def _histories(dataset: Dataset, name: str, part: int) -> tuple[Ragged, HistorySpec]:
    """Return a history of the users, as it is known before a part, and what it holds."""
    spec = next(h for h in dataset.schema.histories("user") if h.name == name)
    histories = dataset.side_before("user", part).columns[name]
    assert isinstance(histories, Ragged)
    return histories, spec
