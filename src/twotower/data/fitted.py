"""Statistics, versions and encoders that a dataset learns of its train part, in memory or bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from twotower.arrays.types import Doubles, Ints, WholeNumbers
from twotower.data.context import check_defaults
from twotower.data.interaction_columns import TIME, VALUE_PREFIX, Columns
from twotower.data.splits import DROPPED, TRAIN, Parts
from twotower.data.tables import averaged_columns, with_statistics
from twotower.data.versions import Versions, check_first_versions, version_tables
from twotower.features.encoders import Encoders
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName

ReadAll = Callable[..., Iterable[tuple[Columns, Parts]]]
"""Yields users, items and named columns of the interactions of each bucket, with their parts; a log in memory is one
bucket."""


@dataclass(frozen=True)
class Fitted:
    """Tables of both sides with their statistics, and encoders."""

    frames: dict[SideName, pl.DataFrame]
    """Newest rows of both sides."""
    versions: dict[SideName, Versions]
    """Versions of the sides that have some, without columns."""
    encoders: Encoders

    @classmethod
    def on(
        cls,
        read_all: ReadAll,
        schema: Schema,
        frames: Mapping[SideName, pl.DataFrame],
        versions: Mapping[SideName, pl.DataFrame],
        counts: Mapping[SideName, Ints],
        context: Mapping[str, tuple[pl.Series, Ints]],
        example: pl.DataFrame,
    ) -> Fitted:
        """Fit on interactions. `frames` are the tables, and `versions` the tables of versions of sides that have some;
        `counts` are the training interactions of each row of a side. `context` has values of the features of the
        context, with their counts, and `example` the types of the columns that they read.

        Raises DataError if a feature refuses missing values, and an interaction is older than its row's versions."""
        sums = _sums(read_all, schema, counts)
        with_own = {
            side: with_statistics(frames[side], schema, side, counts[side], {a: sums[a][side] for a in sums})
            for side in SIDES
        }
        of = version_tables(versions, with_own, schema)
        every, train = ({side: np.zeros(len(v), np.int64) for side, v in of.items()} for _ in range(2))
        for found, parts in read_all(TIME) if of else ():
            for side, of_side in of.items():
                seen = of_side.at(found[side], found[TIME])
                every[side] += np.bincount(seen[parts != DROPPED], minlength=len(of_side))
                train[side] += np.bincount(seen[parts == TRAIN], minlength=len(of_side))
        check_first_versions(of, every, schema)
        tables = with_own | {side: of_side.frame for side, of_side in of.items()}
        encoders = Encoders.fit(schema, tables, {**counts, **train}, context)
        check_defaults(encoders, example)
        return cls(with_own, of, encoders)

    @property
    def item_table(self) -> pl.DataFrame:
        """The table whose rows `item_rows` gives: of versions, or of the newest rows."""
        return self.versions["item"].frame if "item" in self.versions else self.frames["item"]

    def item_rows(self, found: Columns) -> WholeNumbers:
        """Return the row (n,) of `item_table` that each interaction of a bucket sees."""
        rows: WholeNumbers = found["item"]
        return self.versions["item"].at(rows, found[TIME]) if "item" in self.versions else rows


def _sums(read_all: ReadAll, schema: Schema, counts: Mapping[SideName, Ints]) -> dict[str, dict[SideName, Doubles]]:
    """Return the sums and the numbers (2, rows) of the finite values of averaged columns over the train part, by column
    and side. They are added in the order of the interactions, so that rounding does not depend on the buckets."""
    columns = averaged_columns(schema)
    sums: dict[str, dict[SideName, Doubles]] = {
        a: {side: np.zeros((2, len(counts[side]))) for side in SIDES} for a in columns
    }
    for found, parts in read_all(*(VALUE_PREFIX + a for a in columns)) if columns else ():
        for a in columns:
            values = found[VALUE_PREFIX + a]
            known = (parts == TRAIN) & np.isfinite(values)
            for side in SIDES:
                rows = found[side][known]
                np.add.at(sums[a][side][0], rows, values[known])
                sums[a][side][1] += np.bincount(rows, minlength=len(counts[side]))
    return sums
