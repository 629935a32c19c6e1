"""Feature `day_of_week`."""

from __future__ import annotations

import polars as pl
from pydantic import Field

from twotower.features.moment import ClockMoment


class DayOfWeek(ClockMoment):
    """The day of the interaction, from 1 (Monday) to 7 (Sunday), in a time zone, each with an embedding row.

    Use it where weekends differ from working days. Days without a training interaction are unknown.
    """

    kind = "day_of_week"
    first, count = 1, 7

    default: int = Field(0, ge=0, le=7, description="Day of precomputed user vectors, 1 to 7. 0: no such vectors.")

    def of_clock(self, times: pl.Series) -> pl.Series:
        return times.dt.weekday()
