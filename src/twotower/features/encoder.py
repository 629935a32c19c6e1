"""Protocol of encoders: fitted on the training part, they map a column to the array that a tower reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, NamedTuple, Self

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from twotower.arrays.ragged import Column
from twotower.features.field import InputField

Count = Annotated[int, Field(ge=0, lt=2**31)]
"""Number of embedding rows, values or characters."""


class EncoderState(BaseModel):
    """State of an encoder without its vocabulary."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Doubt(NamedTuple):
    """Problem of an encoding."""

    text: str
    evidence: dict[str, float]


class Report(ABC):
    """Facts of how an encoder sees a column, for the log of a training and for the diagnoses."""

    fine: ClassVar[str]
    """Sentence for a report without doubts."""

    @abstractmethod
    def __str__(self) -> str:
        """Return the facts in one line."""

    @abstractmethod
    def doubts(self, name: str, test: Self) -> Iterator[Doubt]:
        """Yield the problems of a column called `name`, from the reports of its training rows and of its test rows."""


class Encoder(ABC):
    """Fitted encoder of one column."""

    reports: ClassVar[bool] = False
    """True if `report` returns facts, for which the column is read again."""

    @property
    def is_ordered(self) -> bool:
        """True if the codes of values are in the order of the values, so that neighbouring ones are near."""
        return False

    @abstractmethod
    def transform(self, series: pl.Series) -> Column:
        """Return the encoded column, a row for each value. Raises DataError for values that it cannot read."""

    @abstractmethod
    def field(self, name: str, width: int) -> InputField:
        """Return the description of an encoded column `name`, whose embedding has a width."""

    @abstractmethod
    def state(self) -> EncoderState:
        """Return all that `restore` needs besides the vocabulary, for encoders.json."""

    def stored_vocabulary(self) -> pl.Series | None:
        """Return the vocabulary, for vocabularies.arrow; None for an encoder without one."""
        return None

    def known_values(self) -> Sequence[JsonValue]:
        """Return the values that have a code of their own, to name one instead of an unknown one; empty if they are not kept."""
        vocabulary = self.stored_vocabulary()
        return [] if vocabulary is None else vocabulary.to_list()

    @classmethod
    @abstractmethod
    def restore(cls, state: JsonValue, vocabulary: pl.Series | None) -> Self:
        """Return the encoder of a state and a vocabulary. Raises pydantic's ValidationError, or KeyError without one."""

    def report(self, series: pl.Series) -> Report | None:
        """Return the facts of a column, None for an encoder without `reports`."""
        return None


class StateEncoder(EncoderState, Encoder):
    """Encoder whose fields are its state, without a vocabulary."""

    def state(self) -> EncoderState:
        return self

    @classmethod
    def restore(cls, state: JsonValue, vocabulary: pl.Series | None = None) -> Self:
        return cls.model_validate(state)
