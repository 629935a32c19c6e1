"""Scorer `trending`: what is popular now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from twotower.arrays.types import F32, Codes, Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, VALIDATION
from twotower.errors import ConfigError
from twotower.evaluation.added_scores import AddedScores
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import CatalogueScorer, Factors
from twotower.evaluation.moments import asked_times
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.inputs.code_layout import Inputs
from twotower.model.term import IdPrior
from twotower.model.two_tower import ModelConfig
from twotower.scorers.choices import MIN_ROWS, Choices
from twotower.scorers.logit import FREE, Column
from twotower.scorers.recent_popularity import PopularityTerms, RecentPopularity
from twotower.scorers.scorer import Addition, FittedTerm, TermFit, TermScorer

if TYPE_CHECKING:
    from twotower.features.schema import Schema
    from twotower.onnx.builder import GraphBuilder

NAME = "trending"
HALF_LIVES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Rows after which one counts half that are tried, in shares of the rows before validation."""
NOTHING = PopularityTerms(1.0, 0.0)


class Trending(TermScorer):
    """Recent popularity: a bias of each item by its count in the latest rows of the log, its count in all rows, and the
    rows since its first (Ji et al. 2020, "A Re-visit of the Popularity Baseline in Recommender Systems").

    Use it where what is popular changes, as in news. A log needs times.
    """

    kind, label, weighs_new_items = NAME, "recent popularity", True

    def addition(self, schema: Schema, name: str) -> Addition:
        return Addition(term=self)

    def term(self, user_fields: tuple[InputField, ...], item_fields: tuple[InputField, ...]) -> PopularityBias:
        return PopularityBias(item_fields)

    def check(self, dataset: Dataset, model: ModelConfig, evaluation: EvaluationConfig) -> None:
        if not dataset.schema.time:
            raise ConfigError(
                "the scorer 'trending' counts the latest rows of the log, and they have no time; name its column in "
                "schema.time, or leave the scorer out"
            )
        if model.cold_item_bias:
            raise ConfigError(
                "the scorer 'trending' has a weight for items without a row, as model.cold_item_bias has; set "
                "model.cold_item_bias = false, or leave the scorer out"
            )

    @classmethod
    def alone(
        cls, dataset: Dataset, part: int, config: EvaluationConfig, added: Sequence[AddedScores]
    ) -> CatalogueScorer | None:
        found = next((scores for scores in added if isinstance(scores, RecentScores)), None)
        if found is None:
            return None
        terms = PopularityTerms(found.terms.half_life, 1.0)
        scores = replace(found, terms=terms, held=np.zeros_like(found.held))
        return Factors(torch.zeros(len(found.asked), 1), torch.zeros(len(found.held), 1), added=(scores,))


