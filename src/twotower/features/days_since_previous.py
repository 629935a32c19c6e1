"""Feature `days_since_previous`."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from pydantic import Field, field_validator

from twotower.arrays.types import Codes, Ints
from twotower.features.field import InputField
from twotower.features.moment import Moment, TrainedCodes
from twotower.features.values import bucket_codes, numbers

if TYPE_CHECKING:
    from twotower.features.schema import Schema

MICROSECONDS_OF_A_DAY = 86_400_000_000


class DaysEncoder(TrainedCodes):
    """Encoder of days as codes of buckets 1..b, 0 for missing values."""

    edges: list[float]

    def by_rule(self, series: pl.Series) -> Codes:
        return bucket_codes(numbers(series), self.edges)

    def known_values(self) -> list[float]:
        """Return the first day of each trained bucket."""
        return [[0.0, *self.edges][code - 1] for code in self.trained]

    def field(self, name: str, width: int) -> InputField:
        return InputField(name, "lookup", rows=len(self.edges) + 2, width=width)


class DaysSincePrevious(Moment):
    """Days since the user's previous interaction in buckets, each with an embedding row.

    Users without a previous interaction, and buckets without training, read the unknown row. Use it where a return
    after a month differs from a return after an hour. It needs `schema.duplicates` "keep" or "error", as "last" drops
    times. Interactions of one time, such as a basket, count from the interaction before all of them. A service reads
    the stored interactions of the user, and events with times.
    """

    kind = "days_since_previous"
    encoder = DaysEncoder

    edges: tuple[float, ...] = Field(
        (0.04, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
        min_length=1,
        description="Ends of the buckets in days, rising, above 0.",
    )
    default: float = Field(-1.0, ge=-1, description="Days of precomputed user vectors. -1: no such vectors.")

    @field_validator("edges")
    @classmethod
    def _check_edges(cls, edges: tuple[float, ...]) -> tuple[float, ...]:
        if edges[0] <= 0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"edges {list(edges)} do not rise from above 0")
        return edges

    @field_validator("default")
    @classmethod
    def _check_default(cls, days: float) -> float:
        if -1 < days < 0:
            raise ValueError(f"default is {days}, expected -1 (none) or at least 0")
        return days

    def check(self, schema: Schema) -> None:
        super().check(schema)
        if schema.duplicates == "last":
            raise ValueError(
                f"feature {self.name!r} needs the time of every interaction, and duplicates = 'last' drops those of "
                "repeated pairs; set schema.duplicates = 'keep', or 'error' for a log without repeats"
            )

    @property
    def defaults(self) -> float | None:
        return None if self.default < 0 else self.default

    def fit(self, series: pl.Series, counts: Ints) -> DaysEncoder:
        return DaysEncoder(edges=[*self.edges], trained=[]).fitted(series, counts)

    def of_times(self, times: Ints, previous: Ints) -> pl.Series:
        days = np.where(previous < 0, np.nan, (times - previous) / MICROSECONDS_OF_A_DAY)
        return pl.Series(self.source, days, nan_to_null=True)
