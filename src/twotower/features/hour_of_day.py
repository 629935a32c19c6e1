"""Feature `hour_of_day`."""

from __future__ import annotations

import polars as pl
from pydantic import Field

from twotower.arrays.types import Ints
from twotower.features.moment import ClockMoment, RangeEncoder, local_times


class HourOfDay(ClockMoment):
    """The hour of the interaction, 0 to 23, in a time zone, each with an embedding row.

    Use it where demand changes during a day. Summer time counts. Hours without a training interaction are unknown.
    """

    kind = "hour_of_day"
    encoder = RangeEncoder

    default: int = Field(-1, ge=-1, le=23, description="Hour of precomputed user vectors. -1: no such vectors.")

    @property
    def defaults(self) -> int | None:
        return None if self.default < 0 else self.default

    def fit(self, series: pl.Series, counts: Ints) -> RangeEncoder:
        return RangeEncoder(first=0, count=24, trained=[]).fitted(series, counts)

    def of_times(self, times: Ints, previous: Ints) -> pl.Series:
        return local_times(times, self.time_zone).dt.hour().cast(pl.Int64).alias(self.source)
