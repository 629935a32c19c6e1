"""Own counts: the score that items of a user's own history have in addition to the product, fitted to the validation
part."""

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
from twotower.data.own_items import Recency, rows_of_codes
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
from twotower.train.starts.search import CLOSE, best_weight

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Factors | ContextFactors)

PRIOR = 10.0
"""Interactions with an item at which its own share of repeats weighs as much as that of all items."""
HALF_LIVES, EXPONENTS = (400, 200, 100, 50, 25, 12, 6, 3, 1), (0.1, 0.25, 0.5, 1.0, 2.0)
"""Numbers of interactions after which one counts half, and exponents of their places, which are tried in addition
to equal counts where the log has times."""
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Root mean squares of the added scores that are tried, in standard deviations of a user's scores."""
OWN_SCORES = 500_000_000
"""Scores of users and items of a comparison at most, of which a fit makes some fifty."""
FIRST_WEIGHTS = (1.0, 300.0)
"""Weights by which the recencies are compared at first: comparable to the other scores, and above them."""
USUAL_WEIGHT, USUAL_EXPONENT = 3.0, 0.1
"""Weight and exponent with which the values of a start are chosen, before own counts are fitted."""


def own_scores(model: TwoTower, dataset: Dataset, part: int) -> OwnScores | None:
    """Return what the histories before a part add to scores; None of a model without own counts, or whose are 0."""
    name = model.config.own_counts
    if not name or not model.own_counts.are_fitted:
        return None
    weights = model.own_counts.weights.cpu().numpy()
    return _scores(dataset, name, part, weights, model.own_counts.recency)


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
        raise ConfigError("model.own_counts is fitted to the validation part, and the split has none; leave it out")
    if schema.duplicates != "keep":
        raise ConfigError(
            f"model.own_counts scores what users take again, and schema.duplicates = '{schema.duplicates}' leaves "
            "none of it; set schema.duplicates = 'keep', or leave it out"
        )
    if repeats == "exclude":
        raise ConfigError(
            "model.own_counts scores what users take again, and evaluation.repeats = 'exclude' ranks none of it; set "
            "evaluation.repeats = 'allow', or leave it out"
        )


class OwnCountsFit:
    """Own counts as an addition to other scores, and their fit to validation.

    An item weighs as the share of its training interactions that repeat an earlier one of their user (Hu et al. 2020,
    "Modeling Personalized Item Frequency Information for Next-basket Recommendation").
    """

    def __init__(self, model: TwoTower, dataset: Dataset) -> None:
        self._own, self._dataset, self._name = model.own_counts, dataset, model.config.own_counts
        self._shares = shares_of_repeats(dataset, self._name, len(self._own.weights))
        self._recencies, self._known = [Recency()], dict[Recency, OwnScores]()
        """Scores of validation by recency, of the root mean square 1."""
        if dataset.times is not None:
            self._recencies += [Recency(exponent=exponent) for exponent in EXPONENTS]
            self._recencies += [Recency(rate=0.5 ** (1 / n)) for n in HALF_LIVES]

    def beside(self, found: F) -> F:
        """Return scores with own counts of the usual weight and exponent; as they are if no user takes an item
        again."""
        spread = spread_of_scores(found, self._dataset)
        usual = Recency(exponent=USUAL_EXPONENT) if len(self._recencies) > 1 else Recency()
        return replace(found, own=self._unit(usual).scaled(USUAL_WEIGHT * spread)) if self._shares.any() else found

    def fit(
        self,
        found: Factors | ContextFactors,
        score: Callable[[Scorer], tuple[float, float]],
        context: DistributedContext,
        metric: str = "",
        told: str = "",
    ) -> None:
        """Overwrite the own counts of the model with those whose validation score is highest. `found` are the scores
        without them, and `score` the metric of validation that decides and the monitored one, higher is better; all
        ranks call it. `metric` names the former if it is another, and `told` says by how many users they are measured.
        What loses more than CLOSE of the monitored metric is not taken."""
        spread = context.broadcast(spread_of_scores(found, self._dataset) if context.is_main else 0.0)
        if not self._shares.any() or not spread > 0:
            why = (
                "each user scores all items alike" if self._shares.any() else "no user takes an item again in training"
            )
            log.warning(f"model.own_counts fits nothing, and adds nothing: {why}")
            self._own.weights.zero_()
            return
        tried = dict[tuple[float, Recency], tuple[float, float]]()

        def of(weight: float, recency: Recency) -> float:
            key = weight, recency if weight else Recency()
            if key not in tried:
                tried[key] = score(replace(found, own=self._unit(key[1]).scaled(weight * spread)))
            return tried[key][0]

        first = ((w, r) for r in self._recencies for w in FIRST_WEIGHTS)
        recency = max(first, key=lambda pair: of(*pair))[1]
        weight = best_weight(WEIGHTS, lambda w: of(w, recency))
        recency = max(self._recencies, key=lambda r: of(weight, r)) if weight else Recency()
        best = max(monitored for _, monitored in tried.values())
        least = best - CLOSE * abs(best)
        if tried[weight, recency][1] < least:
            weight, recency = max((key for key in tried if tried[key][1] >= least), key=lambda key: tried[key][0])
        (decides, monitored), without = tried[weight, recency], (of(0.0, Recency()), tried[0.0, Recency()][1])
        scores = _scores(self._dataset, self._name, VALIDATION, self._shares, recency)
        with torch.no_grad():
            weights = self._shares * np.float32(weight * spread / scores.root_mean_square)
            self._own.weights.copy_(torch.from_numpy(weights))
            self._own.rate.fill_(recency.rate)
            self._own.exponent.fill_(recency.exponent)
        log.info(
            f"own counts: weight {weight:g} in standard deviations of a user's scores, rate {recency.rate:.4g}, "
            f"exponent {recency.exponent:g}"
            + ("" if weight else " (they add nothing)")
            + f"; the monitored metric of validation is {abs(monitored):.4f}, without them {abs(without[1]):.4f}"
            + (f", and {metric} {decides:.4f}, without them {without[0]:.4f}" if metric else "")
            + told
        )

    def _unit(self, recency: Recency) -> OwnScores:
        if recency not in self._known:
            scores = _scores(self._dataset, self._name, VALIDATION, self._shares, recency)
            values = scores.scaled(1 / (scores.root_mean_square or 1.0)).values
            self._known[recency] = replace(next(iter(self._known.values()), scores), values=values)  # of the same items
        return self._known[recency]


def shares_of_repeats(dataset: Dataset, name: str, n_codes: int) -> Shaped[Floats, "codes"]:
    """Return for each code the share of its training interactions that repeat an earlier one of their user, drawn to
    that of all."""
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


def _scores(dataset: Dataset, name: str, part: int, weights: Shaped[Floats, "codes"], recency: Recency) -> OwnScores:
    histories, spec = _histories(dataset, name, part)
    rows = rows_of_codes(dataset, spec, len(weights))
    return OwnScores.of(histories, rows, weights, recency, len(dataset.items))


def _histories(dataset: Dataset, name: str, part: int) -> tuple[Ragged, HistorySpec]:
    """Return a history of the users, as it is known before a part, and what it holds."""
    spec = next(h for h in dataset.schema.histories("user") if h.name == name)
    histories = dataset.side_before("user", part).columns[name]
    assert isinstance(histories, Ragged)
    return histories, spec
