"""Mix: weights of the terms of a score, fitted to what users of the validation part took.

The first term is the score of the trained pairs, or of the first closed form where nothing is trained. The others are
the closed forms, popularity, recent popularity and own counts. Under the weights the items that users took are most
likely, by a softmax over the weighted sums (McFadden 1974, "Conditional Logit Analysis of Qualitative Choice
Behavior"). A normal prior about 0 keeps a weight small where few rows determine it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import F32, F64, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.own_items import Recency
from twotower.data.recent_popularity import PopularityTerms
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.evaluation.context_factors import ContextFactors
from twotower.evaluation.factors import Factors
from twotower.evaluation.recent_scores import RecentScores
from twotower.features.values import UNKNOWN
from twotower.model.two_tower import TwoTower
from twotower.train.choices import MIN_ROWS, Choices
from twotower.train.closed_forms import ClosedForm
from twotower.train.cold_items import ColdItems, cold_items
from twotower.train.own_counts import own_scores_by, recencies, write_own_counts
from twotower.train.recent_popularity import described, half_lives_of, hold_popularity
from twotower.train.recipe import Recipe

log = logging.getLogger(__name__)

LOG_ODDS = 1.0
"""Prior standard deviation of the factor of scores that are logarithms of odds, so that a value that few items have
cannot weigh as much as one of many."""
STANDARD = 3.0
"""Prior standard deviation of the weight of other scores, in standard deviations of these."""
FREE = 10.0
"""The same of weights that the rows alone determine."""
BLOCK_NUMBERS = 2**24
"""Numbers of a block of rows in a Newton step."""
STEPS, HALVINGS = 30, 20
"""Maximum Newton steps, and halvings of one."""
ENOUGH = 1e-6
"""Decrease of the loss per row below which the steps end."""
LEAST = 0.01
"""Minimum standard deviation of the weighted first scores, which a score that others stand for would not have."""
POPULARITY, OWN, COLD = "log(1 + count)", "own counts", "cold items"
"""Names of terms."""
ALIKE, NOTHING = Recency(), PopularityTerms(1.0, 0.0)


class TermWeights(NamedTuple):
    """Weights of the terms after the first, whose weight is 1."""

    factors: list[float]
    spreads: list[float]
    """Standard deviations of the weighted scores of each, in that of the first term; negative for a negative factor."""
    loss: float
    """Negative logarithm of the likelihood and the prior."""


def fit_weights(
    terms: Sequence[F32[Tensor, "n k"]], offsets: Shaped[Floats, "n k"], deviations: Sequence[float]
) -> TermWeights | None:
    """Return the weights of terms under which the first candidate of each row is most likely, by Newton's method.

    `deviations` are prior standard deviations of the factors of all terms, or negative in standard deviations of the
    scores. None if the first term is the same for all items. Its weight is at least LEAST."""
    x, of = torch.stack([*terms], 2), torch.from_numpy(offsets)
    counts = torch.isfinite(of)
    mean = (x * counts[:, :, None]).sum(1, keepdim=True) / counts.sum(1)[:, None, None]
    x = (x - mean).masked_fill_(~counts[:, :, None], 0.0)
    scale = (x.double().square().sum((0, 1)) / counts.sum()).sqrt()
    used = scale > 0
    if not used[0]:
        return None
    x /= scale.where(used, 1.0).float()
    prior = torch.tensor(deviations, dtype=torch.float64)
    precision = torch.where(prior > 0, prior * scale, -prior).where(used, 1.0) ** -2
    found, loss = _newton(x, of, precision)
    if not found[0] > LEAST:
        found, loss = _newton(x, of, precision, LEAST)
    spreads = (found[1:] / found[0]).where(used[1:], 0.0)
    return TermWeights((spreads * scale[0] / scale[1:].where(used[1:], 1.0)).tolist(), spreads.tolist(), loss)


def _newton(
    x: F32[Tensor, "n k T"], offsets: F32[Tensor, "n k"], precision: F64[Tensor, "T"], first: float | None = None
) -> tuple[F64[Tensor, "T"], float]:
    """Return the weights w of the least loss, and the loss: the cross-entropy of the first candidates by the logits
    x . w + offsets, plus the sum of `precision` w^2 / 2. The loss is convex. `first` holds the first weight."""
    w, free = torch.zeros(x.shape[2], dtype=torch.float64), slice(first is not None, None)
    if first is not None:
        w[0] = first
    blocks = [*_blocks(x, offsets)]

    def loss_of(w: F64[Tensor, "T"]) -> float:
        total = sum(float((b @ w.float() + o).logsumexp(1).double().sum() - (b[:, 0] @ w.float()).double().sum())
                    for b, o in blocks)  # fmt: skip
        return total + float((precision * w.square()).sum()) / 2

    loss = loss_of(w)
    for _ in range(STEPS):
        gradient, hessian = precision * w, torch.diag(precision)
        for b, o in blocks:
            p = (b @ w.float() + o).softmax(1)
            expected = torch.bmm(p[:, None], b)[:, 0]
            gradient += (expected - b[:, 0]).double().sum(0)
            flat = b.flatten(0, 1)
            hessian += (flat.T @ (p.flatten()[:, None] * flat) - expected.T @ expected).double()
        step = torch.zeros_like(w)
        step[free] = torch.linalg.solve(hessian[free, free], gradient[free])
        before, size = loss, 1.0
        for _ in range(HALVINGS):
            if (loss := loss_of(w - size * step)) <= before:
                break
            size /= 2
        else:
            return w, before
        w = w - size * step
        if before - loss < ENOUGH * len(x):
            break
    return w, loss


def _blocks(
    x: F32[Tensor, "n k T"], offsets: F32[Tensor, "n k"]
) -> Iterator[tuple[F32[Tensor, "b k T"], F32[Tensor, "b k"]]]:
    size = max(1, BLOCK_NUMBERS // x[0].numel())
    for first in range(0, len(x), size):
        yield x[first : first + size], offsets[first : first + size]


class _Term(NamedTuple):
    name: str
    scores: F32[Tensor, "n k"]
    deviation: float
    """As in `fit_weights`."""


@dataclass(frozen=True)
class MixWeights:
    """Weights of everything that is added to the first term."""

    forms: list[list[float]]
    """Factors of the terms of each closed form."""
    spreads: list[tuple[str, float]]
    """Name of each term, and the standard deviation of its weighted scores in that of the first term."""
    popularity: float = 0.0
    own: float = 0.0
    recency: Recency = ALIKE
    own_weights: Shaped[Floats, "codes"] | None = None
    recent: PopularityTerms = NOTHING

    def times(self, share: float) -> MixWeights:
        """Return a share of all weights."""
        half_life, *weights = self.recent
        return replace(
            self,
            forms=[[share * factor for factor in factors] for factors in self.forms],
            popularity=share * self.popularity,
            own=share * self.own,
            recent=PopularityTerms(half_life, *(share * weight for weight in weights)),
        )


@dataclass(frozen=True)
class Mix:
    """The mix of one model; all ranks call it."""

    model: TwoTower
    dataset: Dataset
    recipe: Recipe
    context: DistributedContext

    def fit(self, first: Factors | ContextFactors, forms: Sequence[ClosedForm]) -> MixWeights | None:
        """Return the weights of closed forms, popularity, recent popularity and own counts, each of a model that has
        it, added to the `first` scores; None with a line in the log where validation determines none."""
        found = self.context.broadcast(self._fit(first, forms) if self.context.is_main else None)
        if isinstance(found, str):
            log.warning(f"mix: {found}; nothing is added to the first scores")
            return None
        return found

    def write(self, found: MixWeights, forms: Sequence[ClosedForm]) -> None:
        """Overwrite the terms of the model with weighted ones."""
        model, dataset, config = self.model, self.dataset, self.recipe.model
        for form, weights in zip(forms, found.forms, strict=True):
            form.write(model, weights)
        if config.recent_popularity:
            hold_popularity(model, dataset, found.recent)
        if config.own_counts:
            write_own_counts(model, found.own_weights, found.recency, found.own)
        if found.popularity:
            add_biases(model, dataset, found.popularity * log_popularity(dataset))

    @staticmethod
    def nothing(forms: Sequence[ClosedForm]) -> MixWeights:
        """Return the weight 0 of everything."""
        return MixWeights([[0.0] * len(form.terms) for form in forms], [])

    def describe(self, found: MixWeights) -> str:
        """Return the weights in words."""
        parts = [", ".join(f"{name} {spread:.2f}" for name, spread in found.spreads) or "nothing to weight"]
        if any(found.recent[1:]):
            parts.append(f"recent popularity: {described(found.recent, self.dataset)}")
        if found.own:
            parts.append(f"own counts: rate {found.recency.rate:.4g}, exponent {found.recency.exponent:g}")
        return "; ".join(parts)

    def _fit(self, first: Factors | ContextFactors, forms: Sequence[ClosedForm]) -> MixWeights | str:
        config = self.recipe.model
        choices = Choices.of(self.dataset, self.recipe.train.seed, self.recipe.evaluation.repeats)
        if choices is None:
            return f"fewer than {MIN_ROWS} rows of validation take an item that is ranked"
        base, recency, half_life = _Term("", choices.scores(first), -FREE), ALIKE, 0.0
        own, recent, own_weights, sign = list[_Term](), list[_Term](), None, 1.0
        if config.own_counts:
            own, recency, own_weights = self._own_counts(choices, base)
        if config.recent_popularity:
            choices, recent, half_life, sign = self._recent(choices, [base, *own])
        added = [
            _Term(term.name, scores, LOG_ODDS if form.parts else -STANDARD)
            for form in forms
            for term, scores in zip(form.terms, form.scores(choices), strict=True)
        ]
        if has_biases(self.model, self.dataset) and not (config.recent_popularity or config.stacking):
            added.append(_Term(POPULARITY, choices.of_items(log_popularity(self.dataset)), LOG_ODDS))
        cold = list[_Term]()
        if config.cold_item_bias and not config.own_counts:
            items = cold_items(self.model, self.dataset, self.recipe.train.seed, bool(recent), stand_in=False)
            if isinstance(items, ColdItems):  # their bias is fitted later
                cold = [_Term(COLD, choices.of_items(torch.from_numpy(items.which)), -FREE)]
        terms = [base, *added, *own, *recent, *cold]
        found = _weights(terms, choices)
        if found and recent and found.factors[terms.index(recent[1]) - 1] * sign < 0:  # new items have another score
            terms.remove(recent[1])
            found = _weights(terms, choices)
        if not found:
            return "no user of validation scores one item above another"
        names = [term.name for term in terms[1:]]
        factors, left = dict(zip(names, found.factors, strict=True)), iter(found.factors)
        return MixWeights(
            [[next(left) for _ in form.terms] for form in forms],
            [(name, spread) for name, spread in zip(names, found.spreads, strict=True) if name != COLD and spread],
            factors.get(POPULARITY, 0.0),
            factors.get(OWN, 0.0),
            recency,
            own_weights,
            _terms(half_life, factors) if recent else NOTHING,
        )

    def _own_counts(self, choices: Choices, base: _Term) -> tuple[list[_Term], Recency, Shaped[Floats, "codes"] | None]:
        """Return the term of own counts by the recency of the least loss, and the weights of the codes; no term if
        nobody takes an item again."""
        best: tuple[float, _Term, Recency, Shaped[Floats, "codes"]] | None = None
        for recency in recencies(self.dataset):
            scores, weights = own_scores_by(self.model, self.dataset, recency)
            term = _Term(OWN, choices.of_pairs(scores.of_pairs), -FREE)
            found = _weights([base, term], choices) if weights.any() else None
            if found and (best is None or found.loss < best[0]):
                best = found.loss, term, recency, weights
        return ([best[1]], best[2], best[3]) if best else ([], ALIKE, None)

    def _recent(self, choices: Choices, before: Sequence[_Term]) -> tuple[Choices, list[_Term], float, float]:
        """Return the terms of recent popularity by the half-life of the least loss, the half-life, and the sign of the
        weight of all rows. Where too few rows take an item without an earlier row, the choices leave these out: nothing
        determines the weight of such items."""
        held = np.zeros(len(self.dataset.items), np.float32)
        unit = RecentScores.of_part(self.dataset, VALIDATION, PopularityTerms(1.0, 0.0), held)

        def by(**weights: float) -> F32[Tensor, "n k"]:
            return choices.of_pairs(replace(unit, terms=unit.terms._replace(**weights)).of_pairs)

        new, age = by(new=1.0), by(age=1.0)
        takes_new = new[:, 0] > 0
        if int(takes_new.sum()) >= MIN_ROWS:
            fixed = [_Term("age", age, -FREE), _Term("new", new, -FREE)]
        else:
            choices = choices.without(((new > 0) | takes_new[:, None]).numpy())
            fixed = [_Term("age", age, -FREE)]
        tried = list[tuple[float, float, float, list[_Term]]]()
        for half_life in half_lives_of(len(unit.popularity.items)):
            recent = _Term("recent", by(half_life=half_life, recent=1.0), -FREE)
            for sign in (1.0, -1.0):  # what an item without a row has depends on the sign of the weight of all rows
                total = _Term("total", sign * by(total=sign), -FREE)
                found = _weights([*before, recent, total, *fixed], choices)
                if found and found.factors[len(before)] * sign >= 0:
                    tried.append((found.loss, half_life, sign, [recent, total, *fixed]))
                    break
        _, half_life, sign, terms = min(tried, key=lambda one: one[0], default=(0.0, 0.0, 1.0, []))
        return choices, terms, half_life, sign


def _weights(terms: Sequence[_Term], choices: Choices) -> TermWeights | None:
    return fit_weights([term.scores for term in terms], choices.offsets, [term.deviation for term in terms])


def _terms(half_life: float, factors: dict[str, float]) -> PopularityTerms:
    """Return the terms of recent popularity. An item without a row gains by no age that nothing determines."""
    age = factors["age"]
    return PopularityTerms(
        half_life, factors["recent"], factors.get("total", 0.0), age, factors.get("new", min(age, 0.0))
    )


def log_popularity(dataset: Dataset) -> F32[Tensor, "items"]:
    """Return log(1 + n) of each item's training positives n, 0 for items whose id is unknown."""
    counts = np.bincount(dataset.pairs.item[dataset.positives_by_user.values], minlength=len(dataset.items))
    return torch.from_numpy(np.where(_codes(dataset) != UNKNOWN, np.log1p(counts), 0.0).astype(np.float32))


def add_biases(model: TwoTower, dataset: Dataset, biases: F32[Tensor, "items"]) -> None:
    """Add a bias to each item whose id is known, through the row of its id."""
    feature, codes = dataset.schema.id_feature("item"), torch.from_numpy(_codes(dataset))
    assert feature is not None
    known = codes != UNKNOWN
    with torch.no_grad():
        rows = model.item_bias.rows_of(feature.name)
        rows[codes[known].to(rows.device), 0] += biases[known].to(rows)


def has_biases(model: TwoTower, dataset: Dataset) -> bool:
    """Return True if each item of a known id has a bias of its own."""
    return model.config.bias and dataset.schema.id_feature("item") is not None


def _codes(dataset: Dataset) -> Shaped[Ints, "items"]:
    """Return the code of each item's id."""
    feature = dataset.schema.id_feature("item")
    assert feature is not None
    return np.asarray(dataset.items.columns[feature.name]).astype(np.int64)
