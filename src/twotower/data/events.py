"""Types of the events of the interactions: rows that are left out, positives and weights.

Tables in memory and prepared data call the same functions, the latter for one piece of the log at a time.
"""

from __future__ import annotations

import polars as pl

from twotower.errors import DataError, did_you_mean
from twotower.features.events import OTHER_EVENTS, EventRule
from twotower.features.schema import Schema


def without_ignored(actions: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Return the interactions without those of ignored events. Raises DataError for an event that the schema does not name."""
    if not schema.event:
        return actions
    rules = _rules(actions[schema.event], schema)
    ignored = [name for name, rule in rules.items() if rule.target == "ignored"]
    return actions.filter(~_names(actions[schema.event]).is_in(ignored)) if ignored else actions


def ignored_notes(n: int, rows: int, schema: Schema) -> list[str]:
    """Return the message about `n` of `rows` interactions that are left out, none for 0. Raises DataError if it is all."""
    if not n:
        return []
    ignored = [name for name, rule in schema.events.items() if rule.target == "ignored"]
    names = ", ".join("others" if name == OTHER_EVENTS else f"'{name}'" for name in ignored)
    if n == rows:
        raise DataError(
            f"interactions: all {rows:,} rows are ignored events ({names}); give a type of the log a meaning"
        )
    return [f"interactions: {n:,} of {rows:,} rows are ignored events ({names}); left out"]


def event_positives(events: pl.Series, schema: Schema) -> pl.Series:
    """Return (n,) booleans: True for events that are positives."""
    rules = _rules(events, schema)
    return _names(events).is_in([name for name, rule in rules.items() if rule.positive])


def event_factors(events: pl.Series, schema: Schema) -> pl.Series:
    """Return (n,) the weights of events, of type Float64."""
    rules = _rules(events, schema)
    return _names(events).replace_strict({name: rule.factor for name, rule in rules.items()}, return_dtype=pl.Float64)


def _rules(events: pl.Series, schema: Schema) -> dict[str, EventRule]:
    """Return the rule of each type among events. Raises DataError for one without, missing types, or a column of others."""
    what = f"interactions: event '{schema.event}'"
    if not (events.dtype.is_integer() or events.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)):
        raise DataError(f"{what} holds {events.dtype}, expected text or whole numbers; cast it")
    if n := events.null_count():
        raise DataError(f"{what} has {n} missing values; fill them or drop the rows")
    found = dict[str, EventRule]()
    for name in sorted(_names(events.unique()).to_list()):
        rule = schema.events.get(name, schema.events.get(OTHER_EVENTS))
        if rule is None:
            known = list(schema.events)
            raise DataError(
                f"{what} holds '{name}', which schema.events does not name{did_you_mean(name, known)} (named: "
                f'{", ".join(known)}); name it, or give all others a meaning by "*", such as "*" = "ignored"'
            )
        found[name] = rule
    return found


def _names(events: pl.Series) -> pl.Series:
    return events.cast(pl.String)
