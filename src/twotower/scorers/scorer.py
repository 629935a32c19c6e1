"""Protocols of the scorers: terms of the score that are added to the trained towers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor

from twotower.arrays.types import Float, Floats, Shaped
from twotower.data.dataset import Dataset
from twotower.evaluation.added_scores import AddedScores, SparseScores
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import CatalogueScorer
from twotower.evaluation.own_items import HistoryTerm
from twotower.features.feature import Feature
from twotower.features.field import InputField
from twotower.kinds import Kind
from twotower.model.term import Term
from twotower.model.two_tower import ModelConfig, PairConfig, TwoTower
from twotower.scorers.choices import Choices
from twotower.scorers.logit import Column

if TYPE_CHECKING:
    from twotower.features.schema import Schema


class Addition(NamedTuple):
    """Features, pair and term that a scorer adds to a schema and a model."""

    features: tuple[Feature, ...] = ()
    pair: PairConfig | None = None
    """Towers whose values the scorer, a closed form, solves."""
    term: TermScorer | None = None


class AddedScorer(Kind):
    """A term of the score, which the mix weights on the validation part, after the last epoch.

    Scorers are added to the score of the trained towers. With `train.epochs = 0` no tower is trained, and the scorers
    alone make the score. Each reads what it needs by itself: the positives of the users, or columns of the schema.
    """

    label: ClassVar[str] = ""
    """Name of the baseline that a registered scorer alone is in reports. Empty: it is none."""
    weighs_new_items: ClassVar[bool] = False
    """True if it has a weight for items without a row, which refuses `model.cold_item_bias`."""

    @abstractmethod
    def addition(self, schema: Schema, name: str) -> Addition:
        """Return what the scorer adds. `name` begins the names of its features. Raises ConfigError if the schema lacks
        what it reads."""

    @classmethod
    def alone(
        cls, dataset: Dataset, part: int, config: EvaluationConfig, added: Sequence[AddedScores]
    ) -> CatalogueScorer | None:
        """Return the scores of the scorer alone, a baseline of a part; None of one that is none here. `added` is what a
        model adds to its vectors."""
        return None


class TermScorer(AddedScorer):
    """A scorer without a pair of towers: a bias of the items, or scores that are added to the products of vectors."""

    @property
    def reads(self) -> str:
        """Name of the feature that the scorer reads. Empty: none."""
        return ""

    @abstractmethod
    def term(self, user_fields: tuple[InputField, ...], item_fields: tuple[InputField, ...]) -> FittedTerm:
        """Return the numbers of the term, 0 at first. Raises ConfigError if the fields lack what it reads."""

    @abstractmethod
    def check(self, dataset: Dataset, model: ModelConfig, evaluation: EvaluationConfig) -> None:
        """Raise ConfigError if the term cannot be fitted."""


class TermFit(NamedTuple):
    """Columns of a term for the mix to weight."""

    choices: Choices
    """Those that are compared from here on."""
    columns: tuple[Column, ...] = ()
    chosen: tuple[float, ...] = ()
    """Numbers in addition to weights."""


class FittedTerm(Term):
    """Numbers of a term that the mix fits."""

    moves: ClassVar[bool] = False
    """True if the scores depend on the time of a ranking."""

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """True if a score depends on it."""

    @abstractmethod
    def fit(self, dataset: Dataset, choices: Choices, before: Sequence[Column]) -> TermFit:
        """Return the columns by which the choices on validation are the likeliest, in addition to those `before`."""

    @abstractmethod
    def write(self, dataset: Dataset, chosen: tuple[float, ...], weights: Mapping[str, float]) -> None:
        """Overwrite the numbers with those of a fit and with the weights of its columns by their names. Without any the
        term adds nothing."""

    @abstractmethod
    def describe(self) -> str:
        """Return the numbers in words, for the log."""

    @abstractmethod
    def added(self, dataset: Dataset, part: int) -> AddedScores | None:
        """Return what is added to the products of vectors in a part; None if nothing is."""

    def usual(self, dataset: Dataset) -> SparseScores | None:
        """Return scores like those that will be added, in any unit; None of a term whose scores all items have."""
        return None

    def at_end(self, items: Float[Tensor, "I D"], dataset: Dataset) -> Float[Tensor, "I D"]:
        """Return the vectors of all items as they are at the end of what comes before the test part."""
        return items

    def order_of_items(self, dataset: Dataset) -> Shaped[Floats, "items"] | None:
        """Return numbers (items,) by which items are ranked for an unknown user; None if the term has none."""
        return None

    def served(self) -> HistoryTerm | None:
        """Return what a retriever adds to the items of a history; None if nothing is."""
        return None

    def missed_in(self, side: str) -> str:
        """Return what an index of other software lacks of the term that has the vectors of a side. Empty: nothing."""
        return ""


def terms_of(model: TwoTower) -> list[FittedTerm]:
    """Return the terms of a model that no tower computes."""
    return [term for term in model.terms.values() if isinstance(term, FittedTerm)]
