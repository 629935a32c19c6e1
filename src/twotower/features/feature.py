"""Protocol of features: columns of a table, statistics of the training interactions, and histories.

A kind of one's own derives from `ColumnFeature`, sets `encoder` and implements `fit`. The rest has defaults here.
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
    """Interactions of a row that make a feature: the codes of their users or items, oldest first."""

    name: str
    side: SideName
    interactions: Interactions
    max_length: int
    """Number of latest interactions to keep. 0: all."""
    share_embedding: bool
    """True if the history reads the embedding of the other side's feature."""
    feature: str = ""
    """Feature of the other side that gives the codes. Empty: its ids."""
    codes: Callable[[HistoryFacts], Codes] | None = None
    """Rule of the codes from facts of the interactions. None: the codes of users or items."""
    reads_types: bool = False
    """True if the rule reads event types."""

    def holds(self, positive: Labels) -> Labels:
        """Return True for the labels of interactions that belong to the history."""
        return positive | True if self.interactions == "all" else positive == (self.interactions == "positive")


@dataclass(frozen=True)
class Statistic:
    """Number computed from the training interactions of a row, as a feature."""

    name: str
    source: str
    """Column that it adds to the side's table."""
    value: Callable[[Ints, Doubles], Doubles]
    """Map from counts (n,) of interactions and means (n,) of the averaged column, NaN for none, to numbers (n,)."""
    column: str | None = None
    """Averaged column of the interactions. Empty: the label. None: no column."""
    unseen: float | None = None
    """Number of a row without training interactions. None: missing."""


class Feature(Kind):
    """Feature of a user, an item or the context of an interaction that a tower reads."""

    name: str = Field(min_length=1, description="Name, unique within its tower.")
    side: FeatureSide = Field(
        description="Table of the values: user, item, or context, the columns of interactions that a request gives."
    )
    width: int = Field(0, ge=0, description="Embedding width. 0: the tower's.")

    encoder: ClassVar[type[Encoder]]
    """Class of the fitted encoder."""
    column_type: ClassVar[Literal["values", "numbers", "text"]] = "values"
    """Type of the column in a CSV or a request: values of a vocabulary ("007" is not 7), numbers, or text."""
    groups: ClassVar[bool] = False
    """True if the values can group items, such as by colour on a map."""
    searchable: ClassVar[bool] = False
    """True if the value can be a search text."""
    of_model: ClassVar[tuple[str, ...]] = ("width",)
    """Options that only a model reads: prepared data do not depend on them."""
    cuts: ClassVar[tuple[str, ...]] = ()
    """Options that leave rare values out of the vocabulary."""
    counts_values: ClassVar[bool] = False
    """True if `fit` depends only on the distinct values and the sums of their counts."""
    reads_time: ClassVar[bool] = False
    """True for a context feature without a column: `of_times` computes its values."""

    @property
    def source(self) -> str:
        """Column that the values are read from. Empty: none, as of a history."""
        return ""

    @property
    def history(self) -> HistorySpec | None:
        """Interactions that make the feature; None for a column."""
        return None

    @property
    def computes(self) -> Statistic | None:
        """Statistic that fills the column; None for a column of the table."""
        return None

    @property
    def shares(self) -> str:
        """Feature of the other side whose encoder and embedding this one uses. Empty: none."""
        return ""

    @property
    def added_histories(self) -> tuple[str, ...]:
        """Names of the histories whose embeddings are added to those of this history."""
        return ()

    @property
    def pools(self) -> PoolingSpec | None:
        """Pooling of the codes, the option `pooling`; None if a row has one code."""
        found: PoolingSpec | None = getattr(self, "pooling", None)
        return found

    @property
    def defaults(self) -> JsonValue:
        """Value of a context feature that a request does not give. None: the request must give it."""
        return None

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Options of `cuts` that are set and have no effect, as hash buckets need no vocabulary."""
        return self.set_options(self.cuts) if getattr(self, "hash_buckets", 0) else ()

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
        """Return the options of `names` that are not at their defaults."""
        return tuple(n for n in names if getattr(self, n) != type(self).model_fields[n].default)

    def check(self, schema: Schema) -> None:
        """Raise ValueError if the feature does not fit the schema."""

    def named_columns(self) -> Iterator[tuple[str, str]]:
        """Yield (option, column) for each table column that the options name."""
        yield from ()

    def fit(self, series: pl.Series, counts: Ints) -> Encoder:
        """Return the fitted encoder of a column. A history has none."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder of its own")

    def of_times(self, times: Ints, previous: Ints) -> pl.Series:
        """Return the values (n,), named `source`, at the `times` (n,) of interactions, in microseconds since 1970.

        `previous` (n,) are the times of each user's interaction before, -1 for none."""
        raise NotImplementedError(f"{type(self).__name__} reads no time")

    def borrow(self, encoder: Encoder) -> Encoder:
        """Return the encoder of this feature, made of the encoder of the feature that it `shares`."""
        return encoder

    def field(self, encoder: Encoder) -> InputField:
        """Return the description of the encoded column. The encoder of a history is the encoder of the ids."""
        return replace(encoder.field(self.name, self.width), pooling=self.pools or MEAN)

    def own_field(self, schema: Schema) -> InputField | None:
        """Return the description of a history without an encoder; None for any other feature."""
        return None

    def values(self, series: pl.Series) -> pl.Series:
        """Return the column as filters compare it: a list in rows with several values."""
        return series

    def request_type(self, dtype: pl.DataType) -> pl.DataType:
        """Return the type of a request's value for a column of type `dtype`."""
        return dtype


