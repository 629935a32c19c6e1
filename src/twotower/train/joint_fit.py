"""Joint fit of the columns of several pairs and of what is popular, whose weights were fitted one after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import F32, Int
from twotower.data.dataset import Dataset
from twotower.data.recent_popularity import PopularityTerms
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.evaluation.factors import Factors
from twotower.evaluation.recent_scores import RecentScores
from twotower.model.two_tower import TwoTower
from twotower.train.choices import MIN_ROWS, Choices, ChoiceWeights
from twotower.train.part_weights import other_dimensions, without_user_bias
from twotower.train.recent_popularity import described, half_lives_of, hold_popularity
from twotower.train.starts.pair import PairPart, WeighedParts, told_spreads, weigh_parts
from twotower.train.starts.start import Start

log = logging.getLogger(__name__)

WeighedPairs = Mapping[int, Sequence[WeighedParts]]
"""Closed forms of pairs with their weights, by number."""


@dataclass(frozen=True)
class PairForm:
    """One closed form of a pair, with the weight 1 of all its parts."""

    start: Start
    targets: Sequence[F32[Tensor, "_ F"]]
    """Rows of each field of the item tower."""
    parts: Sequence[PairPart]
    dimensions: Sequence[Int[Tensor, "_"]]
    """Those of each part in vectors of all pairs and forms side by side."""


@dataclass(frozen=True)
class JointFit:
    """Weights of all parts and of what is popular, fitted together."""

    forms: Sequence[PairForm]
    weights: ChoiceWeights
    """Of the parts of all forms."""
    terms: PopularityTerms
    scorer: Factors
    """Scores of validation by them."""

    def write(self, model: TwoTower, dataset: Dataset) -> WeighedPairs:
        """Overwrite the columns of the pairs, which are returned by pair, and the recent popularity of the model."""
        told, weights = list[str](), zip(self.weights.factors, self.weights.spreads, strict=True)
        of_pairs = dict[int, tuple[Start, list[WeighedParts]]]()
        for form in self.forms:
            own = [*islice(weights, len(form.parts))]
            _, of_pair = of_pairs.setdefault(form.start.pair, (form.start, []))
            told += told_spreads(form.parts, [spread for _, spread in own], second=bool(of_pair))
            of_pair.append(WeighedParts(form.targets, form.parts, [factor for factor, _ in own]))
        for start, weighed in of_pairs.values():
            weigh_parts(model, start, weighed)
        hold_popularity(model, dataset, self.terms)
        log.info(
            f"recent popularity by what users are most likely to take: {described(self.terms, dataset)}"
            + (
                "; weighed together with it, the scores of columns have these standard deviations, in that of the "
                f"other pairs: {', '.join(told)}"
                if told
                else ""
            )
        )
        return {pair: weighed for pair, (_, weighed) in of_pairs.items()}


def joint_fit(
    factors: Factors, forms: Sequence[PairForm], dataset: Dataset, seed: int, half_life: float,
    score: Callable[[Factors], float], context: DistributedContext, bias: bool,
) -> JointFit | None:  # fmt: skip
    """Return the weights of the parts of some forms, and of the terms of recent popularity, under which together what
    users of validation take anew is most likely, by a softmax over the scores; None where validation does not tell them
    (`Choices`). `factors` are vectors of all pairs and forms, without recent popularity, and with biases of users if
    `bias` is True. Half-lives are tried from the given one on, in both directions, while `score`, a metric of
    validation, higher is better, rises; all ranks call it."""
    parts = [dimensions for form in forms for dimensions in form.dimensions]
    unit = RecentScores.of_part(
        dataset, VALIDATION, PopularityTerms(1.0, 0.0), np.zeros(len(dataset.items), np.float32)
    )
    choices = Choices.of(dataset, seed, len(parts) + 5) if context.is_main else None
    fit = None
    if choices:
        compared = without_user_bias(factors) if bias else factors
        fit = _JointTerms.of(choices, choices.products(compared, [other_dimensions(factors, parts), *parts]), unit)
    half_lives = half_lives_of(len(unit.popularity.items))
    best = list[tuple[float, JointFit]]()

    def improves(place: int) -> bool:
        """Try a half-life, and return True if its score is the highest one."""
        found = context.broadcast(fit.weights(half_lives[place]) if fit else None)
        if found is None:
            return False
        weights, terms = found
        scorer = replace(factors, recent=replace(unit, terms=terms))
        if parts:
            items = factors.items.clone()
            for dimensions, factor in zip(parts, weights.factors, strict=True):
                items[:, dimensions] *= factor
            scorer = replace(scorer, items=items)
        value = score(scorer)
        if not value > (best[0][0] if best else -np.inf):
            return False
        best[:] = [(value, JointFit(forms, weights, terms, scorer))]
        return True

    first = int(np.abs(np.log(np.array(half_lives) / half_life)).argmin())
    if not improves(first):
        return None
    for step in (1, -1):
        place = first + step
        while 0 <= place < len(half_lives) and improves(place):
            place += step
    return best[0][1]


@dataclass(frozen=True)
class _JointTerms:
    """Choices, and the terms that no half-life changes."""

    choices: Choices
    products: Sequence[F32[Tensor, "n k"]]
    """Scores of the pairs without columns, and of each part."""
    unit: RecentScores
    age: F32[Tensor, "n k"]
    new: F32[Tensor, "n k"]
    knows_new: bool
    """True if enough of the users that are read took items without a row before."""

    @classmethod
    def of(cls, choices: Choices, products: Sequence[F32[Tensor, "n k"]], unit: RecentScores) -> _JointTerms | None:
        """Return the terms. Without enough users who took items without a row, neither these users nor such items are
        compared: nothing tells their weight, and they would change that of the age. None for too few other users."""
        age, new = (
            choices.popularity(replace(unit, terms=unit.terms._replace(**{name: 1.0}))) for name in ("age", "new")
        )
        takes_new = new[:, 0].numpy() > 0
        knows_new = bool(np.count_nonzero(takes_new) >= MIN_ROWS)
        if not knows_new:
            if np.count_nonzero(~takes_new) < MIN_ROWS:
                return None
            left_out = choices.left_out | (new.numpy() > 0) | takes_new[:, None]
            left_out[:, 0] = False
            choices = replace(choices, left_out=left_out)
        return cls(choices, products, unit, age, new if knows_new else torch.zeros_like(new), knows_new)

    def weights(self, half_life: float) -> tuple[ChoiceWeights, PopularityTerms] | None:
        """Return the weights of the parts, and of the terms of recent popularity by a half-life; None if the other
        scores tell nothing."""
        recent, found = self._by(PopularityTerms(half_life, 1.0)), None
        for sign in (-1.0, 1.0, 0.0):  # what an item without a row has depends on that of the weight of all rows
            total = sign * self._by(PopularityTerms(half_life, 0.0, total=sign))
            found = self.choices.weights([*self.products, recent, total, self.age, self.new], n_free=4)
            if found is None or found.factors[-3] * sign >= 0:
                break
        if found is None:
            return None
        terms = PopularityTerms(half_life, *found.factors[-4:])
        if not self.knows_new:  # it gains by no age
            terms = terms._replace(new=min(terms.age, 0.0))
        return ChoiceWeights(found.factors[:-4], found.spreads[:-4]), terms

    def _by(self, terms: PopularityTerms) -> F32[Tensor, "n k"]:
        return self.choices.popularity(replace(self.unit, terms=terms))
