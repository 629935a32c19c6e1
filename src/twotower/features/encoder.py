"""Protocol of encoders, fitted maps from a column to the array that a tower reads."""

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
    """Problem of an encoding, with the numbers that show it."""

    text: str
    evidence: dict[str, float]


class Report(ABC):
    """Facts of an encoded column, for the training log and for diagnoses."""

    fine: ClassVar[str]
    """Sentence of a report without doubts."""

    @abstractmethod
    def __str__(self) -> str:
        """Return the facts on one line."""

    @abstractmethod
    def doubts(self, name: str, test: Self) -> Iterator[Doubt]:
        """Yield the problems of the column `name`. This is the report of its training rows, `test` of its test rows."""


class Encoder(ABC):
    """Fitted encoder of one column."""

    reports: ClassVar[bool] = False
    """True if `report` returns facts; the column is then read again."""

    @abstractmethod
    def transform(self, series: pl.Series) -> Column:
        """Return the encoded column, one row a value. Raises DataError for unreadable values."""

    @abstractmethod
    def field(self, name: str, width: int) -> InputField:
        """Return the description of the encoded column `name` with an embedding of `width`."""

    @abstractmethod
    def state(self) -> EncoderState:
        """Return the part for encoders.json: all that `restore` needs but the vocabulary."""

    def stored_vocabulary(self) -> pl.Series | None:
        """Return the vocabulary for vocabularies.arrow; None for an encoder without one."""
        return None

    def known_values(self) -> Sequence[JsonValue]:
        """Return the values with a code of their own, for hints in messages; empty if they are not stored."""
        vocabulary = self.stored_vocabulary()
        return [] if vocabulary is None else vocabulary.to_list()

    @classmethod
    @abstractmethod
    def restore(cls, state: JsonValue, vocabulary: pl.Series | None) -> Self:
        """Return the encoder of a state and a vocabulary. Raises ValidationError, or KeyError if one is missing."""

    def report(self, series: pl.Series) -> Report | None:
        """Return the facts of a column; None for an encoder without `reports`."""
        return None


class StateEncoder(EncoderState, Encoder):
    """Encoder whose fields are its state, without a vocabulary."""

    def state(self) -> EncoderState:
        return self

    @classmethod
    def restore(cls, state: JsonValue, vocabulary: pl.Series | None = None) -> Self:
        return cls.model_validate(state)
