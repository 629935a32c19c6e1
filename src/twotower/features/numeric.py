"""Encoder of numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import JsonValue

from twotower.arrays.ragged import Column
from twotower.features.state import Count, EncoderState
from twotower.features.values import UNKNOWN, numbers


class NumericState(EncoderState):
    """State of a `NumericEncoder`."""

    mean: float
    deviation: float
    edges: list[float]
    buckets: Count


class NumericEncoder:
    """Encoder of numbers as (x - mean) / deviation (n, 1), or as codes of quantile buckets 1..b, 0 for missing values."""

    def __init__(self, mean: float, deviation: float, edges: list[float], buckets: int) -> None:
        self.mean, self.deviation, self.edges, self.buckets = mean, deviation, edges, buckets

    @classmethod
    def fit(cls, series: pl.Series, used: npt.NDArray[np.bool_], buckets: int) -> NumericEncoder:
        x = numbers(series)[used]
        x = x[np.isfinite(x)]
        if not len(x):
            return cls(0.0, 1.0, [], buckets)
        edges = np.unique(np.quantile(x, np.arange(1, buckets) / buckets)).tolist() if buckets else []
        deviation = float(x.std())
        return cls(float(x.mean()), deviation if deviation > 1e-12 else 1.0, edges, buckets)

    def transform(self, series: pl.Series) -> Column:
        x = numbers(series)
        missing = ~np.isfinite(x)
        if self.buckets:
            codes = np.searchsorted(np.asarray(self.edges), x, side="right").astype(np.int32) + 1
            codes[missing] = UNKNOWN
            return codes
        x = np.where(missing, self.mean, x)
        with np.errstate(over="ignore"):  # callers check that the tower's vector is finite
            return ((x - self.mean) / self.deviation).astype(np.float32)[:, None]

    def state(self) -> NumericState:
        return NumericState(mean=self.mean, deviation=self.deviation, edges=self.edges, buckets=self.buckets)

    @classmethod
    def restore(cls, state: JsonValue) -> NumericEncoder:
        found = NumericState.model_validate(state)
        return cls(found.mean, found.deviation, found.edges, found.buckets)