def check_times(schema: Schema, what: str) -> None:
    """Raise ValueError, about the feature `what`, if the interactions have no times."""
    if not schema.time:
        raise ValueError(f"{what} needs times; name their column in schema.time")
    if schema.time_unit == "order":
        raise ValueError(f"{what} needs times, and time_unit = 'order' has none")


class ColumnFeature(Feature):
    """Feature of one column of the side's table."""

    column: str = Field(
        "", description="Column of the side's table, or of the interactions for the context. Empty: the feature's name."
    )
    missing: Literal["impute", "error"] = Field(
        "impute",
        description="Nulls. impute: unknown value, mean, missing-value bucket, empty list or zeros. error: refuse the "
        "table.",
    )
    default: Default = Field(
        "", description="Value of the context in requests without one and in precomputed user vectors. Empty: none."
    )

    @model_validator(mode="after")
    def _check_default(self) -> Self:
        if self.default != "" and self.side != "context":
            raise ValueError("'default' goes with side = 'context'")
        return self

    @abstractmethod
    def fit(self, series: pl.Series, counts: Ints) -> Encoder:
        """Return the encoder fitted to the rows with training interactions: `counts` (n,) above 0."""

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
    """Facts of the n interactions of some histories: one history after another, oldest first in each."""

    first: Bools
    """True for the first interaction of each history."""
    types: Codes
    """Code of each event type, 0 for an unknown one."""
    times: Ints
    """Time of each interaction in microseconds since 1970, negative if unknown."""


class InteractionHistory(Feature):
    """Feature of the training interactions of a row."""

    side: SideName = Field(description="Tower that reads the feature: user or item.")
    of_model: ClassVar[tuple[str, ...]] = ("width", "pooling")

    interactions: Interactions = Field("all", description="Interactions in the sequence, by label.")
    max_length: int = Field(0, ge=0, description="Maximum length, from the latest interaction. 0: unlimited.")
    pooling: PoolingSpec = Field(MEAN, description="Pooling of the embeddings, by name or section.")

    def field(self, encoder: Encoder) -> InputField:
        return replace(super().field(encoder), kind="bag", sequence=True)


class FactHistory(InteractionHistory):
    """History whose codes follow from facts of its interactions by a rule, without an encoder.

    Its embeddings start at zeros, so that a code without training adds nothing."""

    reads_types: ClassVar[bool] = False
    """True if the codes depend on event types."""

    @property
    def history(self) -> HistorySpec:
        common = self.name, self.side, self.interactions, self.max_length
        return HistorySpec(*common, share_embedding=False, codes=self.codes, reads_types=self.reads_types)

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
