"""Columns of the interactions: what a bucket and prepared data hold of each, and the option of the schema that asks for
it.

The contract of buckets, its reader, the writer of arrays and the prepared dataset read this table. A log in memory is
one bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import polars as pl

from twotower.features.schema import Schema

USER, ITEM, TIME, ROW, POSITIVE = "user", "item", "time", "row", "positive"
WEIGHT, EVENT, PART = "weight", "event", "part"
CONTEXT_PREFIX, VALUE_PREFIX = "context.", "value."

Columns = dict[str, npt.NDArray[Any]]
"""Columns (n,) of some interactions, by name."""


@dataclass(frozen=True)
class InteractionColumn:
    """One column of the interactions."""

    name: str
    """Name in a bucket, and of the array of prepared data."""
    types: tuple[type[pl.DataType], ...]
    """Types that the column may have in a bucket."""
    stored: str = ""
    """Type of the array of prepared data, as numpy names it. Empty: there is none."""
    option: str = ""
    """Option or property of the schema that is empty or False if the log has no such column. Empty: every bucket has
    the column, or the split asks for it."""
    of_split: bool = False
    """True for a column that the split may ask for, and no schema does."""

    def needed(self, schema: Schema) -> bool:
        """Return True if the interactions of a schema have the column."""
        return not self.of_split and (not self.option or bool(getattr(schema, self.option)))

    @property
    def optional(self) -> bool:
        """True if buckets may lack the column."""
        return self.of_split or bool(self.option)


COLUMNS = (
    InteractionColumn(USER, (pl.Int32, pl.Int64), "<i4"),
    InteractionColumn(ITEM, (pl.Int32, pl.Int64), "<i4"),
    InteractionColumn(ROW, (pl.Int64,)),
    InteractionColumn(POSITIVE, (pl.Boolean,), "?"),
    InteractionColumn(TIME, (pl.Int64,), "<i8", option="time"),
    InteractionColumn(WEIGHT, (pl.Float32, pl.Float64), "<f4", option="weighted"),
    InteractionColumn(EVENT, (pl.String,), "<i4", option="reads_types"),
    InteractionColumn(PART, (pl.Int8,), of_split=True),
)
"""Columns of the interactions. A column `value.NAME` of a bucket holds Float64, a column `context.NAME` any type."""

BY_NAME = {column.name: column for column in COLUMNS}


def stored_columns(schema: Schema) -> dict[str, str]:
    """Return the type of each array of interactions that the prepared data of a schema have, by name.

    The times of a log without any are the numbers of its rows."""
    return {c.name: c.stored for c in COLUMNS if c.stored and (c.name == TIME or c.needed(schema))}
