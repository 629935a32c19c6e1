"""Encoder of lists of values."""

from __future__ import annotations

import polars as pl
from pydantic import JsonValue

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Ints
from twotower.features.categorical import CategoricalEncoder
from twotower.features.schema import MultiHot
from twotower.features.state import EncoderState
from twotower.features.values import SINGLE_ROW_MAX_VALUES, UNKNOWN, canonical_ids, explode, lists, one_row, present


class MultiHotState(EncoderState):
    """State of a `MultiHotEncoder` without its vocabulary."""

    separator: str


class MultiHotEncoder:
    """Encoder of lists, or separated text, as rows of codes without unknown values."""

    def __init__(self, values: CategoricalEncoder, separator: str) -> None:
        self.values, self.separator = values, separator

    @classmethod
    def fit(cls, series: pl.Series, counts: Ints, feature: MultiHot) -> MultiHotEncoder:
        rows, flat = explode(series, feature.separator)
        inner = CategoricalEncoder.fit(flat, counts[rows], feature.min_count, feature.min_rate, total=int(counts.sum()))
        return cls(inner, feature.separator)

    @property
    def rows(self) -> int:
        return self.values.rows

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

    @property
    def vocabulary(self) -> pl.Series:
        return self.values.vocabulary

    def state(self) -> MultiHotState:
        return MultiHotState(separator=self.separator)

    @classmethod
    def restore(cls, state: JsonValue, vocabulary: pl.Series) -> MultiHotEncoder:
        return cls(CategoricalEncoder(vocabulary), MultiHotState.model_validate(state).separator)
