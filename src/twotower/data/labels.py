"""Labels and weights of interactions, from the columns of a log or its events: columns POSITIVE and WEIGHT."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import polars as pl

from twotower.errors import DataError, did_you_mean
from twotower.features.schema import OTHER_EVENTS, WEIGHT_RANGE, EventRule, Schema
from twotower.features.values import TEXT_TYPES, advice_on_text, missing_count

POSITIVE = "__positive"
"""The column of labels that checking adds to the interactions. Names that begin with '__' are reserved."""
WEIGHT = "__weight"
"""The column of weights (float32) that checking adds, if the schema names weights."""
LISTED_TYPES = 5
"""Types of events that a message lists."""


def labelled(actions: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Add the boolean column POSITIVE, from the label or the events. Raises DataError for an unusable label."""
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
    return actions.with_columns(positive.alias(POSITIVE))


def no_positives(schema: Schema, actions: pl.DataFrame | None = None) -> DataError:
    """Return the error of interactions of which no label is positive, if they are known with the largest one."""
    found = "" if actions is None else f" (the largest is {actions[schema.label].cast(pl.Float64).to_numpy().max():g})"
    return DataError(
        f"interactions: no row has '{schema.label}' above {schema.positive_above:g}{found}; set schema.positive_above"
    )


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


# ---- events


def without_ignored(actions: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Return the interactions without those of ignored events. Raises DataError for an event that the schema does not
    name."""
    if not schema.event:
        return actions
    rules = _rules(actions[schema.event], schema)
    ignored = [name for name, rule in rules.items() if rule.target == "ignored"]
    return actions.filter(~type_names(actions[schema.event]).is_in(ignored)) if ignored else actions


def event_counts(actions: pl.DataFrame, schema: Schema) -> Counter[str]:
    """Return the number of interactions of each type of events, none without a column of types. All are known to
    `without_ignored`."""
    if not schema.event:
        return Counter()
    return Counter(dict(type_names(actions[schema.event]).rename("type").value_counts(name="rows").iter_rows()))


def event_notes(counts: Mapping[str, int], schema: Schema) -> list[str]:
    """Return messages about the numbers of interactions of each type: those that are left out, those that the rule of
    all others is for, and with it the rules that no row has. Raises DataError if all are left out."""
    others = {name: n for name, n in counts.items() if name not in schema.events}
    first = sorted(others.items(), key=lambda entry: (-entry[1], entry[0]))[:LISTED_TYPES]
    listed = ", ".join(f"'{name}' {n:,}" for name, n in first)
    listed += f", and {len(others) - LISTED_TYPES:,} more" if len(others) > LISTED_TYPES else ""
    ignored = [name for name, rule in schema.events.items() if rule.target == "ignored"]
    names = ", ".join(f"others: {listed}" if name == OTHER_EVENTS else f"'{name}'" for name in ignored)
    rows, n_others, notes = sum(counts.values()), sum(others.values()), list[str]()
    n = sum(counts.get(name, 0) for name in ignored) + (n_others if OTHER_EVENTS in ignored else 0)
    if n and n == rows:
        raise DataError(
            f"interactions: all {rows:,} rows are ignored events ({names}); give a type of the log a meaning"
        )
    if n:
        notes.append(f"interactions: {n:,} of {rows:,} rows are ignored events ({names}); left out")
    if OTHER_EVENTS not in schema.events or not counts:
        return notes
    if others and OTHER_EVENTS not in ignored:
        notes.append(f"interactions: {n_others:,} of {rows:,} rows are of other events (others: {listed})")
    unused = [name for name in schema.events if name not in counts and name != OTHER_EVENTS]
    return notes + [
        f"interactions: no row is of the event '{name}' of schema.events{did_you_mean(name, others)}" for name in unused
    ]


def event_positives(events: pl.Series, schema: Schema) -> pl.Series:
    """Return (n,) booleans: True for events that are positives."""
    rules = _rules(events, schema)
    return type_names(events).is_in([name for name, rule in rules.items() if rule.positive])


def event_factors(events: pl.Series, schema: Schema) -> pl.Series:
    """Return (n,) the weights of events, of type Float64."""
    rules = _rules(events, schema)
    return type_names(events).replace_strict(
        {name: rule.factor for name, rule in rules.items()}, return_dtype=pl.Float64
    )


def event_types(events: pl.Series, schema: Schema) -> pl.Series:
    """Return (n,) the codes of the types of events in histories, of type Int32: 0 for those that the rule of all others
    is for. Raises DataError for a type without a rule."""
    _rules(events, schema)
    codes = {name: code for code, name in enumerate(schema.event_types, 1)}
    return type_names(events).replace_strict(codes, default=0, return_dtype=pl.Int32)


def _rules(events: pl.Series, schema: Schema) -> dict[str, EventRule]:
    """Return the rule of each type among events. Raises DataError for one without, missing types, or a column of
    others."""
    what = f"interactions: event '{schema.event}'"
    if not (events.dtype.is_integer() or events.dtype in (*TEXT_TYPES, pl.Boolean, pl.Null)):
        raise DataError(f"{what} holds {events.dtype}, expected text or whole numbers; cast it")
    if n := events.null_count():
        raise DataError(f"{what} has {n} missing values; fill them or drop the rows")
    found = dict[str, EventRule]()
    for name in sorted(type_names(events.unique()).to_list()):
        rule = schema.events.get(name, schema.events.get(OTHER_EVENTS))
        if rule is None:
            known = list(schema.events)
            raise DataError(
                f"{what} holds '{name}', which schema.events does not name{did_you_mean(name, known)} (named: "
                f'{", ".join(known)}); name it, or give all others a meaning by "*", such as "*" = "ignored"'
            )
        found[name] = rule
    return found


def type_names(events: pl.Series) -> pl.Series:
    """Return the types of events as text."""
    return events.cast(pl.String)
