"""Given parts of interactions: named by a column, or by the files that hold the rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.data.reading.times import TIME
from twotower.data.split import PART_NAMES, SplitConfig
from twotower.errors import DataError, did_you_mean
from twotower.features.schema import Schema

log = logging.getLogger(__name__)

PART = "__part"
"""The column of part codes that reading of `PartFiles` adds to the interactions. Names that begin with '__' are
reserved."""


@dataclass(frozen=True)
class PartFiles:
    """Interactions whose parts are files: for "train", "test" and if wanted "validation" a file, a folder or a
    pattern."""

    sources: Mapping[str, str | Path]

    def __post_init__(self) -> None:
        for name in self.sources:
            if name not in PART_NAMES:
                raise DataError(_unknown(name, "PartFiles", ""))


def given_parts(interactions: pl.DataFrame, split: SplitConfig) -> pl.Series | None:
    """Return the part codes (n,) Int8 that the interactions give, or None if a rule makes the parts. Raises
    DataError."""
    if split.kind == "files":
        if PART not in interactions.columns:
            raise DataError(
                "split.kind = 'files' needs files for the parts; set data.train and data.test, or for tables in "
                "Python a column of part names and split.kind = 'column'"
            )
        return interactions[PART]
    if split.kind != "column":
        return None
    check_part_column(interactions.columns, split)
    return _codes(interactions[split.column])


def check_part_column(columns: list[str], split: SplitConfig) -> None:
    """Raise DataError if the interactions lack the column that the split names."""
    if split.column and split.column not in columns:
        raise DataError(
            f"interactions: no column '{split.column}'{did_you_mean(split.column, columns)} "
            f"(found: {', '.join(columns[:12])}{', …' if len(columns) > 12 else ''}); name it in split.column"
        )


def check_gap(schema: Schema, split: SplitConfig) -> None:
    """Raise DataError if the split has a gap in seconds and the times are none."""
    if split.gap and schema.time_unit == "order":
        raise DataError("split.gap is in seconds, and schema.time_unit = 'order' has none; leave it out")


def tell_of_repeats(
    left_out: pl.DataFrame | None, kept: pl.DataFrame, parts: npt.NDArray[np.int8], schema: Schema, split: SplitConfig
) -> None:
    """Log a warning about interactions that are `left_out` because their pair of user and item is `kept` in a later one
    of the `parts` (n,) of the rows kept: a training row is missing because the test part has its pair, which a model
    can tell from what else the user has. A rule that splits by time puts later rows into later parts."""
    if left_out is None or not (split.follows_time or split.is_given):
        return
    pair = [schema.user_id, schema.item_id]
    first, later = (
        frame.select(*pair, at=given_parts(frame, split) if split.is_given else frame[TIME])
        for frame in (left_out, kept.filter(parts > 0))
    )
    joined = first.join(later, on=pair, suffix="_kept")
    if n := int((joined["at"] < joined["at_kept"]).sum()):
        log.warning(_repeats_line(f"{n:,}", split))


def tell_of_repeats_at_most(n: int, schema: Schema, split: SplitConfig) -> None:
    """Log the same warning about up to `n` interactions, of which is not known when they were."""
    if n and schema.duplicates == "last" and (split.follows_time or split.is_given):
        log.warning(_repeats_line(f"up to {n:,}", split))


def _repeats_line(n: str, split: SplitConfig) -> str:
    return (
        f"schema.duplicates = 'last' leaves out {n} rows whose pair of user and item comes again later, and split.kind "
        f"= '{split.kind}' tests the later ones: an item is missing in a history because the test part has it, so "
        "metrics are too high; set schema.duplicates = 'keep', under which rankings leave out what a user has taken "
        "before (evaluation.repeats)"
    )


def dropped_line(n: int) -> str:
    """Return the message about `n` dropped rows."""
    return f"interactions: {n:,} rows lie in the gap before the validation or test part; dropped"


def _codes(column: pl.Series) -> pl.Series:
    """Return the codes (n,) of part names."""
    if column.dtype.is_nested():
        raise DataError(f"interactions: column '{column.name}' holds {column.dtype}, expected one part name a row")
    if n := column.null_count():
        raise DataError(
            f"interactions: column '{column.name}' has {n} missing parts; fill them with {', '.join(PART_NAMES)}, or "
            "drop the rows"
        )
    names = column.cast(pl.String)
    unknown = names.filter(~names.is_in(list(PART_NAMES)))
    if len(unknown):
        raise DataError(_unknown(unknown[0], f"interactions: column '{column.name}'", f" in {len(unknown)} rows"))
    return names.replace_strict({name: code for code, name in enumerate(PART_NAMES)}, return_dtype=pl.Int8)


def _unknown(name: str, where: str, how_often: str) -> str:
    """Return the message about a part name that is none."""
    begun = next((p for p in PART_NAMES if name and p.startswith(name.lower())), "")
    hint = f"; did you mean '{begun}'?" if begun else did_you_mean(name, PART_NAMES)
    return f"{where} names the part '{name}'{how_often}{hint} (allowed: {', '.join(PART_NAMES)}); rename it"
