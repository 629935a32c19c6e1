"""Feature `multi_hot`: several values of one vocabulary."""

from __future__ import annotations

import polars as pl
from pydantic import Field, JsonValue

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Ints
from twotower.features.categorical import CategoricalEncoder
from twotower.features.encoder import Encoder, EncoderState
from twotower.features.feature import ColumnFeature
from twotower.features.field import MEAN, InputField, PoolingSpec
from twotower.features.values import (
    SINGLE_ROW_MAX_VALUES,
    TEXT_TYPES,
    UNKNOWN,
    canonical_ids,
    explode,
    lists,
    one_row,
    present,
)  # fmt: skip


class MultiHotState(EncoderState):
    """State of a `MultiHotEncoder` without its vocabulary."""

    separator: str


class MultiHotEncoder(Encoder):
    """Encoder of lists, or separated text, as rows of codes without unknown values."""

    def __init__(self, values: CategoricalEncoder, separator: str) -> None:
        self.values, self.separator = values, separator

    def transform(self, series: pl.Series) -> Ragged:
        if len(series) == 1 and self.values.has_binary_search:
            flat = lists(series, self.separator)[0]
            if flat is None or len(flat) <= SINGLE_ROW_MAX_VALUES:
                given = [] if flat is None else canonical_ids(present(flat).alias(series.name)).to_list()
                return one_row([code for value in given if (code := self.values.code(value)) != UNKNOWN])
        rows, flat = explode(series, self.separator)
        codes = self.values.transform(flat)
        known = codes != UNKNOWN
        return Ragged.from_pairs(rows[known], codes[known], len(series))

    def field(self, name: str, width: int) -> InputField:
        return InputField(name, "bag", rows=self.values.rows, width=width)

    def state(self) -> MultiHotState:
        return MultiHotState(separator=self.separator)

    def stored_vocabulary(self) -> pl.Series:
        return self.values.vocabulary

    @classmethod
    def restore(cls, state: JsonValue, vocabulary: pl.Series | None) -> MultiHotEncoder:
        values = CategoricalEncoder.restore({"hash_buckets": 0}, vocabulary)
        return cls(values, MultiHotState.model_validate(state).separator)


class MultiHot(ColumnFeature):
    """Values of one vocabulary, their embeddings pooled: a list column, or text split at `separator`.

    Use it for genres, tags and categories. With the pooling `sqrt` a value of a long list counts more than with the
    mean. A pooling that needs an order is refused. Unknown values are left out; a row without values is zeros."""

    kind = "multi_hot"
    encoder = MultiHotEncoder
    column_type = "text"
    groups = True
    counts_values = True
    cuts = ("min_count", "min_rate")
    of_model = ("width", "pooling")

    separator: str = Field("", description="Separator of a text column, such as '|'. Empty: a list column.")
    min_count: int = Field(1, ge=1, description="Minimum number of training interactions of a value in the vocabulary.")
    min_rate: float = Field(
        0.0, ge=0, lt=1, description="Minimum share of training interactions of a value in the vocabulary. 0: off."
    )
    pooling: PoolingSpec = Field(MEAN, description="Pooling of the embeddings, by name or section.")

    def fit(self, series: pl.Series, counts: Ints) -> MultiHotEncoder:
        rows, flat = explode(series, self.separator)
        inner = CategoricalEncoder.fit(flat, counts[rows], self.min_count, self.min_rate, total=int(counts.sum()))
        return MultiHotEncoder(inner, self.separator)

    def values(self, series: pl.Series) -> pl.Series:
        return lists(series, self.separator) if series.dtype in TEXT_TYPES and self.separator else series
