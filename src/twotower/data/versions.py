"""Versions of users and items: the features that a row of a side had at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.arrays.ragged import Column, offsets_of
from twotower.arrays.types import Ints
from twotower.data.reading.times import TIME, Times
from twotower.data.unknown_ids import rows_of_ids
from twotower.errors import DataError
from twotower.features.schema import Schema
from twotower.features.side import SideName
from twotower.files.readers import read_parquet

ROW, SINCE = "__row", "__since"
"""Columns of a table of versions: row of the side, and first time, as in `Times`. Names that begin with '__' are
reserved."""
_PLACE = "__place"
BEGINNING = int(np.iinfo(np.int64).min)
"""Time of the first version of each row, which stands for all times before the table has the row."""


@dataclass(frozen=True)
class Versions:
    """V versions of the n rows of a side: those of row r are `offsets[r]` to `offsets[r + 1]`, oldest first.

    The first version of a row has its id and statistics alone: it holds before the earliest version of the table. In
    its place stands the row of the table without a time, if there is one."""

    frame: pl.DataFrame
    """Raw features (V rows), with ROW and SINCE."""
    columns: dict[str, Column] = field(default_factory=dict)
    """Encoded features (V rows), without histories."""

    @cached_property
    def since(self) -> Ints:
        """(V,) first time of each version."""
        return self.frame[SINCE].to_numpy()

    @cached_property
    def owners(self) -> Ints:
        """(V,) row of the side of each version."""
        return self.frame[ROW].to_numpy().astype(np.int64)

    @cached_property
    def offsets(self) -> Ints:
        """(n + 1,) first version of each row, and V."""
        return offsets_of(np.bincount(self.owners))

    @cached_property
    def _times(self) -> Ints:
        """Distinct times of versions, rising."""
        return np.unique(self.since)

    @cached_property
    def _keys(self) -> Ints:
        """(V,) number of each version that rises with row and time."""
        return self.owners * len(self._times) + np.searchsorted(self._times, self.since)

    def at(self, rows: npt.NDArray[np.integer], times: Ints) -> Ints:
        """Return the version (n,) of each of some rows (n,) that holds at its time (n,), the latest not later than
        it."""
        wanted = rows.astype(np.int64) * len(self._times) + np.searchsorted(self._times, times, side="right") - 1
        return np.searchsorted(self._keys, wanted, side="right") - 1

    def __len__(self) -> int:
        return self.frame.height


def newest_and_all(
    frame: pl.DataFrame, side: SideName, key: str, schema: Schema, notes: list[str]
) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """Return the newest row of each id of a table, the ids in their order, and all rows with their TIME, BEGINNING for
    a row without a time; the table and None if it has no versions. `notes` receive what was found. Raises DataError for
    unusable times, or an id with two rows of one time."""
    if not schema.valid_from:
        return frame, None
    if schema.valid_from not in frame.columns:
        notes.append(f"{side}s: no column '{schema.valid_from}'; each row always holds")
        return frame, None
    frame = _timed(frame, side, schema)
    if n := frame.height - frame.select(pl.struct(key, TIME).n_unique()).item():
        first = frame.filter(pl.struct(key, TIME).is_duplicated()).select(key, schema.valid_from).row(0)
        raise DataError(
            f"{side}s: {n} rows repeat an id of '{key}' and its '{schema.valid_from}' (the first: {first[0]}, "
            f"{first[1]}), so that two versions hold at once; drop one of them"
        )
    newest = frame.sort(TIME).unique(key, keep="last")
    ids = frame.select(pl.col(key).unique(maintain_order=True))
    notes.append(f"{side}s: {frame.height:,} versions of {ids.height:,} ids, by '{schema.valid_from}'")
    return ids.join(newest.drop(TIME), on=key, how="left", maintain_order="left"), frame


def no_versions(schema: Schema) -> DataError:
    """Return the error of tables without versions, where the schema names their time column."""
    return DataError(
        f"schema.valid_from names column '{schema.valid_from}', and neither users nor items have it; name their time "
        "column, or leave it out"
    )


def _timed(frame: pl.DataFrame, side: SideName, schema: Schema) -> pl.DataFrame:
    """Return a table with the TIME of its rows. Raises DataError for unusable times."""
    column, times = frame[schema.valid_from], Times(schema, f"{side}s", schema.valid_from)
    empty = column.is_nan().fill_null(True) if column.dtype.is_float() else column.is_null()
    if not empty.any():
        times.look(column)
        times.settle()
        return times.add(frame)
    numbered = frame.with_row_index(_PLACE)
    given, always = numbered.filter(~empty), numbered.filter(empty)
    if given.height:
        times.look(given[column.name])
        times.settle()
        given = times.add(given)
    none = pl.lit(None, given.schema[column.name]).alias(column.name)
    always = always.with_columns(none, pl.lit(BEGINNING, pl.Int64).alias(TIME))
    return (pl.concat([given, always]) if given.height else always).sort(_PLACE).drop(_PLACE)


def version_tables(
    given: Mapping[SideName, pl.DataFrame], newest: Mapping[SideName, pl.DataFrame], schema: Schema
) -> dict[SideName, Versions]:
    """Return the versions, without columns, of the sides with columns whose rows with a TIME are `given`; `newest` are
    the rows of both sides, with the statistics that all versions of a row share."""
    return {
        side: Versions(
            _version_table(newest[side], rows, schema.id_column(side), [s.source for s in schema.statistics(side)])
        )
        for side, rows in given.items()
        if schema.columns(side)
    }


def _version_table(newest: pl.DataFrame, given: pl.DataFrame, key: str, shared: list[str]) -> pl.DataFrame:
    """Return the table of `Versions`: the given rows, and before those of each row, if none always held, one with its
    id alone."""
    given = given.with_columns(pl.col(key).cast(newest[key].dtype)).rename({TIME: SINCE})
    given = given.with_columns(rows_of_ids(given[key], newest[key]).cast(pl.Int64).alias(ROW))
    first = newest.select(key).with_columns(
        pl.int_range(newest.height, dtype=pl.Int64).alias(ROW), pl.lit(BEGINNING, pl.Int64).alias(SINCE)
    )
    first = first.join(given.filter(pl.col(SINCE) == BEGINNING), on=ROW, how="anti", maintain_order="left")
    table = pl.concat([first, given], how="diagonal").sort(ROW, SINCE)
    return table.with_columns(newest[name].gather(table[ROW]) for name in shared)


def check_first_versions(
    versions: Mapping[SideName, Versions], counts: Mapping[SideName, Ints], schema: Schema
) -> None:
    """Raise DataError if a feature refuses missing values, and an interaction is older than the versions of its row.
    `counts` (V,) are the interactions that see each version, of each side that has some."""
    for side, of_side in versions.items():
        seen_first = np.where(of_side.since == BEGINNING, counts[side], 0)
        if not seen_first.any():
            continue
        for f in schema.columns(side):
            if f.refuses_missing and not f.computes and f.source != schema.id_column(side):
                early = np.where(of_side.frame[f.source].is_null().to_numpy(), seen_first, 0)
                if not early.any():
                    continue
                first = of_side.frame[schema.id_column(side)][int(np.flatnonzero(early)[0])]
                raise DataError(
                    f"interactions: {early.sum():,} rows are older than the first version of their {side} (the first: "
                    f"{first}), so that '{f.source}' is missing, and feature '{f.name}' has missing = 'error'; set "
                    "missing = 'impute', or give earlier versions"
                )


def stored_versions(versions: Versions, side: SideName, schema: Schema, more: Iterable[str] = ()) -> pl.DataFrame:
    """Return the columns of a table of versions that prepared data keep, and those of `more` that it has, which a run
    keeps too."""
    named = [schema.id_column(side), *(f.source for f in schema.columns(side))]
    named += [name for name in more if name in versions.frame.columns]
    return versions.frame.select(ROW, SINCE, *dict.fromkeys(named))


def check_version_table(table: pl.DataFrame, newest: pl.DataFrame, schema: Schema, side: SideName) -> pl.DataFrame:
    """Return a table of `Versions` unchanged. Raises ValueError if it is not of the side whose newest rows are
    given."""
    for name in (ROW, SINCE, schema.id_column(side), *(f.source for f in schema.columns(side))):
        if name not in table.columns:
            raise ValueError(f"column '{name}' is missing")
    rows, since = table[ROW], table[SINCE]
    if rows.dtype != pl.Int64 or since.dtype != pl.Int64 or rows.null_count() or since.null_count():
        raise ValueError(f"columns '{ROW}' and '{SINCE}' do not hold a row and a time for each version")
    first = rows.filter(since == BEGINNING)
    rising = table.select(ROW, SINCE).equals(table.select(ROW, SINCE).sort(ROW, SINCE))
    if not rising or first.to_list() != list(range(newest.height)) or rows.max() != newest.height - 1:
        raise ValueError(f"its rows are not the versions of {newest.height:,} {side}s")
    return table


def read_versions(path: Path, newest: pl.DataFrame, schema: Schema, side: SideName) -> pl.DataFrame:
    """Read the table of `Versions` of a side whose newest rows are given. Raises ValueError if it is not of this side.
    A reader for `read_checked`."""
    return check_version_table(read_parquet(path), newest, schema, side)
