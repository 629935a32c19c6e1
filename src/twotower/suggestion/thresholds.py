"""Labels: their thresholds by their values, and the columns of numbers that may be one."""

from __future__ import annotations

import math
from collections.abc import Iterable

import polars as pl

MAX_STEPS = 20
"""Distinct values up to which labels are steps of a scale, which has a middle."""


def threshold(series: pl.Series) -> float:
    """Return the label above which a row is a positive: the lower one of two values; 0 for values on both sides of 0; the median of the rows
    for more than MAX_STEPS values, or the second largest if the median is the largest; the middle of another scale, rounded up if it has
    whole steps above 1; 0 for no values."""
    rows = _numbers(series)
    values = rows.unique().sort()
    if values.is_empty():
        return 0.0
    low, high = float(values[0]), float(values[-1])
    if len(values) == 2:
        return low
    if low < 0 < high:
        return 0.0
    if len(values) > MAX_STEPS:
        return min(float(rows.median()), float(values[-2]))  # type: ignore[arg-type]
    middle = (low + high) / 2
    return float(math.ceil(middle)) if high > 1 else middle


def why_threshold(series: pl.Series) -> str:
    """Return the reason for that threshold."""
    values = _numbers(series).unique().sort()
    if values.is_empty():
        return "it has no values"
    if len(values) == 2:
        return f"two values: {values[1]:g} is a positive, {values[0]:g} a negative"
    if values[0] < 0 < values[-1]:
        return f"of {values[0]:g} to {values[-1]:g}, what is above 0"
    if len(values) > MAX_STEPS and _numbers(series).median() == values[-1]:
        return f"of {len(values):,} distinct values the largest, {values[-1]:g}, is half of the rows or nearly so"
    if len(values) > MAX_STEPS:
        return f"the median of {len(values):,} distinct values from {values[0]:g} to {values[-1]:g}"
    return f"the middle of {values[0]:g} to {values[-1]:g}"


def may_be_labels(frame: pl.DataFrame, named: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Return the columns of finite numbers, or of true and false, without a missing value, that are not `named`, and not constant for each
    value of a key, such as each user or each item."""
    out = []
    for series in frame.drop(named, strict=False):
        if not (series.dtype.is_numeric() or series.dtype == pl.Boolean) or len(_numbers(series)) < len(series):
            continue
        if all(frame.select(pl.struct(key, series.name).n_unique()).item() > frame[key].n_unique() for key in keys):
            out.append(series.name)
    return out


def _numbers(series: pl.Series) -> pl.Series:
    """Return the values that are finite numbers."""
    numbers = series.cast(pl.Float64)
    return numbers.filter(numbers.is_finite())
