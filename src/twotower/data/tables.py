"""Reading and checking of the tables of users, items and interactions.

A table comes from a CSV or Parquet file, a polars or pandas frame, or anything with an Arrow stream. An error is one
line: what was found, what is allowed and what to do.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from twotower import files
from twotower.arrays.types import Doubles, Ints
from twotower.data.labels import (
    POSITIVE,
    WEIGHT,
    event_counts,
    event_notes,
    labelled,
    no_positives,
    weighted,
    without_ignored,
)
from twotower.data.parts import PART, PartFiles
from twotower.data.reading.readers import TableLike, as_frame, first_file, has_text, need
from twotower.data.reading.text_files import Reading
from twotower.data.reading.text_format import TextFormat
from twotower.data.reading.times import TIME, Times
from twotower.data.unknown_ids import COUNT, counted_ids, of_one_type, with_unknown_ids
from twotower.data.versions import newest_and_all, no_versions
from twotower.errors import DataError
from twotower.escaping import representation
from twotower.features.feature import Feature, Statistic
from twotower.features.schema import Schema
from twotower.features.side import SIDES, FeatureSide, SideName
from twotower.features.values import TEXT_TYPES, canonical_ids, missing_count, with_texts

_ROW_COLUMN = "__row"  # temporary
PENDING_IDS = 2**20
"""Ids that are collected before they are merged with the earlier ones."""


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
    if form is not None:
        form.check_used(
            {"users": first_file(users), "items": first_file(items), "interactions": first_file(interactions)}
        )
    reserved = [POSITIVE, WEIGHT, TIME, _ROW_COLUMN, *([] if isinstance(interactions, PartFiles) else [PART])]
    actions = as_frame(interactions, "interactions", Reading.of(schema, form=form)).drop(reserved, strict=False)
    need(actions, [schema.user_id, schema.item_id], "interactions")
    need(actions, [c for c in (schema.label, schema.weight, schema.event, schema.time) if c], "interactions")
    _not_empty(actions, "interactions")
    checked = CheckedLog(schema)
    checked.look(lambda columns: [actions])
    given = {"user": users, "item": items}
    tables = dict[SideName, tuple[pl.DataFrame, bool] | None]()
    for side in SIDES:
        tables[side] = None
        if (table := given[side]) is not None:
            frame = with_id_name(as_frame(table, f"{side}s", Reading.of(schema, side, form)), side, schema)
            frame = frame.drop(TIME, strict=False) if schema.valid_from else frame
            tables[side] = frame, has_text(table, interactions)
    sides, versions = checked.sides(tables)
    actions = checked.rows(actions)
    for side in SIDES:
        key = schema.id_column(side)
        actions = actions.with_columns(pl.col(key).cast(sides[side][key].dtype))
        if given[side] is not None and getattr(schema, f"unknown_{side}s") == "drop":
            actions = actions.join(sides[side].select(key), on=key, how="semi", maintain_order="left")
    if not actions.height:
        raise no_known_rows()
    if schema.label and not schema.event and not actions[POSITIVE].any():
        raise no_positives(schema, actions)
    actions, left_out = without_repeated_pairs(actions, schema, checked.notes)
    return Tables(sides["user"], sides["item"], actions, checked.notes, versions, left_out)


class CheckedLog:
    """The interactions of a log, checked in pieces, of which a table in memory is one: call `look` once, then `sides`,
    then `rows` on every piece."""

    def __init__(self, schema: Schema) -> None:
        self.schema, self.keys = schema, [schema.user_id, schema.item_id]
        self.times = Times(schema) if schema.time else None
        self.notes = list[str]()
        """Messages about what was found."""
        self.left_out = Counter[str]()
        """Numbers of interactions that are left out, by reason."""
        self._ids = {side: _LogIds(schema.id_column(side)) for side in SIDES}

    @property
    def drops(self) -> bool:
        """True if the schema leaves interactions out: ignored events, rows without an id, or of bad times."""
        ignores = any(rule.target == "ignored" for rule in self.schema.events.values())
        return ignores or "drop" in (self.schema.missing, self.schema.bad_times)

    def look(self, read: Callable[[list[str]], Iterable[pl.DataFrame]], known: bool = False) -> None:
        """Look at all pieces, of which `read` returns some columns, or more: at their events, ids, times, averaged
        columns and context. If the tables of both sides are `known` from an earlier call, only at what `rows` needs.
        Raises DataError."""
        schema, keys, times = self.schema, self.keys, self.times
        event, time = ([name] if name else [] for name in (schema.event, schema.time))
        if times and times.drops:  # the ids of rows that are left out are none, so all times are looked at first
            for frame in read([*keys, *time, *event]):
                times.look(without_missing(without_ignored(frame, schema), keys, schema)[schema.time])
            times.settle()
        context = [f for f in schema.columns("context") if not (f.computes or f.reads_time)]
        averaged = [a for a in averaged_columns(schema) if a != POSITIVE]
        columns = [*(keys if self.drops or not known else []), *time, *event]
        columns += [] if known else [*averaged, *(f.source for f in context)]
        types, gaps, missing, kept = Counter[str](), Counter[str](), Counter[str](), 0
        for read_frame in read(list(dict.fromkeys(columns))) if columns else ():
            named = without_ignored(read_frame, schema)
            present = without_missing(named, keys, schema) if self.drops else named
            if not known:
                present = with_present_ids(present, keys, "interactions", schema, [])
            if times and not times.drops:
                times.look(present[schema.time])
            frame = times.kept(present) if times else present
            self.left_out["rows are ignored events"] += read_frame.height - named.height
            self.left_out["rows lack an id"] += named.height - present.height
            self.left_out["rows have bad times"] += present.height - frame.height
            types.update(event_counts(read_frame, schema))
            kept += frame.height
            if not known:
                for ids in self._ids.values():
                    ids.add(frame)
                need(frame, [f.source for f in context], "interactions")
                missing.update({f.name: missing_count(frame[f.source]) for f in context})
                gaps.update(averaged_gaps(frame, schema))
        if not known:
            self.notes += event_notes(types, schema)
        if n := self.left_out["rows lack an id"]:
            self.notes.append(missing_note("interactions", n, n + kept + self.left_out["rows have bad times"], keys))
        if times and not times.drops:
            times.settle()
        self.notes += times.notes if times else []
        for f in context if not known else ():
            _tell_of_missing(f, missing[f.name], kept, "interactions", self.notes)
        self.notes += averaged_notes(gaps, kept)

    def sides(
        self, given: Mapping[SideName, tuple[pl.DataFrame, bool] | None]
    ) -> tuple[dict[SideName, pl.DataFrame], dict[SideName, pl.DataFrame]]:
        """Return the tables of both sides, and those of the versions of sides that have some. `given` has each table,
        and whether its ids or those of the log were read from text; without one, a side has the ids of the log.
        Raises DataError."""
        found, versions = dict[SideName, pl.DataFrame](), dict[SideName, pl.DataFrame]()
        for side, table in given.items():
            counted = self._ids[side].counted()
            if table is None:
                ids = counted.select(pl.col(self.schema.id_column(side)).sort())
                found[side], _ = check_side(ids, side, self.schema, self.notes)
                continue
            frame, from_text = table
            found[side], every = check_side(frame, side, self.schema, self.notes, counted, from_text)
            if every is not None:
                versions[side] = every
        if self.schema.valid_from and not versions:
            raise no_versions(self.schema)
        return found, versions

    def rows(self, piece: pl.DataFrame) -> pl.DataFrame:
        """Return the rows of a piece that are kept, with canonical ids and the columns POSITIVE, TIME and WEIGHT.
        Raises DataError."""
        kept = without_missing(without_ignored(piece, self.schema), self.keys, self.schema)
        if self.times:
            kept = self.times.add(self.times.kept(kept))
        for key in self.keys:
            kept = with_ids(kept, key, "interactions")
        return weighted(labelled(kept, self.schema), self.schema)


class _LogIds:
    """Distinct ids of a column of the log, with their numbers of interactions."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._found: pl.DataFrame | None = None
        self._pending = list[pl.DataFrame]()

    def add(self, piece: pl.DataFrame) -> None:
        """Add the ids of a piece, as `with_ids` returns them. Raises DataError for ids of another type than before."""
        self._pending.append(counted_ids(piece, self.key))
        if sum(p.height for p in self._pending) > max(PENDING_IDS, 0 if self._found is None else self._found.height):
            self.counted()

    def counted(self) -> pl.DataFrame:
        """Return the ids in any order, with the numbers of their rows as COUNT."""
        for piece in self._pending:
            self._found = piece if self._found is None else self._together(self._found, piece)
        self._pending.clear()
        assert self._found is not None
        self._found = self._found.group_by(self.key).agg(pl.col(COUNT).sum())
        return self._found

    def _together(self, found: pl.DataFrame, piece: pl.DataFrame) -> pl.DataFrame:
        found, piece = of_one_type(found, piece, self.key)
        if found[self.key].dtype != piece[self.key].dtype:
            raise DataError(
                f"interactions: column '{self.key}' is {found[self.key].dtype} in some files and "
                f"{piece[self.key].dtype} in others; give all files the same type"
            )
        return pl.concat([found, piece])


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
        if f.computes:
            continue
        need(frame, [f.source], what)
        _tell_of_missing(f, missing_count(frame[f.source]), frame.height, what, notes)


def _tell_of_missing(feature: Feature, missing: int, rows: int, what: str, notes: list[str]) -> None:
    """Add the message about missing values of the column of a feature. Raises DataError if the feature refuses them."""
    if not missing:
        return
    if feature.refuses_missing:
        raise DataError(
            f"{what}: column '{feature.source}' has {missing} missing values and feature '{feature.name}' has "
            "missing = 'error'; fill them or set missing = 'impute'"
        )
    notes.append(f"{what}: {missing} of {rows} values of '{feature.source}' are missing or not finite; imputed")


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


def without_repeated_pairs(
    actions: pl.DataFrame, schema: Schema, notes: list[str]
) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """Return the rows that are kept of a pair of user and item that comes again, and those that are not, None if there
    are none. Raises DataError with schema.duplicates = 'error'."""
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
