"""Reading and checking of the tables of users, items and interactions.

A table comes from a CSV or Parquet file, a polars or pandas frame, or anything with an Arrow stream. An error is one
line: what was found, what is allowed and what to do.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from twotower import files
from twotower.arrays.types import Doubles, Ints
from twotower.data.events import event_counts, event_notes, without_ignored
from twotower.data.labels import POSITIVE, WEIGHT, labelled, weighted
from twotower.data.parts import PART, PartFiles
from twotower.data.readers import TableLike, as_frame, first_file, has_text
from twotower.data.text_files import Reading
from twotower.data.text_format import TextFormat
from twotower.data.times import TIME, Times
from twotower.data.unknown_ids import counted_ids, with_unknown_ids
from twotower.data.versions import newest_and_all, no_versions
from twotower.errors import DataError, did_you_mean
from twotower.escaping import representation
from twotower.features.feature import Statistic
from twotower.features.schema import Schema
from twotower.features.side import SIDES, FeatureSide, SideName
from twotower.features.values import TEXT_TYPES, canonical_ids, missing_count, with_texts

_ROW_COLUMN = "__row"  # temporary


@dataclass(frozen=True)
class Tables:
    """The three checked tables, with external ids. `notes` are messages about changes and counts of the checks."""

    users: pl.DataFrame
    items: pl.DataFrame
    interactions: pl.DataFrame
    notes: list[str] = field(default_factory=list)
    versions: Mapping[SideName, pl.DataFrame] = field(default_factory=dict)
    """All rows of a side with versions, with their TIME; its table above has the newest row of each id."""
    left_out: pl.DataFrame | None = None
    """Interactions that are left out as their pair of user and item comes again. None: none is."""

    def __repr__(self) -> str:
        named = (("users", self.users), ("items", self.items), ("interactions", self.interactions))
        return representation(type(self), ", ".join(f"{frame.height:,} {name}" for name, frame in named))


def check(
    users: TableLike | None,
    items: TableLike | None,
    interactions: TableLike,
    schema: Schema,
    form: TextFormat | None = None,
) -> Tables:
    """Read the three tables, text files in a form, and check them against the schema and each other. Raises DataError.

    If `users` or `items` is None, that side consists of the distinct ids of the interactions.
    """
    notes: list[str] = []
    if form is not None:
        form.check_used(
            {"users": first_file(users), "items": first_file(items), "interactions": first_file(interactions)}
        )
    reserved = [POSITIVE, WEIGHT, TIME, _ROW_COLUMN, *([] if isinstance(interactions, PartFiles) else [PART])]
    actions = as_frame(interactions, "interactions", Reading.of(schema, form=form)).drop(reserved, strict=False)
    need(actions, [schema.user_id, schema.item_id], "interactions")
    need(actions, [c for c in (schema.label, schema.weight, schema.event, schema.time) if c], "interactions")
    _not_empty(actions, "interactions")
    read, actions = actions, without_ignored(actions, schema)
    notes += event_notes(event_counts(read, schema), schema)
    actions = with_present_ids(actions, [schema.user_id, schema.item_id], "interactions", schema, notes)
    actions = timed(actions, schema, notes)
    _features(actions, "context", "interactions", schema, notes)
    notes += averaged_notes(averaged_gaps(actions, schema), actions.height)

    sides: dict[SideName, pl.DataFrame] = {}
    versions: dict[SideName, pl.DataFrame] = {}
    given: dict[SideName, TableLike | None] = {"user": users, "item": items}
    for side, table in given.items():
        key = schema.id_column(side)
        if table is None:
            sides[side], _ = check_side(actions.select(pl.col(key).unique().sort()), side, schema, notes)
            continue
        frame = with_id_name(as_frame(table, f"{side}s", Reading.of(schema, side, form)), side, schema)
        frame = frame.drop(TIME, strict=False) if schema.valid_from else frame
        ids, from_text = counted_ids(actions, key), has_text(table, interactions)
        sides[side], of_side = check_side(frame, side, schema, notes, ids, from_text)
        if of_side is not None:
            versions[side] = of_side
    if schema.valid_from and not versions:
        raise no_versions(schema)
    for side in SIDES:
        key = schema.id_column(side)
        actions = actions.with_columns(pl.col(key).cast(sides[side][key].dtype))
        if given[side] is not None and getattr(schema, f"unknown_{side}s") == "drop":
            actions = actions.join(sides[side].select(key), on=key, how="semi", maintain_order="left")
    if not actions.height:
        raise no_known_rows()

    actions = weighted(labelled(actions, schema), schema)
    actions, left_out = _deduplicate(actions, schema, notes)
    return Tables(sides["user"], sides["item"], actions, notes, versions, left_out)


def need(frame: pl.DataFrame, columns: list[str], what: str, or_else: str = "") -> None:
    """Raise DataError if the table `what` lacks one of the columns."""
    for name in columns:
        if name not in frame.columns:
            raise DataError(
                f"{what}: no column '{name}'{did_you_mean(name, frame.columns)} "
                f"(found: {', '.join(frame.columns[:12])}{', …' if frame.width > 12 else ''}); "
                f"name it in [schema]{or_else}"
            )


def with_id_name(frame: pl.DataFrame, side: SideName, schema: Schema) -> pl.DataFrame:
    """Return the table of a side with its ids under their name in the interactions. Raises DataError without the
    column."""
    own, key = schema.table_id(side), schema.id_column(side)
    if own not in frame.columns:
        need(frame, [own], f"{side}s", f", or the id column of this table in schema.{side}s_id")
    return frame if own == key else frame.drop(key, strict=False).rename({own: key})


def _not_empty(frame: pl.DataFrame, what: str) -> None:
    if not frame.height:
        raise DataError(f"{what}: the table has no rows, expected at least one; fill it")


def with_ids(frame: pl.DataFrame, key: str, what: str, or_else: str = " or drop the rows") -> pl.DataFrame:
    """Return the table with the id column as Int64, UInt64 or String. Raises DataError for missing ids (`lacks_id`),
    with a message that ends with `or_else`, or unusable ones."""
    series = frame[key]
    if series.dtype.is_nested():
        raise DataError(
            f"{what}: column '{key}' holds {series.dtype}, expected one id a row (text or integer); give each id a row "
            "of its own, or name another column in [schema]"
        )
    ids = canonical_ids(series)
    if n := int(lacks_id(series).sum()):
        blank = n - missing_count(series)
        empty = f" ({blank:,} of them empty text)" if blank else ""
        raise DataError(
            f"{what}: column '{key}' has {n:,} missing ids{empty} in {len(series):,} rows; fill them{or_else}"
        )
    if series.dtype.is_float() and ids.dtype == pl.String:
        first = ids.filter(~ids.str.contains(r"^-?\d+$"))[0]
        raise DataError(
            f"{what}: column '{key}' holds fractions or floats from 2**53 on (the first: {first}), expected ids as "
            "text or integers; cast it"
        )
    return frame.with_columns(ids)


def with_present_ids(
    frame: pl.DataFrame, keys: Sequence[str], what: str, schema: Schema, notes: list[str]
) -> pl.DataFrame:
    """Return the rows of a table with an id in each of the columns `keys`, as `with_ids` returns these. Raises
    DataError for rows without one, unless schema.missing is 'drop', and if no row is left."""
    kept = without_missing(frame, keys, schema)
    if n := frame.height - kept.height:
        notes.append(missing_note(what, n, frame.height, keys))
    for key in keys:
        kept = with_ids(kept, key, what, f", or {_way_out(kept.columns, key, what, schema)}")
    return kept


def missing_note(what: str, missing: int, rows: int, keys: Sequence[str]) -> str:
    """Return the message about rows without an id, which are left out. Raises DataError if none is left."""
    found = f"{what}: {missing:,} of {rows:,} rows have no id in {' or '.join(map(repr, keys))}"
    if missing == rows:
        raise DataError(f"{found}, and no other row is left; name the column of ids in [schema]")
    return f"{found}; left out"


def without_missing(frame: pl.DataFrame, keys: Sequence[str], schema: Schema) -> pl.DataFrame:
    """Return the rows of a table with an id in each of some columns, all rows unless schema.missing is 'drop'."""
    return frame.filter(*(~lacks_id(frame[key]) for key in keys)) if schema.missing == "drop" else frame


def lacks_id(ids: pl.Series) -> pl.Series:
    """Return True (n,) for missing ids: null, no finite number, or empty text, such as a quoted field of a CSV file."""
    missing = ids.is_null()
    if ids.dtype.is_float():
        missing |= ~ids.is_finite().fill_null(False)
    return missing | (ids.cast(pl.String) == "").fill_null(False) if ids.dtype in TEXT_TYPES else missing


def _way_out(columns: Sequence[str], key: str, what: str, schema: Schema) -> str:
    """Return the settings that read a table whose column `key` lacks ids."""
    may_stand = what == "interactions" and key == schema.user_id
    visits = [name for name in columns if may_stand and re.search("session|visit", name, re.IGNORECASE)]
    other = f", or set schema.user_id = '{visits[0]}' for visits in place of users" if visits else ""
    return f"set schema.missing = 'drop' to leave these rows out{other}"


def with_known_ids(frame: pl.DataFrame, key: str, what: str, dtype: pl.DataType) -> pl.DataFrame:
    """Return the table with the id column of the type of the ids of a training. Raises DataError as `with_ids` does,
    and for an id that has no such type."""
    frame = with_ids(frame, key, what)
    if (given := frame[key]).dtype == dtype:
        return frame
    ids = given.cast(dtype, strict=False)
    odd = given.filter(ids.cast(pl.String).ne_missing(given.cast(pl.String)))
    if len(odd):
        raise DataError(
            f"{what}: column '{key}' holds {odd[0]!r}, and the ids of the training are {dtype}; give ids of this type"
        )
    return frame.with_columns(ids)


def _without_repeats(frame: pl.DataFrame, what: str, key: str, schema: Schema, notes: list[str]) -> pl.DataFrame:
    repeated = frame.height - frame[key].n_unique()
    if repeated:
        if schema.duplicates == "error":
            first = frame.filter(pl.col(key).is_duplicated())[key][0]
            raise DataError(
                f"{what}: {repeated} rows repeat an id of '{key}' (the first: {first}); "
                "drop them or set schema.duplicates = 'last'"
            )
        frame = frame.unique(key, keep="last", maintain_order=True)
        notes.append(f"{what}: {repeated} rows repeated an id; the last of each was kept")
    return frame


def check_side(
    frame: pl.DataFrame,
    side: SideName,
    schema: Schema,
    notes: list[str],
    ids: pl.DataFrame | None = None,
    from_text: bool = False,
) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """Check the table of a side, and return it with rows for the `counted_ids` of the interactions that it lacks
    (`with_unknown_ids`), and all its versions with TIME, None if it has none; of a side with versions the table is the
    newest row of each id. Raises DataError."""
    what, key = side + "s", schema.id_column(side)
    need(frame, [key], what)
    _not_empty(frame, what)
    # Without ids of interactions the table is made of them, or was checked before.
    frame, versions = newest_and_all(
        with_present_ids(with_texts(frame), [key], what, schema, notes),
        side,
        key,
        schema,
        notes if ids is not None else [],
    )
    if versions is None:
        frame = _without_repeats(frame, what, key, schema, notes)
    _features(frame if versions is None else versions, side, what, schema, notes)
    if schema.title and side == "item":
        need(frame, [schema.title], what)
    if ids is not None:
        frame = with_unknown_ids(frame, ids, side, schema, notes, from_text)
    if frame.height < 2:
        raise DataError(f"{what}: found only one id of '{key}' ({frame[key][0]}), expected at least two; add rows")
    return frame, versions


def side_columns(side: SideName, schema: Schema) -> list[str]:
    """Return the columns of a side's table that the schema names, the id first."""
    named = [f.source for f in schema.columns(side) if not f.computes]
    title = [schema.title] if schema.title and side == "item" else []
    return list(dict.fromkeys([schema.id_column(side), *named, *title]))


