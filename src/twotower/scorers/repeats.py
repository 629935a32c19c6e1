"""Scorer `repeats`: the items that a user has taken before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import pair_keys
from twotower.arrays.types import Doubles, Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.errors import ConfigError
from twotower.evaluation.added_scores import AddedScores, SparseScores
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import CatalogueScorer
from twotower.evaluation.own_items import HistoryTerm, Recency, rows_of_codes
from twotower.features import sequence
from twotower.features.feature import HistorySpec
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.two_tower import ModelConfig
from twotower.scorers.choices import Choices
from twotower.scorers.logit import FREE, Column
from twotower.scorers.scorer import Addition, FittedTerm, TermFit, TermScorer

if TYPE_CHECKING:
    from twotower.features.schema import Schema

NAME = "repeats"
PRIORS = (10.0, 1.0, 0.1)
"""Interactions with an item at which its own share of repeats weighs as much as that of all items: where shares of
items differ much, a low number keeps apart what is bought once (docs/log.md)."""
SMALL = 0.2
"""Unit of an item's sum within its logarithm, in mean sums: the likelihood of what users took is nearly the same from
.1 to .3, and lower beyond (docs/log.md)."""
RECENCIES = (
    *(Recency(exponent=exponent) for exponent in (0.1, 0.25, 0.5, 1.0, 2.0)),
    *(Recency(rate=0.5 ** (1 / half_life)) for half_life in (400, 200, 100, 50, 25, 12, 6, 3, 1)),
)
"""Recencies that are tried in addition to equal counts where the log has times."""


class Repeats(TermScorer):
    """Own counts: an item of the user's history scores by how often and how lately the user took it, times the share of
    its interactions that repeat an earlier one (Hu et al. 2020, "Modeling Personalized Item Frequency Information for
    Next-basket Recommendation").

    Use it where users take items again: `schema.duplicates = "keep"`, `evaluation.repeats = "allow"`. No vector holds
    these scores; a retriever adds them to the user's own items.
    """

    kind, label = NAME, "own counts"

    history: str = Field("", description="Name of the scorer's sequence, which a written config has. Empty: a new one.")

    @property
    def reads(self) -> str:
        return self.history

    def addition(self, schema: Schema, name: str) -> Addition:
        if self.history:
            return Addition(term=self)
        history = sequence.Sequence(name=name, side="user", interactions="positive", share_embedding=False)
        return Addition((history,), term=self.model_copy(update={"history": name}))

    def term(self, user_fields: tuple[InputField, ...], item_fields: tuple[InputField, ...]) -> OwnCounts:
        return OwnCounts(user_fields, self.history)

    def check(self, dataset: Dataset, model: ModelConfig, evaluation: EvaluationConfig) -> None:
        spec = next((h for h in dataset.schema.histories("user") if h.name == self.history), None)
        if spec is None or spec.feature or spec.codes or not _holds_taken(dataset, spec):
            raise ConfigError(
                f"the scorer 'repeats' has history = '{self.history}', which does not hold what users took, a code for "
                "each item; leave history out, and the scorer has one of its own"
            )
        if dataset.schema.duplicates != "keep":
            raise ConfigError(
                "the scorer 'repeats' scores what users take again, and schema.duplicates = "
                f"'{dataset.schema.duplicates}' leaves none of it; set schema.duplicates = 'keep', or leave it out"
            )
        if evaluation.repeats == "exclude":
            raise ConfigError(
                "the scorer 'repeats' scores what users take again, and evaluation.repeats = 'exclude' "
                "ranks none of it; set evaluation.repeats = 'allow', or leave it out"
            )

    @classmethod
    def alone(
        cls, dataset: Dataset, part: int, config: EvaluationConfig, added: Sequence[AddedScores]
    ) -> CatalogueScorer | None:
        if config.repeats == "exclude" or dataset.schema.duplicates != "keep":
            return None
        return OwnItemsAlone(dataset, part)


@dataclass(frozen=True)
class OwnItemsAlone(CatalogueScorer):
    """Scores of what each user took before a part: the most frequent first, equal counts by the latest time, then by
    item row; -inf for all other items. With weights a count is the sum of theirs."""

    dataset: Dataset
    part: int

    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        dataset, taken = self.dataset, self.dataset.interacted_items
        assert taken.source is not None
        at, lengths = taken.indices(users)
        owner, rows = np.repeat(np.arange(len(users)), lengths), taken.source[at].astype(np.int64)
        pairs = dataset.pairs.take(rows)
        keep = (dataset.parts[rows] < self.part) & pairs.target
        owner, rows, pairs = owner[keep], rows[keep], pairs.take(keep)
        cells, which = np.unique(pair_keys(owner, pairs.item, len(dataset.items)), return_inverse=True)
        count, last = np.bincount(which, pairs.weight, len(cells)), np.zeros(len(cells), np.int64)
        np.maximum.at(last, which, dataset.times[rows])
        of = cells // len(dataset.items)
        order = np.lexsort((cells, -last, -count, of))
        place = np.empty(len(cells))
        place[order] = np.arange(len(cells)) - np.searchsorted(of, of)
        found = torch.full((len(users), len(dataset.items)), -torch.inf)
        found.view(-1)[torch.from_numpy(cells)] = torch.from_numpy(-place).float()
        return found


class OwnCounts(FittedTerm):
    """Weight of each code of a history of the users.

    The score of an item is factor * log(1 + s). The n-th latest interaction of a user adds the weight of its code times
    rate^(n - 1) n^-exponent to the sum s of its item. No vector holds these scores: rankings add them.
    """

    def __init__(self, fields: tuple[InputField, ...], history: str) -> None:
        """Find the history by its name among the fields of the users. Raises ConfigError."""
        super().__init__(NAME)
        self.history = history
        field = next((f for f in fields if f.name == history and f.sequence), None)
        if field is None:
            found = ", ".join(f.name for f in fields if f.sequence) or "none"
            raise ConfigError(
                f"the scorer 'repeats' has history = '{history}', which is no history of the users (found: {found}); "
                "name a feature of kind 'sequence', or leave it out"
            )
        self.weights = nn.Parameter(torch.zeros(field.rows), requires_grad=False)
        self.rate = nn.Parameter(torch.ones(()), requires_grad=False)
        self.exponent = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.factor = nn.Parameter(torch.zeros(()), requires_grad=False)

    @property
    def is_fitted(self) -> bool:
        return bool(self.factor and self.weights.any())

    def served(self) -> HistoryTerm | None:
        if not self.is_fitted:
            return None
        recency = Recency(float(self.rate), float(self.exponent))
        return HistoryTerm(self.history, self.weights.cpu().numpy(), float(self.factor), recency)

    def added(self, dataset: Dataset, part: int) -> SparseScores | None:
        return self._scores(dataset, part, term) if (term := self.served()) else None

    def usual(self, dataset: Dataset) -> SparseScores | None:
        return self._by(dataset, Recency(), PRIORS[0])[0]

    def fit(self, dataset: Dataset, choices: Choices, before: Sequence[Column]) -> TermFit:
        """Return the column of the least loss, by the prior of equal counts and then by the recency; none if nobody
        takes an item again."""
        best = (math.inf, TermFit(choices))

        def fits(prior: float, recency: Recency) -> None:
            nonlocal best
            scores, weights = self._by(dataset, recency, prior)
            column = Column(NAME, choices.of_pairs(scores.of_pairs), -FREE)
            if weights.any() and (found := choices.weights([*before, column])) and found.loss < best[0]:
                best = found.loss, TermFit(choices, (column,), (*recency, prior))

        for prior in PRIORS:
            fits(prior, Recency())
        if best[1].columns and dataset.schema.time:
            prior = best[1].chosen[-1]
            for recency in RECENCIES:
                fits(prior, recency)
        return best[1]

    def write(self, dataset: Dataset, chosen: tuple[float, ...], weights: Mapping[str, float]) -> None:
        *numbers, prior = chosen or (*Recency(), PRIORS[0])
        recency = Recency(*numbers)
        with torch.no_grad():
            self.weights.copy_(torch.from_numpy(self._by(dataset, recency, prior)[1]))
            for number, value in zip((self.rate, self.exponent), recency, strict=True):
                number.fill_(value)
            self.factor.fill_(weights.get(NAME, 0.0))

    def describe(self) -> str:
        return f"own counts by rate {float(self.rate):.4g} and exponent {float(self.exponent):g}"

    def missed_in(self, side: str) -> str:
        if side != "user" or not self.is_fitted:
            return ""
        return (
            "users: the model adds own counts (scorer 'repeats') to the product of the vectors: an index of other "
            "software ranks without them"
        )

    def _by(self, dataset: Dataset, recency: Recency, prior: float) -> tuple[SparseScores, Shaped[Floats, "codes"]]:
        """Return the scores of the factor 1 that the histories before validation add by a recency, and the weights of
        the codes: their shares of repeats, in units of SMALL times the mean sum of an item."""
        term = HistoryTerm(
            self.history, shares_of_repeats(dataset, self.history, len(self.weights), prior), 1.0, recency
        )
        sums = np.expm1(self._scores(dataset, VALIDATION, term).values)
        if len(sums) and (mean := float(sums.mean())):
            term = term._replace(weights=term.weights / np.float32(SMALL * mean))
        return self._scores(dataset, VALIDATION, term), term.weights

    def _scores(self, dataset: Dataset, part: int, term: HistoryTerm) -> SparseScores:
        histories, spec = _histories(dataset, self.history, part)
        return SparseScores.of(histories, rows_of_codes(dataset, spec, len(term.weights)), term, len(dataset.items))


def _holds_taken(dataset: Dataset, spec: HistorySpec) -> bool:
    """Return True for a history of positives alone, in which each known item has a code of its own."""
    codes = dataset.encoders.history_codes(spec, dataset.items.frame)
    known = codes[codes != UNKNOWN]
    all_taken = spec.interactions == "positive" or (spec.interactions == "all" and bool(dataset.pairs.labels.all()))
    return all_taken and len(np.unique(known)) == len(known)


def shares_of_repeats(dataset: Dataset, name: str, n_codes: int, prior: float) -> Shaped[Floats, "codes"]:
    """Return for each code the share of its training interactions that repeat an earlier one of their user, shrunk
    towards the share of all (Hu et al. 2020)."""
    histories, _ = _histories(dataset, name, VALIDATION)
    codes = histories.values.astype(np.int64)
    first = np.unique(histories.owners * n_codes + codes, return_index=True)[1]
    again = np.ones(len(codes), bool)
    again[first] = False
    taken, repeats = np.bincount(codes, minlength=n_codes), np.bincount(codes[again], minlength=n_codes)
    taken[UNKNOWN] = repeats[UNKNOWN] = 0
    of_all = repeats.sum() / max(1, taken.sum())
    shares: Doubles = (repeats + prior * of_all) / (taken + prior)
    shares[UNKNOWN] = 0
    return shares.astype(np.float32)


def _histories(dataset: Dataset, name: str, part: int) -> tuple[Ragged, HistorySpec]:
    """Return a history of the users, as it is known before a part, and what it holds."""
    spec = next(h for h in dataset.schema.histories("user") if h.name == name)
    histories = dataset.side_before("user", part).columns[name]
    assert isinstance(histories, Ragged)
    return histories, spec
