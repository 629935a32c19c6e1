"""Base of the histories of a row: its interactions, oldest first, as codes of whatever is known of each."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from twotower.arrays.types import Bools, Codes, Ints
from twotower.features.encoder import Encoder
from twotower.features.feature import Feature, HistorySpec, Interactions
from twotower.features.field import InputField
from twotower.features.pooling_spec import MEAN, PoolingSpec
from twotower.features.side import SideName

if TYPE_CHECKING:
    from twotower.features.schema import Schema


@dataclass(frozen=True)
class HistoryFacts:
    """Facts of the n interactions of some histories, one history after another, oldest first in each."""

    first: Bools
    """True for the first interaction of each history."""
    types: Codes | None = None
    """Code of the type of each event, 0 for a type that is not known. None: the log has none, or no history reads them."""
    times: Ints | None = None
    """Time of each interaction in microseconds since 1970, negative if it is not known. None: the log has none."""


class InteractionHistory(Feature):
    """Feature of the training interactions of a row."""

    side: SideName = Field(description="Tower that reads the feature: user or item.")
    of_model: ClassVar[tuple[str, ...]] = ("width", "pooling")

    interactions: Interactions = Field("all", description="Interactions in the sequence, by label.")
    max_length: int = Field(0, ge=0, description="Maximum length, from the latest interaction. 0: unlimited.")
    pooling: PoolingSpec = Field(MEAN, description="Pooling of the embeddings, by name or section.")

    @property
    def pools(self) -> PoolingSpec:
        return self.pooling

    def field(self, encoder: Encoder) -> InputField:
        return replace(super().field(encoder), kind="bag", pooling=self.pooling, sequence=True)


class FactHistory(InteractionHistory):
    """History whose codes follow by a rule from facts of its interactions, without an encoder. Its embeddings start at zeros, so
    that a code which training lacks says nothing."""

    reads_types: ClassVar[bool] = False
    """True if the codes depend on the types of the events."""

    @property
    def history(self) -> HistorySpec:
        return HistorySpec(
            self.name,
            self.side,
            self.interactions,
            self.max_length,
            False,
            codes=self.codes,
            reads_types=self.reads_types,
        )

    @abstractmethod
    def codes(self, facts: HistoryFacts) -> Codes:
        """Return the codes (n,) of interactions."""

    @abstractmethod
    def rows(self, schema: Schema) -> int:
        """Return the number of codes."""

    def own_field(self, schema: Schema) -> InputField:
        return InputField(
            self.name,
            "bag",
            self.rows(schema),
            width=self.width,
            pooling=self.pooling,
            sequence=True,
            starts_at_zero=True,
        )