def _features(frame: pl.DataFrame, side: FeatureSide, what: str, schema: Schema, notes: list[str]) -> None:
    for f in schema.columns(side):
        if f.computes or f.reads_time:
            continue
        need(frame, [f.source], what)
        if n := missing_count(frame[f.source]):
            if f.refuses_missing:
                raise DataError(
                    f"{what}: column '{f.source}' has {n} missing values and feature '{f.name}' has "
                    "missing = 'error'; fill them or set missing = 'impute'"
                )
            notes.append(imputed_note(what, f.source, n, frame.height))


def imputed_note(what: str, column: str, missing: int, rows: int) -> str:
    """Return the message about missing values of a column that a feature reads."""
    return f"{what}: {missing} of {rows} values of '{column}' are missing or not finite; imputed"


def averaged_gaps(actions: pl.DataFrame, schema: Schema) -> dict[str, int]:
    """Return the number of missing values of each column of the interactions that features name to average. Raises
    DataError if one has no numbers."""
    gaps = dict[str, int]()
    for statistic in schema.statistics():
        if not (column := statistic.column) or column in gaps:
            continue
        need(actions, [column], "interactions")
        dtype = actions[column].dtype
        if not (dtype.is_numeric() or dtype == pl.Boolean):
            raise DataError(
                f"interactions: column '{column}' holds {dtype}, expected numbers for feature '{statistic.name}' to "
                "average; cast it"
            )
        gaps[column] = missing_count(actions[column])
    return gaps


