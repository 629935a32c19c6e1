"""Statistics, versions and encoders that a dataset learns of its train part, in memory or bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from twotower.arrays.types import Doubles, Ints
from twotower.data.context import check_defaults
from twotower.data.interaction_columns import TIME, VALUE_PREFIX, Columns
from twotower.data.splits import TRAIN, Parts
from twotower.data.tables import averaged_columns, with_statistics
from twotower.data.versions import Versions, check_first_versions, version_tables
from twotower.features.encoders import Encoders
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName

FIT_ROWS = 2**20
"""Greatest number of training interactions from which an encoder of numbers or vectors of the context learns."""
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
        contexts: Iterable[pl.DataFrame],
        example: pl.DataFrame,
    ) -> Fitted:
        """Fit on interactions. `frames` are the tables, and `versions` the tables of versions of sides that have some;
        `counts` are the training interactions of each row of a side. `contexts` yields the values of the features of
        the context of the training interactions of each bucket; `example` has the types of the columns that they read.

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
                every[side] += np.bincount(seen, minlength=len(of_side))
                train[side] += np.bincount(seen[parts == TRAIN], minlength=len(of_side))
        check_first_versions(of, every, schema)
        tables = with_own | {side: of_side.frame for side, of_side in of.items()}
        context = _context_values(schema, contexts, int(counts["user"].sum()))
        encoders = Encoders.fit(schema, tables, {**counts, **train}, context)
        check_defaults(encoders, example)
        return cls(with_own, of, encoders)


def _context_values(
    schema: Schema, contexts: Iterable[pl.DataFrame], n_train: int
) -> dict[str, tuple[pl.Series, Ints]]:
    """Return values of each feature of the context by name, with the numbers of training interactions that have each:
    all distinct ones where values are counted, else those of up to FIT_ROWS interactions, evenly spaced."""
    found: dict[str, list[pl.DataFrame]] = {f.name: [] for f in schema.side("context")}
    step, seen = max(1, -(-n_train // FIT_ROWS)), 0
    for frame in contexts if found else ():
        first, seen = -seen % step, seen + frame.height
        for f in schema.side("context"):
            one = pl.DataFrame({"value": frame[f.source]}).with_columns(n=pl.lit(1, pl.Int64))
            found[f.name] = _merged([*found[f.name], one]) if f.counts_values else [*found[f.name], one[first::step]]
    columns = dict[str, tuple[pl.Series, Ints]]()
    for f in schema.side("context"):
        frame = pl.concat(found[f.name])
        columns[f.name] = (frame["value"].alias(f.source), frame["n"].to_numpy())
    return columns


def _merged(frames: list[pl.DataFrame]) -> list[pl.DataFrame]:
    """Return columns of values and counts as fewer rows, in which equal values are one, when there are many new
    ones."""
    if len(frames) == 1 or sum(f.height for f in frames[1:]) < frames[0].height:
        return frames
    return [pl.concat(frames).group_by("value", maintain_order=True).agg(pl.col("n").sum())]


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
