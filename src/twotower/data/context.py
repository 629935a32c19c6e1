"""Context of interactions: the columns of the log that are known at request time, and what their times tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from pydantic import JsonValue

from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Codes, Ints
from twotower.data.given_values import GivenValues
from twotower.errors import ConfigError, DataError, did_you_mean
from twotower.features.encoders import Encoders
from twotower.features.schema import Schema
from twotower.features.values import is_unknown


def context_frame(columns: pl.DataFrame, schema: Schema, user: Codes, times: Ints | None) -> pl.DataFrame:
    """Return the values of all features of the context by their sources: columns of n interactions, and values that
    features compute of their users (n,) and times (n,)."""
    made, before = [], times_before(user, times, schema)
    for feature in schema.side("context"):
        if feature.reads_time:
            assert times is not None
            assert before is not None
            made.append(feature.of_times(times, before))
    return pl.DataFrame([*columns, *made])


def times_before(user: Codes, times: Ints | None, schema: Schema) -> Ints | None:
    """Return the time (n,) of the latest interaction of the same user that is earlier than each, -1 if none is:
    interactions of one time have the same. None if no feature of the context reads times."""
    if times is None or not any(f.reads_time for f in schema.side("context")):
        return None
    order = np.lexsort((times, user))
    users, sorted_times, places = user[order], times[order], np.arange(len(order))
    begins = np.ones(len(order), np.bool_)
    begins[1:] = (users[1:] != users[:-1]) | (sorted_times[1:] != sorted_times[:-1])
    last = (
        np.maximum.accumulate(np.where(begins, places, 0)) - 1
    )  # place of the interaction before all of this user and time
    before = np.full(len(user), -1, np.int64)
    before[order] = np.where((last >= 0) & (users[last] == users), sorted_times[last], -1)
    return before


def distinct_contexts(users: Codes, columns: Mapping[str, Column], rows: Ints) -> tuple[Ints, Ints]:
    """Group interactions by user and context. Return the group (n,) of each, numbered by rising users, and the first
    interaction (G,) of each group, as places in `rows`, the rows (n,) of the encoded `columns`."""
    group = np.unique(users, return_inverse=True)[1].astype(np.int64)
    for column in columns.values():
        value = numbered(column, rows)
        group = np.unique(group * (int(value.max(initial=0)) + 1) + value, return_inverse=True)[1].astype(np.int64)
    _, first = np.unique(group, return_index=True)
    return group, first


def numbered(column: Column, rows: Ints) -> Ints:
    """Return numbers (n,) of which two are equal if and only if the rows hold equal values."""
    if isinstance(column, Ragged):
        seen: dict[bytes, int] = {}
        return np.array([seen.setdefault(column.row(row).tobytes(), len(seen)) for row in rows.tolist()], np.int64)
    values = column[rows]
    found: Ints = np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)
    return found.astype(np.int64)


def check_defaults(encoders: Encoders, frame: pl.DataFrame) -> None:
    """Raise DataError if a default of a feature of the context is no value of its column, or none that training has;
    `frame` has the columns' types."""
    features = [f for f in encoders.schema.side("context") if f.defaults is not None]
    values = GivenValues(encoders, features, frame)
    for f in features:
        column = values.column(f.source, f.defaults)
        if column is None:
            raise DataError(f"feature '{f.name}': default is {f.defaults!r}, expected {values.expected(f.source)}")
        encoded = values.encode(f, column)
        if len(encoded) and is_unknown(encoded):
            near = _nearest(f.defaults, encoders.by_side["context"][f.name].known_values())
            raise DataError(f"feature '{f.name}': default is {f.defaults!r}, which no training interaction has{near}")


def _nearest(value: JsonValue, known: Sequence[JsonValue]) -> str:
    """Return which known value is nearest to another, as words; nothing if none is near."""
    if isinstance(value, list):
        value = value[0]
    close = [k for k in known if isinstance(k, int | float)]
    if close and isinstance(value, int | float):
        return f"; the nearest is {min(close, key=lambda k: abs(k - value))}"
    return did_you_mean(str(value), map(str, known))


def default_context(encoders: Encoders, frame: pl.DataFrame) -> dict[str, Column]:
    """Return the encoded defaults of all features of the context, as columns of one row; `frame` has the columns'
    types. Raises ConfigError if a feature has none."""
    features = encoders.schema.side("context")
    if without := [f.name for f in features if f.defaults is None]:
        raise ConfigError(
            f"the model reads the context, and feature '{without[0]}' has no default: a user has a vector for each "
            "context, not one; use method 2 (online user tower), or declare a default for each feature of the context"
        )
    values, out = GivenValues(encoders, features, frame), dict[str, Column]()
    for f in features:
        column = values.column(f.source, f.defaults)
        assert column is not None
        out[f.name] = encoders.encode(f, column)
    return out
