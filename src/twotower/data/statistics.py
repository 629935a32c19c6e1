"""Statistics of the training interactions as columns of users and items."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from twotower.arrays.types import Codes, Doubles, Ints
from twotower.data.tables import POSITIVE
from twotower.features.schema import Numeric, Schema, SideName


def with_statistics(
    frame: pl.DataFrame, schema: Schema, side: SideName, counts: Ints, mean: Callable[[Numeric], Doubles]
) -> pl.DataFrame:
    """Add a column for each numeric feature that is a statistic of the training interactions.

    `counts` (n,) are the interactions of each row; `mean(feature)` returns the means (n,), NaN without interactions."""
    for f in schema.side(side):
        if isinstance(f, Numeric) and f.statistic:
            values = np.log1p(counts.astype(np.float64)) if f.statistic == "count" else mean(f)
            frame = frame.with_columns(pl.Series(f.source, values))
    return frame


def mean_by_row(feature: Numeric, schema: Schema, n: int, rows: Codes, actions: pl.DataFrame) -> Doubles:
    """Return the mean (n,) of a column of the interactions for each of n rows, NaN without finite values."""
    values = actions[feature.statistic_column or schema.label or POSITIVE].cast(pl.Float64).to_numpy()
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means: Doubles = np.bincount(rows[known], values[known], n) / np.bincount(rows[known], minlength=n)
    return means
