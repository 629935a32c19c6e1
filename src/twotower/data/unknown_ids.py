"""Ids of the interactions compared with the table of their side: one type, their rows, and ids that the table lacks.

Tables in memory and prepared data call the same functions; of the interactions these see distinct ids with their
counts.
"""

from __future__ import annotations

import polars as pl

from twotower.errors import DataError
from twotower.features.schema import Schema
from twotower.features.side import SideName

COUNT = "__count"
"""Column of the number of interactions of a distinct id. Names that begin with '__' are reserved."""
MAX_UNKNOWN_SHARE = 1 / 5
"""Largest share of unknown ids that "auto" adds."""


def counted_ids(interactions: pl.DataFrame, key: str) -> pl.DataFrame:
    """Return the distinct ids of a column in any order, with the numbers of their rows as COUNT."""
    return interactions.group_by(key).len(COUNT).with_columns(pl.col(COUNT).cast(pl.Int64))


def of_one_type(one: pl.DataFrame, other: pl.DataFrame, key: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return two tables with their ids as UInt64, if only one of them has ids from 2**63 on; else unchanged."""
    if {one[key].dtype, other[key].dtype} == {pl.Int64, pl.UInt64} and not (
        (one[key] < 0).any() or (other[key] < 0).any()
    ):
        return one.with_columns(pl.col(key).cast(pl.UInt64)), other.with_columns(pl.col(key).cast(pl.UInt64))
    return one, other


def rows_of_ids(ids: pl.Series, side_ids: pl.Series) -> pl.Series:
    """Return the row (n,) of each id in the ids of a side, null for one that it lacks."""
    rows = side_ids.alias("id").to_frame().with_row_index("row")
    if ids.dtype != side_ids.dtype:  # `with_unknown_ids` has found a type for both
        ids = ids.cast(side_ids.dtype, strict=False)
    return ids.alias("id").to_frame().join(rows, on="id", how="left", maintain_order="left")["row"]


def with_unknown_ids(
    frame: pl.DataFrame, ids: pl.DataFrame, side: SideName, schema: Schema, notes: list[str], from_text: bool
) -> pl.DataFrame:
    """Return the table of a side with its ids in the type that fits the `counted_ids` of the interactions, and with
    rows for those that it lacks, sorted, after its own; without them if they are to be dropped.

    `from_text` is True if the ids of a table were read from a CSV. Raises DataError if ids are refused or of two
    types."""
    what, key, option = f"{side}s", schema.id_column(side), f"schema.unknown_{side}s"
    frame, ids = of_one_type(frame, ids, key)
    if {frame[key].dtype, ids[key].dtype} == {pl.Int64, pl.String} and from_text:
        # A CSV has no types: its ids take the type of the other table's.
        frame, ids = (t.with_columns(pl.col(key).cast(pl.String)) for t in (frame, ids))
    if frame[key].dtype != ids[key].dtype:
        raise DataError(
            f"column '{key}': {what} has {frame[key].dtype} ({_spelled(frame[key][0])}) and interactions "
            f"{ids[key].dtype} ({_spelled(ids[key].sort()[0])}); give both the same type"
        )
    unknown = ids.join(frame.select(key), on=key, how="anti").sort(key)
    if not unknown.height:
        return frame
    treatment: str = getattr(schema, f"unknown_{side}s")
    first = unknown[key][0]
    found = f"{unknown.height:,} of {ids.height:,} ids of '{key}'"
    rows = f"{unknown[COUNT].sum():,} of {ids[COUNT].sum():,} interactions"
    if treatment == "error":
        raise DataError(
            f"interactions: {found} are not in {what} (the first: {first}; {rows}); add them to {what}, or set "
            f"{option} = 'add' or 'drop'"
        )
    if treatment == "auto" and unknown.height > MAX_UNKNOWN_SHARE * ids.height:
        one, other = spelled_alike(unknown[key], frame[key]) or (unknown[key][0], frame[key][0])
        raise DataError(
            f"interactions: {found} are not in {what}, more than a fifth ({_spelled(one)} in interactions, "
            f"{_spelled(other)} in {what}); spell the ids of both tables alike, or set {option} = 'add' or 'drop'"
        )
    if treatment == "drop":
        notes.append(f"interactions: {found} are not in {what} (the first: {first}); {rows} dropped")
        return frame
    for f in schema.columns(side):
        if f.refuses_missing and not f.computes and f.source != key:
            raise DataError(
                f"interactions: {found} are not in {what} (the first: {first}), so that '{f.source}' is missing, and "
                f"feature '{f.name}' has missing = 'error'; set missing = 'impute', or {option} = 'drop'"
            )
    notes.append(f"{what}: {found} were added from the interactions (the first: {first}; {rows}), without features")
    return pl.concat([frame, unknown.select(key)], how="diagonal")


def spelled_alike(unknown: pl.Series, known: pl.Series) -> tuple[int | str, int | str] | None:
    """Return an unknown and a known id that differ in leading zeros, case or spaces alone; None without."""
    sides = (("one", unknown), ("other", known))
    spellings = [(name, ids, ids.cast(pl.String).str.strip_chars().str.to_lowercase()) for name, ids in sides]
    one, other = (pl.DataFrame({name: ids, "plain": text.str.strip_chars_start("0")}) for name, ids, text in spellings)
    pairs = one.join(other, on="plain", how="inner", maintain_order="left").head(1).select("one", "other").rows()
    return pairs[0] if pairs else None


def _spelled(external_id: int | str) -> str:
    return repr(external_id)
