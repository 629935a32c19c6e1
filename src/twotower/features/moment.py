"""Base of the features computed from the time of an interaction."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self
from zoneinfo import available_timezones

import numpy as np
import polars as pl
from pydantic import Field, field_validator

from twotower.arrays.types import Codes, Ints
from twotower.errors import did_you_mean
from twotower.features.encoder import Count, StateEncoder
from twotower.features.feature import Feature, check_times
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN, numbers

if TYPE_CHECKING:
    from twotower.features.schema import Schema


class TrainedCodes(StateEncoder):
    """Encoder by a fixed rule. Codes without training become unknown, as their embedding rows are untrained."""

    trained: list[Count]

    @abstractmethod
    def by_rule(self, series: pl.Series) -> Codes:
        """Return the codes (n,) by the rule, 0 for missing and unknown values."""

    def transform(self, series: pl.Series) -> Codes:
        codes = self.by_rule(series)
        return np.where(np.isin(codes, self.trained), codes, UNKNOWN).astype(np.int32)

    def fitted(self, series: pl.Series, counts: Ints) -> Self:
        """Return the encoder with the codes of rows with training interactions: `counts` (n,) above 0."""
        codes = np.unique(self.by_rule(series)[counts > 0])
        return self.model_copy(update={"trained": codes[codes != UNKNOWN].tolist()})


class RangeEncoder(TrainedCodes):
    """Encoder of the `count` whole numbers from `first` on as codes 1..`count`, 0 for all other values."""

    first: Count
    count: Count

    def by_rule(self, series: pl.Series) -> Codes:
        x = numbers(series) - (self.first - 1)
        known = (x >= 1) & (x <= self.count) & (x == np.floor(x))
        return np.where(known, x, UNKNOWN).astype(np.int32)

    def known_values(self) -> list[int]:
        return [code + self.first - 1 for code in self.trained]

    def field(self, name: str, width: int) -> InputField:
        return InputField(name, "lookup", rows=self.count + 1, width=width)


class Moment(Feature):
    """Feature of the time of an interaction, without a column. The time of a request is given, or now."""

    side: Literal["context"] = Field("context", description="context: the user tower reads the feature.")
    column_type = "numbers"
    reads_time: ClassVar[bool] = True

    @property
    def source(self) -> str:
        """Name of the computed values."""
        return f"__{self.kind}:{self.name}"

    def check(self, schema: Schema) -> None:
        check_times(schema, f"feature {self.name!r}")


class ClockMoment(Moment):
    """Feature of the clock in a time zone: one of the `count` whole numbers from `first` on."""

    encoder = RangeEncoder
    counts_values = True
    first: ClassVar[int]
    count: ClassVar[int]

    time_zone: str = Field("UTC", description="IANA name of the time zone of the clock, such as 'Europe/Zurich'.")
    default: int

    @field_validator("time_zone")
    @classmethod
    def _check_zone(cls, name: str) -> str:
        try:
            found = local_times(np.zeros(1, np.int64), name).dtype == pl.Datetime("us", name)
        except pl.exceptions.PolarsError:
            found = False
        if not found:  # polars takes an empty name for UTC
            hint = did_you_mean(name, sorted(available_timezones()))
            raise ValueError(f"no time zone '{name}'{hint} (such as UTC or Europe/Zurich)")
        return name

    @property
    def defaults(self) -> int | None:
        return None if self.default < self.first else self.default

    def fit(self, series: pl.Series, counts: Ints) -> RangeEncoder:
        return RangeEncoder(first=self.first, count=self.count, trained=[]).fitted(series, counts)

    def of_times(self, times: Ints, previous: Ints) -> pl.Series:
        return self.of_clock(local_times(times, self.time_zone)).cast(pl.Int64).alias(self.source)

    @abstractmethod
    def of_clock(self, times: pl.Series) -> pl.Series:
        """Return the values (n,) at `times` of the time zone."""


def local_times(times: Ints, zone: str) -> pl.Series:
    """Return times (n,) in microseconds since 1970 as dates of a time zone. Raises PolarsError for an unknown zone."""
    return pl.Series(times).cast(pl.Datetime("us")).dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
