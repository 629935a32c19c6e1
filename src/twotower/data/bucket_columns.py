"""Interactions with the columns of a bucket, which a log in memory is, and a piece of a larger one is cut into."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from twotower.data import labels
from twotower.data.interaction_columns import (
    CONTEXT_PREFIX,
    EVENT,
    ITEM,
    PART,
    POSITIVE,
    ROW,
    TIME,
    USER,
    VALUE_PREFIX,
    WEIGHT,
    Columns,
)
from twotower.data.labels import event_types, type_names
from twotower.data.reading import times
from twotower.data.tables import averaged_columns
from twotower.data.unknown_ids import rows_of_ids
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName


def bucket_columns(
    interactions: pl.DataFrame, row: pl.Series, sides: Mapping[SideName, pl.DataFrame], schema: Schema,
    parts: pl.Series | None
) -> pl.DataFrame:  # fmt: skip
    """Return checked interactions (n,) with the columns of a bucket, without those of ids that a side lacks. `row` has
    their places in the log, `parts` their given parts."""
    at = {
        side: rows_of_ids(interactions[key], sides[side][key]).cast(pl.Int32)
        for side, key in ((side, schema.id_column(side)) for side in SIDES)
    }
    found = {USER: at["user"], ITEM: at["item"], POSITIVE: interactions[labels.POSITIVE], ROW: row}
    if schema.time:
        found[TIME] = interactions[times.TIME]
    if parts is not None:
        found[PART] = parts
    if schema.weighted:
        found[WEIGHT] = interactions[labels.WEIGHT]
    if schema.reads_types:
        found[EVENT] = type_names(interactions[schema.event])
    found |= {VALUE_PREFIX + a: labels.averaged_values(interactions, a, schema) for a in averaged_columns(schema)}
    found |= {CONTEXT_PREFIX + name: interactions[name] for name in schema.context_columns()}
    return pl.DataFrame(found).drop_nulls([USER, ITEM])


def arrays_of(bucket: pl.DataFrame, schema: Schema) -> Columns:
    """Return the columns of a bucket as arrays, without those of the context; types of events are their codes."""
    frame = bucket.select(name for name in bucket.columns if not name.startswith(CONTEXT_PREFIX))
    if EVENT in frame.columns:
        frame = frame.with_columns(event_types(frame[EVENT], schema))
    return {column.name: column.to_numpy() for column in frame}


def context_of(bucket: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Return the columns of a bucket, or of a run, that features of the context read, by their names in the log."""
    return bucket.select(pl.col(CONTEXT_PREFIX + name).alias(name) for name in schema.context_columns())
