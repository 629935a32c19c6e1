"""A feature kind of one's own: a number that comes around again, such as an hour, a weekday or a compass direction.

    [[schema.features]]
    kind = "mykinds.features:Cyclic"
    name = "hour"
    side = "user"
    period = 24

In Python: `Schema(features=(..., Cyclic(name="hour", side="user", period=24)))`. The encoder's fields are its state,
which encoders.json keeps; an encoder with a vocabulary holds a `CategoricalEncoder`, as that of `MultiHot` does.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from pydantic import Field

from twotower.arrays.types import Floats, Ints
from twotower.features.encoder import StateEncoder
from twotower.features.feature import ColumnFeature
from twotower.features.field import InputField
from twotower.features.values import numbers


class CyclicEncoder(StateEncoder):
    """Encoder of numbers as points (n, 2) of a circle; its centre stands for missing values."""

    period: float

    def transform(self, series: pl.Series) -> Floats:
        angle = numbers(series) % self.period * (2 * np.pi / self.period)
        points: Floats = np.nan_to_num(np.stack([np.sin(angle), np.cos(angle)], axis=1)).astype(np.float32)
        return points

    def field(self, name: str, width: int) -> InputField:
        return InputField(name, "dense", length=2, width=width)


class Cyclic(ColumnFeature):
    """A number x that comes around again, as the point (sin 2πx/p, cos 2πx/p): hour 23 is as near to hour 0 as hour 1.

    Use it for times of a day, a week or a year, and for directions; `numeric` would put 23 and 0 far apart."""

    encoder = CyclicEncoder
    column_type = "numbers"

    period: float = Field(24.0, gt=0, description="Length p of a round, in the unit of the column.")

    def fit(self, series: pl.Series, counts: Ints) -> CyclicEncoder:
        return CyclicEncoder(period=self.period)
