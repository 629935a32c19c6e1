"""Feature `day_of_week`."""

from __future__ import annotations

import polars as pl
from pydantic import Field

from twotower.arrays.types import Ints
from twotower.features.moment import ClockMoment, RangeEncoder, local_times


class DayOfWeek(ClockMoment):
    """The day of the interaction, from 1 (Monday) to 7 (Sunday), in a time zone, each with an embedding row.

    Use it where weekends differ from working days. Days without a training interaction are unknown.
    """

    kind = "day_of_week"
    encoder = RangeEncoder

    default: int = Field(0, ge=0, le=7, description="Day of precomputed user vectors, 1 to 7. 0: no such vectors.")

    @property
    def defaults(self) -> int | None:
        return self.default or None

    def fit(self, series: pl.Series, counts: Ints) -> RangeEncoder:
        return RangeEncoder(first=1, count=7, trained=[]).fitted(series, counts)

    def of_times(self, times: Ints, previous: Ints) -> pl.Series:
        return local_times(times, self.time_zone).dt.weekday().cast(pl.Int64).alias(self.source)
