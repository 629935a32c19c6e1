"""Thresholds of labels, by their values."""

from __future__ import annotations

import math

import polars as pl

MAX_STEPS = 20
"""Distinct values up to which labels are steps of a scale, which has a middle."""


def threshold(series: pl.Series) -> float:
    """Return the label above which a row is a positive: of two values the lower, of values on both sides of 0 that, of more than
    MAX_STEPS values the median of the rows, of another scale its middle, rounded up if it has whole steps above 1."""
    values = series.cast(pl.Float64).unique().sort()
    low, high = float(values[0]), float(values[-1])
    if len(values) == 2:
        return low
    if low < 0 < high:
        return 0.0
    if len(values) > MAX_STEPS:
        return float(series.cast(pl.Float64).median())  # type: ignore[arg-type]
    middle = (low + high) / 2
    return float(math.ceil(middle)) if high > 1 else middle


def why_threshold(series: pl.Series) -> str:
    """Return the reason for that threshold."""
    values = series.cast(pl.Float64).unique().sort()
    if len(values) == 2:
        return f"two values: {values[1]:g} is a positive, {values[0]:g} a negative"
    if values[0] < 0 < values[-1]:
        return f"of {values[0]:g} to {values[-1]:g}, what is above 0"
    if len(values) > MAX_STEPS:
        return f"the median of {len(values):,} distinct values from {values[0]:g} to {values[-1]:g}"
    return f"the middle of {values[0]:g} to {values[-1]:g}"
