"""Protocol of features: columns of a side's table, statistics of the training interactions, and histories.

A kind of one's own derives from `ColumnFeature`: it sets `encoder` and says how one is fitted. What else the package asks
of a feature has a default here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeVar

import polars as pl
from pydantic import Field, JsonValue, model_validator

from twotower.arrays.types import Bools, Codes, Doubles, Ints
from twotower.features.encoder import Encoder
from twotower.features.field import MEAN, InputField, PoolingSpec
from twotower.features.side import FeatureSide, SideName
from twotower.kinds import Kind

if TYPE_CHECKING:
    from twotower.features.schema import Schema


Default = bool | int | float | str | tuple[int | float | str, ...]
"""Value of a context that is not given."""
Labels = TypeVar("Labels", bool, Bools)
Interactions = Literal["all", "positive", "negative"]


@dataclass(frozen=True)
class HistorySpec:
    """Interactions of a row, by label, that make a feature: the codes of their users or items, oldest first."""

    name: str
    side: SideName
    interactions: Interactions
    max_length: int
    """Latest interactions that are kept. 0: all."""
    share_embedding: bool
    """True for the embedding of the other side's feature whose codes these are."""
    feature: str = ""
    """Feature of the other side whose codes these are. Empty: that of its ids if the embedding is shared, else a code for each
    id."""
    codes: Callable[[HistoryFacts], Codes] | None = None
    """Rule of the codes, by facts of the interactions. None: the codes are those of users or items."""
    reads_types: bool = False
    """True if the rule reads the types of events."""

    def holds(self, positive: Labels) -> Labels:
        """Return True for the labels of interactions that belong to the history."""
        return positive | True if self.interactions == "all" else positive == (self.interactions == "positive")


@dataclass(frozen=True)
class Statistic:
    """Number of a row, computed from its training interactions, that makes a feature."""

    name: str
    source: str
    """Column that it adds to the side's table."""
    value: Callable[[Ints, Doubles], Doubles]
    """Numbers (n,) of the counts (n,) of training interactions and the means (n,) of the averaged column, NaN for none."""
    column: str | None = None
    """Column of the interactions that is averaged. Empty: the label. None: none is."""
    unseen: float | None = None
    """Number of a row that training did not know. None: missing."""


