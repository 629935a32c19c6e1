"""Labels and weights of interactions, from the columns of a log or its events: columns POSITIVE and WEIGHT."""

from __future__ import annotations

import math

import numpy as np
import polars as pl

from twotower.data.events import event_factors, event_positives
from twotower.errors import DataError
from twotower.features.schema import WEIGHT_RANGE, Schema
from twotower.features.values import advice_on_text, missing_count

POSITIVE = "__positive"
"""The column of labels that checking adds to the interactions. Names that begin with '__' are reserved."""
WEIGHT = "__weight"
"""The column of weights (float32) that checking adds, if the schema names weights."""


def labelled(actions: pl.DataFrame, schema: Schema, some: bool = True) -> pl.DataFrame:
    """Add the boolean column POSITIVE, from the label or the events. Raises DataError
    for an unusable label, and if `some` and no row is positive."""
    if schema.event:
        return actions.with_columns(event_positives(actions[schema.event], schema).alias(POSITIVE))
    if not schema.label:
        return actions.with_columns(pl.lit(True).alias(POSITIVE))
    series = actions[schema.label]
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean):
        raise DataError(
            f"interactions: label '{schema.label}' holds {series.dtype}, expected numbers or booleans; "
            f"{advice_on_text(series)}; a column of words, such as yes and no, belongs in schema.event"
        )
    if n := missing_count(series):
        raise DataError(f"interactions: label '{schema.label}' has {n} missing values; fill them or drop the rows")
    positive = series.cast(pl.Float64) > schema.positive_above
    if some and not positive.any():
        raise DataError(
            f"interactions: no row has '{schema.label}' above {schema.positive_above:g} "
            f"(the largest is {series.cast(pl.Float64).to_numpy().max():g}); set schema.positive_above"
        )
    return actions.with_columns(positive.alias(POSITIVE))


def weighted(actions: pl.DataFrame, schema: Schema, what: str = "interactions") -> pl.DataFrame:
    """Add the column WEIGHT, if the interactions have weights: the column of the schema on its scale, times those of
    the events. Raises DataError for weights that are neither 0 nor in WEIGHT_RANGE."""
    if not schema.weighted:
        return actions
    factors = event_factors(actions[schema.event], schema) if schema.event else None
    if not schema.weight:
        assert factors is not None
        return actions.with_columns(factors.cast(pl.Float32).alias(WEIGHT))
    series = actions[schema.weight]
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean):
        raise DataError(
            f"{what}: weight '{schema.weight}' holds {series.dtype}, expected numbers; {advice_on_text(series)}"
        )
    given = series.cast(pl.Float64)
    scaled = given.log1p() / math.log(2) if schema.weight_scale == "log" else given
    weights = (scaled if factors is None else scaled * factors).cast(pl.Float32)
    low, high = (float(np.float32(bound)) for bound in WEIGHT_RANGE)  # the column may be of float32
    usable = ((given == 0) | given.is_between(low, high)).fill_null(False)
    if n := actions.height - int(usable.sum()):
        first = series.filter(~usable)[0]
        raise DataError(
            f"{what}: weight '{schema.weight}' has {n} values that are neither 0 nor from {WEIGHT_RANGE[0]:g} to "
            f"{WEIGHT_RANGE[1]:g} (the first: {'missing' if first is None else first}); change them or drop the rows"
        )
    return actions.with_columns(weights.alias(WEIGHT))


def averaged_values(actions: pl.DataFrame, column: str, schema: Schema) -> pl.Series:
    """Return (n,) the values of a column that a statistic averages, of type Float64. Labels of rows of weight 0 are
    missing, as these are no targets."""
    values = actions[column].cast(pl.Float64)
    if schema.weighted and column in (schema.label, POSITIVE):
        return actions.select(pl.when(pl.col(WEIGHT) > 0).then(values)).to_series().alias(column)
    return values
