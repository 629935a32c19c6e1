"""Feature `hour_of_day`."""

from __future__ import annotations

import polars as pl
from pydantic import Field

from twotower.features.moment import ClockMoment


class HourOfDay(ClockMoment):
    """The hour of the interaction, 0 to 23, in a time zone, each with an embedding row.

    Use it where demand changes during a day. Summer time counts. Hours without a training interaction are unknown.
    """

    kind = "hour_of_day"
    first, count = 0, 24

    default: int = Field(-1, ge=-1, le=23, description="Hour of precomputed user vectors. -1: no such vectors.")

    def of_clock(self, times: pl.Series) -> pl.Series:
        return times.dt.hour()