@dataclass(frozen=True)
class RecentScores(AddedScores):
    """A score for each item and time: the recent popularity before the time, less what the vectors of the items have of
    it already."""

    moves: ClassVar[bool] = True

    popularity: RecentPopularity
    terms: PopularityTerms
    held: Shaped[Floats, "I"]
    """Recent popularity that the vectors of the items have."""
    asked: Shaped[Ints, "U"]
    """Time of the ranking of each user."""
    times: Shaped[Ints, "n"]
    """Time of each interaction, of which one may give the time of a ranking."""
    rows: Shaped[Ints, "i"] | None = None
    """Item rows that are ranked, in this order; None: all."""

    @classmethod
    def of_part(cls, dataset: Dataset, part: int, terms: PopularityTerms, held: Shaped[Floats, "I"]) -> RecentScores:
        """Return the scores of a part: of the positives of the parts before it, for each user before its first pair of
        the part."""
        known = RecentPopularity.before(dataset, part)
        return cls(known, terms, held, asked_times(dataset, part), dataset.times)

    def added_to(
        self, scores: Float[Tensor, "B I"], users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        distinct, which = np.unique(self._times(users, interactions), return_inverse=True)
        found = self.popularity.scores(distinct, self.terms) - self.held
        found = found if self.rows is None else found[:, self.rows]
        added = torch.from_numpy(found).to(scores.device, scores.dtype)
        return scores.add_(added[torch.from_numpy(which).to(scores.device)])

    def of_pairs(
        self, users: Shaped[Codes, "n"], items: Shaped[Codes, "n"], interactions: Shaped[Ints, "n"] | None = None
    ) -> Shaped[Floats, "n"]:
        rows = items if self.rows is None else self.rows[items]
        times = self._times(users, interactions)
        return self.popularity.scores_of_pairs(times, rows, self.terms) - self.held[rows]

    def take(self, users: Shaped[Ints, "u"], items: Shaped[Ints, "i"] | None = None) -> RecentScores:
        rows = self.rows
        if items is not None:
            rows = items if rows is None else rows[items]
        return replace(self, asked=self.asked[users], rows=rows)

    def _times(self, users: Shaped[Ints | Codes, "n"], interactions: Shaped[Ints, "n"] | None) -> Shaped[Ints, "n"]:
        return self.asked[users] if interactions is None else self.times[interactions]


class PopularityBias(FittedTerm):
    """Score of the recent popularity of each item at the end of the rows before the test part.

    An unknown id has the score of an item without a row."""

    is_bias = moves = True

    def __init__(self, fields: tuple[InputField, ...]) -> None:
        """Find the ids among the fields of the items. Raises ConfigError."""
        super().__init__(NAME)
        self.ids = IdPrior(fields, NAME)
        if self.ids.field is None:
            raise ConfigError(
                "the scorer 'trending' is a bias of each item, and no feature of the items is their id without "
                "hash_buckets; add one, or leave the scorer out"
            )
        self.numbers = nn.Parameter(torch.tensor(NOTHING), requires_grad=False)
        """Half-life, in rows of the log, and weights, in the order of `PopularityTerms`."""

    def forward(self, inputs: Inputs, bias: F32[Tensor, "I 1"]) -> F32[Tensor, "I 1"]:
        found: F32[Tensor, "I 1"] = self.ids(inputs, bias)
        return found

    def lower(self, g: GraphBuilder, bias: str) -> str:
        return self.ids.lower(g, bias)

    @property
    def terms(self) -> PopularityTerms:
        """Half-life and weights."""
        return PopularityTerms(*self.numbers.tolist())

    @property
    def is_fitted(self) -> bool:
        return any(self.terms[1:])

    def added(self, dataset: Dataset, part: int) -> RecentScores | None:
        if not self.is_fitted:
            return None
        return RecentScores.of_part(dataset, part, self.terms, self.ids.values.cpu().numpy()[self._codes(dataset)])

    def at_end(self, items: Float[Tensor, "I D"], dataset: Dataset) -> Float[Tensor, "I D"]:
        """Return the vectors with the popularity also of items of an unknown id, whose code is not theirs alone."""
        unknown = self._codes(dataset) == UNKNOWN
        if self.is_fitted and unknown.any():
            own = RecentPopularity.before(dataset, TEST).scores_at_end(self.terms) - float(self.ids.values[UNKNOWN])
            items = items.clone()
            items[:, -1] += torch.from_numpy(np.where(unknown, own, 0)).to(items)
        return items

    def order_of_items(self, dataset: Dataset) -> Shaped[Floats, "items"] | None:
        if self.terms.recent <= 0:
            return None
        return RecentPopularity.before(dataset, TEST).scores_at_end(PopularityTerms(self.terms.half_life, 1.0))

    def fit(self, dataset: Dataset, choices: Choices, before: Sequence[Column]) -> TermFit:
        """Return the columns by the half-life of the least loss. Where too few rows take an item without an earlier
        row, the choices leave these out: nothing determines the weight of such items."""
        unit = RecentScores.of_part(dataset, VALIDATION, NOTHING, np.zeros(len(dataset.items), np.float32))

        def by(**weights: float) -> F32[Tensor, "n k"]:
            return choices.of_pairs(replace(unit, terms=unit.terms._replace(**weights)).of_pairs)

        new, fixed = by(new=1.0), [Column("total", by(total=1.0), -FREE), Column("age", by(age=1.0), -FREE)]
        takes_new = new[:, 0] > 0
        if int(takes_new.sum()) >= MIN_ROWS:
            fixed.append(Column("new", new, -FREE))
        else:
            choices = choices.without(((new > 0) | takes_new[:, None]).numpy())
        tried = list[tuple[float, float, list[Column]]]()
        for half_life in half_lives_of(len(unit.popularity.items)):
            recent = Column("recent", by(half_life=half_life, recent=1.0), -FREE)
            if found := choices.weights([*before, recent, *fixed]):
                tried.append((found.loss, half_life, [recent, *fixed]))
        if not tried:
            return TermFit(choices)
        _, half_life, columns = min(tried, key=lambda one: one[0])
        return TermFit(choices, tuple(columns), (half_life,))

    def write(self, dataset: Dataset, chosen: tuple[float, ...], weights: Mapping[str, float]) -> None:
        """Give the items the recent popularity at the end of what comes before the test part. Where nothing determines
        the weight of items without a row, they gain by no age and no count."""
        half_life, *_ = chosen or NOTHING
        recent, total, age = (weights.get(name, 0.0) for name in ("recent", "total", "age"))
        new = weights.get("new", min(age, 0.0) + min(total, 0.0))
        found = PopularityTerms(half_life, recent, total, age, new)
        with torch.no_grad():
            self.numbers.copy_(torch.tensor(found))
            known, values = RecentPopularity.before(dataset, TEST), self.ids.values
            values.zero_()
            held = torch.from_numpy(known.scores_at_end(self.terms)).to(values)
            values[torch.from_numpy(self._codes(dataset)).to(values.device)] = held
            values[UNKNOWN] = self.terms.new * float(np.log1p(len(known.items)))

    def describe(self) -> str:
        half_life, recent, total, age, new = self.terms
        return f"recent popularity by a half-life of {half_life:,.0f} rows: {recent:.3g} log(1 + count)" + (
            (f" {total:+.3g} log(1 + count by all)" if total else "")
            + (f" {age:+.3g} log(1 + rows since the first)" if age else "")
            + (f", and of an item without a row {new:+.3g} log(1 + all rows)" if new else "")
        )

    def missed_in(self, side: str) -> str:
        if side != "item" or not self.is_fitted:
            return ""
        return (
            "items: the model ranks by recent popularity (scorer 'trending'), which the vectors have by the id: an "
            "item that training lacks, or has fewer than min_count rows of, counts as one without a row; the index of "
            "a bundle reads its rows: publish the run for these"
        )

    def _codes(self, dataset: Dataset) -> Shaped[Ints, "items"]:
        """Return the code of the id of each item."""
        assert self.ids.field is not None
        return np.asarray(dataset.items.columns[self.ids.field.name]).astype(np.int64)


def half_lives_of(rows: int) -> list[float]:
    """Return the half-lives that are tried of a log of so many rows before validation, rising."""
    return sorted({max(1.0, float(round(share * rows))) for share in HALF_LIVES})