def averaged_notes(gaps: Mapping[str, int], rows: int) -> list[str]:
    """Return a message for each column of `rows` interactions that has missing values."""
    return [
        f"interactions: {n:,} of {rows:,} values of '{column}' are missing; left out" for column, n in gaps.items() if n
    ]


def no_known_rows() -> DataError:
    """Return the error of interactions of which none is left when those of unknown ids are dropped."""
    return DataError(
        "interactions: no row has both an id of users and an id of items; give the tables of these interactions, or "
        "set schema.unknown_users and schema.unknown_items = 'add'"
    )


def timed(actions: pl.DataFrame, schema: Schema, notes: list[str]) -> pl.DataFrame:
    """Add the column TIME, if the schema has a time, to the rows that schema.bad_times keeps. Raises DataError if its
    column holds no times."""
    if not schema.time:
        return actions
    times = Times(schema)
    times.look(actions[schema.time])
    times.settle()
    notes += times.notes
    return times.add(times.kept(actions))


def _deduplicate(actions: pl.DataFrame, schema: Schema, notes: list[str]) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """Return the rows that are kept, and those that are not, None if there are none."""
    pair = [schema.user_id, schema.item_id]
    if schema.duplicates == "keep":
        return actions, None
    repeated = actions.height - actions.select(pl.struct(pair).n_unique()).item()
    if not repeated:
        return actions, None
    if schema.duplicates == "error":
        first = actions.filter(pl.struct(pair).is_duplicated()).select(pair).row(0)
        raise DataError(
            f"interactions: {repeated} rows repeat a pair of user and item (the first: {first[0]}, {first[1]}); "
            "drop them or set schema.duplicates = 'last' or 'keep'"
        )
    notes.append(f"interactions: {repeated} rows repeated a pair of user and item; {kept_of_repeated(schema)}")
    actions = actions.with_row_index(_ROW_COLUMN)
    by = [TIME, _ROW_COLUMN] if TIME in actions.columns else [_ROW_COLUMN]
    kept = actions.sort(by).unique(pair, keep="last", maintain_order=True).sort(_ROW_COLUMN)
    left_out = actions.join(kept.select(_ROW_COLUMN), on=_ROW_COLUMN, how="anti")
    return kept.drop(_ROW_COLUMN), left_out.drop(_ROW_COLUMN)