class Feature(Kind):
    """Feature of a user, an item or the context of an interaction that a tower reads."""

    name: str = Field(min_length=1, description="Name, unique within its tower.")
    side: FeatureSide = Field(
        description="Table of the values. user, item: that of the users or the items. context: the interactions, whose "
        "columns are known at request time; the user tower reads them."
    )
    width: int = Field(0, ge=0, description="Embedding width. 0: that of the tower.")

    encoder: ClassVar[type[Encoder]]
    """Class of the fitted encoder."""
    column_type: ClassVar[Literal["values", "numbers", "text"]] = "values"
    """Type of the column in a CSV or a request: values of a vocabulary ("007" is not 7), numbers, or text."""
    groups: ClassVar[bool] = False
    """True if the column's values group items, such as by colours on a map."""
    searchable: ClassVar[bool] = False
    """True if a search text can be the value."""
    of_model: ClassVar[tuple[str, ...]] = ("width",)
    """Options that a model reads alone: they may change over data prepared before."""
    cuts: ClassVar[tuple[str, ...]] = ()
    """Options that leave rare values out of the vocabulary."""
    counts_values: ClassVar[bool] = False
    """True if `fit` depends on the values and the sums of their counts alone, so that equal values may be one."""
    reads_time: ClassVar[bool] = False
    """True for a feature of the context that has no column: `of_times` computes its values."""

    @property
    def source(self) -> str:
        """Column of the side's table, for the context of the interactions, that the values are read from. Empty: none, a
        history."""
        return ""

    @property
    def history(self) -> HistorySpec | None:
        """Interactions that make the feature, None for a column."""
        return None

    @property
    def computes(self) -> Statistic | None:
        """Statistic that fills the column, None for a column of the table."""
        return None

    @property
    def shares(self) -> str:
        """Feature of the other side whose encoder and embedding this one uses. Empty: none."""
        return ""

    @property
    def holds_beside(self) -> tuple[str, ...]:
        """Sequences of the same interactions whose embeddings are added to its own, of a history."""
        return ()

    @property
    def pools(self) -> PoolingSpec | None:
        """Pooling of the codes, if a row has many."""
        return None

    @property
    def defaults(self) -> JsonValue:
        """Value of a request that gives none, of a feature of the context. None: the request must give it."""
        return None

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Options of `cuts` that are set and cut nothing, as hash buckets take the place of a vocabulary."""
        return ()

    @property
    def identifies(self) -> bool:
        """True if every known value of the column has a code of its own."""
        return False

    @property
    def has_code(self) -> bool:
        """True if a row has one code, so that histories may hold it."""
        return self.identifies

    @property
    def refuses_missing(self) -> bool:
        """True if a missing value is an error."""
        return False

    def set_options(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of the options `names` that are not at their defaults."""
        return tuple(n for n in names if getattr(self, n) != type(self).model_fields[n].default)

    def check(self, schema: Schema) -> None:
        """Raise ValueError if the feature does not fit the schema."""

    def named_columns(self) -> Iterator[tuple[str, str]]:
        """Yield option and column for each column of a table that the options name."""
        yield from ()

    def fit(self, series: pl.Series, counts: Ints) -> Encoder:
        """Return the encoder of a column. A history has none of its own."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder of its own")

    def of_times(self, times: Ints, previous: Ints) -> pl.Series:
        """Return the values (n,), called `source`, of a feature that `reads_time`: of the times (n,) of interactions, and of the
        latest earlier time of an interaction of each one's user, -1 for none, in microseconds since 1970."""
        raise NotImplementedError(f"{type(self).__name__} reads no time")

    def borrow(self, encoder: Encoder) -> Encoder:
        """Return the encoder of this feature, from that of the feature that it `shares`."""
        return encoder

    def field(self, encoder: Encoder) -> InputField:
        """Return the description of the column that the feature's encoder, for a history that of the ids, makes."""
        return encoder.field(self.name, self.width)

    def own_field(self, schema: Schema) -> InputField | None:
        """Return the description of a history whose codes no encoder makes, None for any other feature."""
        return None

    def values(self, series: pl.Series) -> pl.Series:
        """Return the column with a list in the rows that hold several values, as filters compare them."""
        return series

    def request_type(self, dtype: pl.DataType) -> pl.DataType:
        """Return the type of a value in a request, for a column of a type."""
        return dtype


class ColumnFeature(Feature):
    """Feature of one column of the side's table."""

    column: str = Field(
        "", description="Column of the side's table, for the context of the interactions. Empty: the feature's name."
    )
    missing: Literal["impute", "error"] = Field(
        "impute",
        description="Treatment of nulls. impute: unknown value, training mean, missing-value bucket, empty list or "
        "zeros. error: refuse the table.",
    )
    default: Default = Field(
        "",
        description="Value of a context that a request does not give, and of precomputed user vectors. Empty: the request must "
        "give it, and there are no precomputed vectors.",
    )

    @model_validator(mode="after")
    def _check_default(self) -> Self:
        if self.default != "" and self.side != "context":
            raise ValueError("'default' goes with side = 'context'")
        return self

    @abstractmethod
    def fit(self, series: pl.Series, counts: Ints) -> Encoder:
        """Return the encoder of a column, learnt from the rows with training interactions: `counts` (n,) above 0."""

    @property
    def source(self) -> str:
        return self.column or self.name

    @property
    def refuses_missing(self) -> bool:
        return self.missing == "error"

    @property
    def defaults(self) -> JsonValue:
        return None if self.default == "" else [*self.default] if isinstance(self.default, tuple) else self.default

    def named_columns(self) -> Iterator[tuple[str, str]]:
        if not self.computes:
            yield "column" if self.column else "name", self.source


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
