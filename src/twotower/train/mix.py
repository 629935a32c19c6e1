"""Mix: weights of the terms of a score, fitted to what users of the validation part took.

The first term is the score of the trained pairs, or of the first closed form where nothing is trained. The others are
the closed forms, popularity, and the terms that no tower computes. Under the weights the items that users took are most
likely, by a softmax over the weighted sums (McFadden 1974, "Conditional Logit Analysis of Qualitative Choice
Behavior"). A normal prior about 0 keeps a weight small where few rows determine it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import F32, Bools, Shaped
from twotower.data.dataset import Dataset
from twotower.distributed import DistributedContext
from twotower.evaluation.factors import Factors
from twotower.evaluation.moments import ContextFactors
from twotower.features.values import UNKNOWN
from twotower.model.two_tower import TwoTower
from twotower.scorers.choices import MIN_ROWS, Choices, later_items
from twotower.scorers.logit import FREE, Column
from twotower.scorers.scorer import TermFit, terms_of
from twotower.train.closed_forms import ClosedForm, scale_pair
from twotower.train.factors import item_codes
from twotower.train.recipe import Recipe

log = logging.getLogger(__name__)

LOG_ODDS = 1.0
"""Prior standard deviation of the factor of scores that are logarithms of odds, so that a value that few items have
cannot weigh as much as one of many."""
STANDARD = 3.0
"""Prior standard deviation of the weight of other scores, in standard deviations of these."""
STEPS, MAX_STEPS = (0.5, 0.25, 0.125), 8
"""Steps from the likeliest bias of cold items, and the number of each at most."""
POPULARITY, COLD = "log(1 + count)", "cold items"
"""Names of terms."""


@dataclass(frozen=True)
class MixWeights:
    """Weights of everything that is added to the first term."""

    forms: list[float]
    """Factors of the closed forms."""
    terms: list[tuple[tuple[float, ...], Mapping[str, float]]]
    """Numbers of each term that no tower computes, chosen in addition to weights, and the weights of its columns."""
    spreads: list[tuple[str, float]]
    """Name of each column, and the standard deviation of its weighted scores in that of the first term."""
    popularity: float = 0.0
    cold: float | None = None
    """Bias of cold items; None: too few are taken."""
    unit: float = 0.0
    """Standard deviation of the first scores."""

    def times(self, share: float) -> MixWeights:
        """Return a share of all weights."""
        return replace(
            self,
            forms=[share * factor for factor in self.forms],
            terms=[(chosen, {name: share * weight for name, weight in found.items()}) for chosen, found in self.terms],
            popularity=share * self.popularity,
        )


@dataclass(frozen=True)
class Mix:
    """The mix of one model; all ranks call it."""

    model: TwoTower
    dataset: Dataset
    recipe: Recipe
    context: DistributedContext

    def fit(
        self, first: Factors | ContextFactors, forms: Sequence[ClosedForm], vectors: Sequence[Factors] = ()
    ) -> MixWeights | None:
        """Return the weights of closed forms of these vectors, popularity and terms that no tower computes, each of a
        model that has it, added to the `first` scores; None with a line in the log where validation determines none."""
        found = self.context.broadcast(self._fit(first, forms, vectors) if self.context.is_main else None)
        if isinstance(found, str):
            log.warning(f"mix: {found}; nothing is added to the first scores")
            return None
        return found

    def write(self, found: MixWeights, forms: Sequence[ClosedForm]) -> None:
        """Overwrite the terms of the model with weighted ones."""
        for form, weight in zip(forms, found.forms, strict=True):
            scale_pair(self.model, form.pair, weight)
        self.write_terms(found)

    def write_terms(self, found: MixWeights) -> None:
        """Overwrite the terms that are no closed forms."""
        for term, (chosen, of_columns) in zip(terms_of(self.model), found.terms, strict=True):
            term.write(self.dataset, chosen, of_columns)
        if found.popularity:
            add_biases(self.model, self.dataset, found.popularity * log_popularity(self.dataset))

    def nothing(self, forms: Sequence[ClosedForm]) -> MixWeights:
        """Return the weight 0 of everything."""
        return MixWeights([0.0] * len(forms), [((), {}) for _ in terms_of(self.model)], [])

    def describe(self, found: MixWeights) -> str:
        """Return the weights, and the terms of the model, in words."""
        weights = ", ".join(f"{name} {spread:.2f}" for name, spread in found.spreads) or "nothing to weight"
        return "; ".join([weights, *(term.describe() for term in terms_of(self.model) if term.is_fitted)])

    def _fit(
        self, first: Factors | ContextFactors, forms: Sequence[ClosedForm], vectors: Sequence[Factors]
    ) -> MixWeights | str:
        config, dataset, terms = self.recipe.model, self.dataset, terms_of(self.model)
        choices = Choices.of(dataset, self.recipe.train.seed, self.recipe.evaluation.repeats)
        if choices is None:
            return f"fewer than {MIN_ROWS} rows of validation take an item that is ranked"
        columns, fits = [Column("", choices.scores(first), -FREE)], list[TermFit]()
        for term in terms:
            fits.append(fit := term.fit(dataset, choices, columns))
            choices, columns = fit.choices, [*columns, *fit.columns]
        columns += [
            Column(
                form.start.kind,
                choices.products(found.users, found.items),
                LOG_ODDS if form.start.reads_columns else -STANDARD,
            )
            for form, found in zip(forms, vectors, strict=True)
        ]
        may_weight = self.recipe.weights_popularity and not config.stacking and not any(term.is_bias for term in terms)
        if may_weight and has_biases(self.model, dataset):
            columns.append(Column(POPULARITY, choices.of_items(log_popularity(dataset)), LOG_ODDS))
        if config.cold_item_bias:
            cold = cold_items(dataset)
            if (n := int(cold[choices.candidates[:, 0]].sum())) >= MIN_ROWS:
                columns.append(Column(COLD, choices.of_items(torch.from_numpy(cold)), -FREE))
            else:
                log.warning(
                    "model.cold_item_bias fits nothing, and the bias stays 0: items that training lacks have "
                    f"{n} of the {MIN_ROWS} validation positives that are needed; a split by time gives them more"
                )
        if not (weights := choices.weights(columns)):
            return "no user of validation scores one item above another"
        names, left = [column.name for column in columns[1:]], iter(weights.factors)
        of_names = dict(zip(names, weights.factors, strict=True))
        return MixWeights(
            terms=[(fit.chosen, {column.name: next(left) for column in fit.columns}) for fit in fits],
            forms=[next(left) for _ in forms],
            popularity=of_names.get(POPULARITY, 0.0),
            cold=of_names.get(COLD),
            unit=float(columns[0].scores.std()),
            spreads=[(name, s) for name, s in zip(names, weights.spreads, strict=True) if name != COLD and s],
        )


def climbed(score: Callable[[float], float], start: float, unit: float) -> float:
    """Return the number that is reached from a first one by ever smaller steps, of STEPS units, while the score gets
    better."""
    for step in STEPS:
        for _ in range(MAX_STEPS):
            before, start = start, max((start, start - step * unit, start + step * unit), key=score)
            if start == before:
                break
    return start


def cold_items(dataset: Dataset) -> Shaped[Bools, "items"]:
    """Return True for the items whose id is unknown, and which are there on validation."""
    cold: Bools = (item_codes(dataset.items, dataset.schema) == UNKNOWN) & ~later_items(dataset)
    return cold


def log_popularity(dataset: Dataset) -> F32[Tensor, "items"]:
    """Return log(1 + n) of each item's training positives n, 0 for items whose id is unknown."""
    counts = np.bincount(dataset.pairs.item[dataset.positives_by_user.values], minlength=len(dataset.items))
    return torch.from_numpy(
        np.where(item_codes(dataset.items, dataset.schema) != UNKNOWN, np.log1p(counts), 0.0).astype(np.float32)
    )


def add_biases(model: TwoTower, dataset: Dataset, biases: F32[Tensor, "items"]) -> None:
    """Add a bias to each item whose id is known, through the row of its id."""
    feature, codes = dataset.schema.id_feature("item"), torch.from_numpy(item_codes(dataset.items, dataset.schema))
    assert feature is not None
    known = codes != UNKNOWN
    with torch.no_grad():
        rows = model.item_bias.rows_of(feature.name)
        rows[codes[known].to(rows.device), 0] += biases[known].to(rows)


def has_biases(model: TwoTower, dataset: Dataset) -> bool:
    """Return True if each item of a known id has a bias of its own."""
    return model.config.bias and dataset.schema.id_feature("item") is not None
