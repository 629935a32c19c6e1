"""Labels: their thresholds by their values, what stands for no rating, and the columns of numbers that may be one; scales of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import polars as pl

MAX_STEPS = 20
"""Distinct values up to which labels are steps of a scale, which has a middle."""
MIN_RATINGS = 5
"""Distinct labels above 0 from which a lower one may stand for no rating."""
MIN_APART = 4
"""Multiple of the rows of the lowest rating that a label for no rating has at least."""
MIN_UNRATED = 0.05
"""Share of the rows that such a label has at least."""
MIN_TAIL = 10
"""Multiple of the median that a hundredth of the weights exceeds, from which they are read on the log scale."""


def threshold(series: pl.Series) -> float:
    """Return the label above which a row is a positive: the lower one of two values; 0 for values on both sides of 0; the median of the rows
    for more than MAX_STEPS values, or the second largest if the median is the largest; the middle of another scale, rounded up if it
    reaches above 1, but no more than its second largest; 0 for no values. A label for no rating is none of them."""
    rows = _rated(series)
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
    return min(float(math.ceil(middle)), float(values[-2])) if high > 1 else middle


def why_threshold(series: pl.Series) -> str:
    """Return the reason for that threshold."""
    rows = _rated(series)
    values = rows.unique().sort()
    if values.is_empty():
        return "it has no values"
    if len(values) == 2:
        return f"two values: {values[1]:g} is a positive, {values[0]:g} a negative"
    if values[0] < 0 < values[-1]:
        return f"of {values[0]:g} to {values[-1]:g}, what is above 0"
    if len(values) > MAX_STEPS and rows.median() == values[-1]:
        return f"of {len(values):,} distinct values the largest, {values[-1]:g}, is half of the rows or nearly so"
    if len(values) > MAX_STEPS:
        return f"the median of {len(values):,} distinct values from {values[0]:g} to {values[-1]:g}"
    apart, high = no_rating(series), float(values[-1])
    if high > 1 and math.ceil((float(values[0]) + high) / 2) > float(values[-2]):
        return f"the second largest of {values[0]:g} to {high:g}, whose middle is above it"
    is_rounded = high > 1 and (float(values[0]) + high) % 2 != 0
    return (
        f"the middle of {values[0]:g} to {values[-1]:g}"
        + (", rounded up" if is_rounded else "")
        + (f", beside {apart:g} for no rating" if apart is not None else "")
    )


def no_rating(series: pl.Series) -> float | None:
    """Return the label that stands for no rating, such as 0 or -1 beside ratings of 1 to 10; None without.

    It is the only one that is not above 0, and has many more rows than the lowest rating, which has fewer than the mean of the
    ratings. A 0, which may also be the lowest rating or a grade, has more rows than all ratings together."""
    counts = _numbers(series).alias("label").value_counts(name="rows").sort("label")
    labels, rows = counts["label"].to_list(), counts["rows"].to_list()
    if not MIN_RATINGS < len(labels) <= MAX_STEPS + 1 or not labels[0] <= 0 < labels[1]:
        return None
    own, lowest, rated = rows[0], rows[1], sum(rows[1:])
    is_apart = own >= MIN_APART * lowest and own >= MIN_UNRATED * (own + rated) and lowest < rated / len(rows[1:])
    return float(labels[0]) + 0.0 if is_apart and (labels[0] < 0 or own > rated) else None


def why_log_scale(series: pl.Series) -> str:
    """Return why weights are read on the log scale: few are many times the others. Empty: they are not."""
    weights = _numbers(series)
    weights = weights.filter(weights > 0)
    if weights.is_empty():
        return ""
    times = float(weights.quantile(0.99)) / float(weights.median())  # type: ignore[arg-type]
    return (
        f"a hundredth of its values exceeds {times:.3g} times their median (threshold {MIN_TAIL})"
        if times >= MIN_TAIL
        else ""
    )


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


def _rated(series: pl.Series) -> pl.Series:
    """Return the values that are finite numbers, without the one for no rating."""
    numbers, apart = _numbers(series), no_rating(series)
    return numbers if apart is None else numbers.filter(numbers != apart)


def _numbers(series: pl.Series) -> pl.Series:
    """Return the values that are finite numbers."""
    numbers = series.cast(pl.Float64)
    return numbers.filter(numbers.is_finite())