def kept_of_repeated(schema: Schema) -> str:
    """Return which of repeated rows are kept, as words."""
    every = ", each in its context" if schema.side("context") else ""
    hint = f"{', whatever its event' if schema.event else ''}; schema.duplicates = 'keep' keeps all{every}"
    return f"the last of each was kept{hint if schema.event or every else ''}"


def nothing_to_learn(schema: Schema) -> DataError:
    """Return the error of a train part without a target."""
    of = " of a weight above 0" if schema.weighted else ""
    return DataError(f"no positive interaction{of} in the train part; there is nothing to learn from")


def averaged_column(statistic: Statistic, schema: Schema) -> str:
    """Return the column of the interactions that a statistic averages."""
    return statistic.column or schema.label or POSITIVE


def averaged_columns(schema: Schema) -> list[str]:
    """Return the distinct columns of the interactions that statistics average, ascending."""
    return sorted({averaged_column(s, schema) for s in schema.statistics() if s.column is not None})


def with_statistics(
    frame: pl.DataFrame, schema: Schema, side: SideName, counts: Ints, sums: Mapping[str, Doubles]
) -> pl.DataFrame:
    """Add a column for each feature that is a statistic of the training interactions.

    `counts` (n,) are the interactions of each row, `sums[column]` (2, n) the sums and the
    numbers of the finite values of an averaged column."""
    for s in schema.statistics(side):
        total, known = sums[averaged_column(s, schema)] if s.column is not None else np.zeros((2, len(counts)))
        with np.errstate(invalid="ignore"):
            frame = frame.with_columns(pl.Series(s.source, s.value(counts, total / known)))
    return frame


def save(tables: Tables, folder: Path) -> None:
    """Write users.parquet, items.parquet and interactions.parquet into `folder`, each atomically."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"{folder}: cannot be made ({e.strerror}); choose another folder") from None
    for name in ("users", "items", "interactions"):
        frame: pl.DataFrame = getattr(tables, name)
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        files.write(folder / f"{name}.parquet", buffer.getvalue())
