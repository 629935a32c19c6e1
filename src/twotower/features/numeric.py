"""Feature `numeric`: a number of a column, or a statistic of the training interactions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from twotower.arrays.ragged import Column
from twotower.arrays.types import Doubles, Ints
from twotower.errors import DataError
from twotower.features.encoder import Count, StateEncoder
from twotower.features.feature import ColumnFeature, Statistic
from twotower.features.field import InputField
from twotower.features.values import bucket_codes, numbers


class NumericEncoder(StateEncoder):
    """Encoder of numbers as (x - mean) / deviation (n, 1), or as codes of quantile buckets 1..b, 0 if missing."""

    mean: float
    deviation: float
    edges: list[float]
    buckets: Count

    def transform(self, series: pl.Series) -> Column:
        x = numbers(series)
        if self.buckets:
            return bucket_codes(x, self.edges)
        x = np.where(np.isfinite(x), x, self.mean)
        with np.errstate(over="ignore"):  # callers check that the tower's vector is finite
            return ((x - self.mean) / self.deviation).astype(np.float32)[:, None]

    def field(self, name: str, width: int) -> InputField:
        if self.buckets:
            return InputField(name, "lookup", rows=len(self.edges) + 2, width=width)
        return InputField(name, "dense", length=1, width=width)


class Numeric(ColumnFeature):
    """A number x, standardised as (x - mean) / deviation or cut into quantile buckets; or a statistic of interactions.

    Use it for amounts, ages, prices and counts; with buckets where the effect is no straight line, as the effect of an
    age. A missing number is the mean, or with buckets a row of its own. Statistics see the training part only: "count"
    is log(1 + n) of n interactions, "mean" averages `statistic_column`.
    """

    kind = "numeric"
    encoder = NumericEncoder
    column_type = "numbers"

    buckets: int = Field(
        0, ge=0, le=1_000_000, description="Number of quantile buckets with embeddings. 0: standardise."
    )
    statistic: Literal["", "count", "mean"] = Field(
        "", description="Statistic of the training interactions instead of a column. Empty: none."
    )
    statistic_column: str = Field(
        "", description="Column of the interactions that the statistic 'mean' averages. Empty: the label."
    )

    @model_validator(mode="after")
    def _check(self) -> Numeric:
        if self.buckets == 1:
            raise ValueError("buckets must be 0 (standardise) or at least 2")
        if self.statistic_column and self.statistic != "mean":
            raise ValueError("'statistic_column' only goes with statistic = 'mean'")
        if self.statistic and self.side == "context":
            raise ValueError("a statistic is of users or items; set side = 'user' or 'item'")
        if self.statistic and self.column:
            raise ValueError("'column' does not go with a statistic; 'statistic_column' names the averaged column")
        return self

    @property
    def source(self) -> str:
        """Column of the values. A statistic has a column of its own."""
        return f"__{self.statistic}:{self.name}" if self.statistic else super().source

    @property
    def computes(self) -> Statistic | None:
        if self.statistic == "count":
            return Statistic(self.name, self.source, _log_count, unseen=0.0)
        return Statistic(self.name, self.source, _mean, self.statistic_column) if self.statistic else None

    @property
    def has_code(self) -> bool:
        return bool(self.buckets)

    def named_columns(self) -> Iterator[tuple[str, str]]:
        yield from super().named_columns()
        yield "statistic_column", self.statistic_column

    def fit(self, series: pl.Series, counts: Ints) -> NumericEncoder:
        x = numbers(series)[counts > 0]
        x = x[np.isfinite(x)]
        if not len(x):
            return NumericEncoder(mean=0.0, deviation=1.0, edges=[], buckets=self.buckets)
        with np.errstate(over="ignore", invalid="ignore"):
            mean, deviation = float(x.mean()), float(x.std())
        if not math.isfinite(deviation):
            if not self.buckets:
                raise DataError(
                    f"feature '{self.name}': values as large as {np.abs(x).max():.3g} have no standard deviation, and "
                    "all others would be equal; leave them out, or set buckets"
                )
            mean, deviation = 0.0, 1.0
        return NumericEncoder(
            mean=mean,
            deviation=deviation if deviation > 1e-12 else 1.0,
            edges=np.unique(np.quantile(x, np.arange(1, self.buckets) / self.buckets)).tolist() if self.buckets else [],
            buckets=self.buckets,
        )


def _log_count(counts: Ints, means: Doubles) -> Doubles:
    return np.log1p(counts.astype(np.float64))


def _mean(counts: Ints, means: Doubles) -> Doubles:
    return means
