"""Meaning of found tables: options of the schema and features of the sides, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl
from pydantic import ValidationError

from twotower.config.toml import TomlValue
from twotower.data.events import without_ignored
from twotower.data.split import SplitConfig
from twotower.data.tables import lacks_id, with_present_ids, without_missing
from twotower.data.unknown_ids import MAX_UNKNOWN_SHARE, spelled_alike
from twotower.errors import DataError
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.progress import doing
from twotower.suggestion.answers import counted_columns, taken_rows, without_answers
from twotower.suggestion.columns import guess_columns
from twotower.suggestion.constant_tables import with_constant_columns
from twotower.suggestion.guessed_columns import MAX_DISTINCT, GuessedColumns, is_distinct
from twotower.suggestion.names import is_id, names_item, names_user
from twotower.suggestion.numbering import notes_of_row_numbers, row_numbers
from twotower.suggestion.shape import repeated_share
from twotower.suggestion.side_features import SideFeature, SideFeatures, guess_features, lists_in_brackets
from twotower.suggestion.tables import PLACE, USER, FoundTables
from twotower.suggestion.time_form import TimeForm, moments

MIN_REPEATS = 0.1
"""Share of repeated rows from which rankings hold what a user has taken before."""
MIN_COPIES = 0.01
"""Share of the rows from which those that equal another one in every column are told."""
TWICE = 0.495
"""Share of copies from which a log is read twice."""
MAX_SHARED = 0.1
"""Share of a user's rows of other items at one time up to which times are those of rows, and not of baskets or days."""
AT_ONCE = 0.1
"""Time from a row to the same user's next one of the same item, as a share of the median time to one of another item, below which both are one
act, as of a form that is sent twice."""
MIN_KNOWN = 0.8
"""Share of the ids of the interactions that a column of another name must hold to be the ids of a table, and of the ids of a table that the
interactions must hold for the others to be missing."""
COLUMNS = (
    "user_id", "item_id", "time", "time_unit", "time_format", "label", "positive_above", "weight", "weight_scale", "event", "events",
    "users_id", "items_id", "missing", "bad_times",
)  # fmt: skip
"""Options of the schema that the columns of the interactions decide, or that decide which rows are read."""


@dataclass(frozen=True)
class Guess:
    """Meaning of tables."""

    columns: GuessedColumns
    sides: Mapping[SideName, SideFeatures]
    repeats: float
    """Share of the rows that repeat a pair of user and item, as `repeated_share` counts them."""
    lacking: Mapping[SideName, str] = field(default_factory=dict)
    """Sides whose table lacks many ids of the interactions, which are added, with the reason."""
    counted: Mapping[SideName, Mapping[str, float]] = field(default_factory=dict)
    """Columns that may be counted from the interactions, of each side, as `counted_columns` returns them."""
    tables: FoundTables = field(default_factory=lambda: FoundTables(pl.DataFrame()))
    """The tables, with those of columns of the interactions."""

    @property
    def schema(self) -> dict[str, TomlValue]:
        """Options of the schema but the features."""
        title = self.sides["item"].title
        options = {key: value for key, value in self.columns.options.items() if value != ""}
        options |= {"title": title} if title else {}
        options |= {f"unknown_{side}s": "add" for side in self.lacking}
        return options | ({"duplicates": "keep"} if self.ranks_repeats else {})

    @property
    def ranks_repeats(self) -> bool:
        """True if repeated rows are many enough for rankings to hold what a user has taken before."""
        return self.repeats >= MIN_REPEATS

    def keeps_repeats(self, split: Mapping[str, TomlValue]) -> bool:
        """Return True if repeated rows are kept under a section [split]: many always, and few where parts follow in time or are given, as without
        them histories lack what comes again in a later part."""
        if self.ranks_repeats or not self.repeats:
            return self.ranks_repeats
        try:
            chosen = SplitConfig.model_validate(split)
        except ValidationError:  # told where the config is read
            return False
        return chosen.follows_time or chosen.is_given

    @property
    def features(self) -> tuple[SideFeature, ...]:
        """Features of the columns of both sides."""
        return tuple(f for side in SIDES for f in self.sides[side].features)

    @property
    def notes(self) -> list[str]:
        """Columns that are left out, with the reasons."""
        return [*self.columns.notes, *(note for side in SIDES for note in self.sides[side].notes)]


@doing("guessing what the columns mean")
def guess_meaning(found: FoundTables, given: Mapping[str, TomlValue], output: Path | None = None) -> Guess:
    """Return the meaning of tables. `given` are options of the schema that are not guessed, `output` the file of the config. Raises
    DataError or ConfigError."""
    columns = _guess_columns(found, {key: value for key, value in given.items() if key in COLUMNS})
    features = given.get("features")
    listed = [f for f in features if isinstance(f, Mapping)] if isinstance(features, list) else []
    context = {str(f.get("column") or f.get("name")) for f in listed if f.get("side") == "context"}
    found = with_constant_columns(found, columns, output, context)
    ids = [str(columns.options[f"{side}_id"]) for side in SIDES]
    found = _usable(found, columns.options)
    if found.section and "dataset" not in found.section:
        columns.remarks += [r for name in ids if (r := _point_of_ids(found, name))]
    time = str(columns.options.get("time", ""))
    time, repeats = time if time in found.interactions.columns else "", 0.0
    if {*ids} <= {*found.interactions.columns}:
        rows = found.interactions.select(list(dict.fromkeys([*ids, *([time] if time else [])])))
        n, copies = len(rows), 0
        if time:
            if not any(dtype.is_nested() for dtype in found.interactions.dtypes):
                copies = n - found.interactions.hash_rows().n_unique()
            columns.remarks += _copies_of_rows(copies, n)
            once = rows.unique()
            # Where a user's rows have times of their own, one more of a pair at one time is a copy of it.
            if copies >= TWICE * n or once.select(list(dict.fromkeys([ids[0], time]))).n_unique() >= (
                1 - MAX_SHARED
            ) * len(once):
                rows = once
            if not columns.options.get("event"):  # rows of several types of events tell more than one
                rows = _without_repeats_at_once(rows, ids[0], ids[1], columns.options)
        if given.get("duplicates", "keep") == "keep":
            repeats = repeated_share(rows, *ids)
    sides, lacking = dict[SideName, SideFeatures](), dict[SideName, str]()
    counted = dict[SideName, Mapping[str, float]]()
    for side, key in zip(SIDES, ids, strict=True):
        frame = found.users if side == "user" else found.items
        if found.schema:
            sides[side] = _of_schema(found.schema, side)
        else:
            if frame is not None and key not in frame.columns and f"{side}s" in found.unnamed:
                raise DataError(
                    f"{side}s: the first line names no columns ({', '.join(frame.columns[:6])}); write a header line, with '{key}' over the ids"
                )
            own = str(columns.options.get(f"{side}s_id", ""))
            if frame is not None and not own and key not in frame.columns and key in found.interactions.columns:
                guessed = [] if f"{side}_id" in given else found.interactions.columns
                own = _own_name(frame, found.interactions, [key, *guessed], side)
                columns.put(f"{side}s_id", own, f"the table of {side}s holds the same ids in it")
            if frame is not None and own and own in frame.columns:
                frame = frame.drop(key, strict=False).rename({own: key})
            sides[side] = SideFeatures() if frame is None else _side_features(frame, side, key)
            if frame is not None:
                columns.remarks += lists_in_brackets(sides[side], frame, side)
            if frame is not None and key in frame.columns and {*ids} <= {*found.interactions.columns}:
                rows = taken_rows(found.interactions, columns.options)
                sides[side] = without_answers(sides[side], frame, side, dict(zip(SIDES, ids, strict=True)), rows)
                counted[side] = counted_columns(sides[side], frame, key, rows, found.interactions)
        if frame is not None and key in frame.columns and key in found.interactions.columns:
            lacking |= {side: why} if (why := _lacks(frame[key], found.interactions[key], side)) else {}
    return Guess(columns, sides, repeats, lacking, counted, found)


def _usable(found: FoundTables, options: Mapping[str, TomlValue]) -> FoundTables:
    """Return tables with the interactions that a training reads, by their ids. Raises DataError as it does."""
    names = ("user_id", "item_id", "event", "events", "missing")
    try:
        schema = Schema.model_validate({name: options[name] for name in names if options.get(name, "") != ""})
    except ValidationError:  # told where the config is read
        return found
    rows, keys = found.interactions, [schema.user_id, schema.item_id]
    if not {*keys} <= {*rows.columns}:
        return found
    if any(lacks_id(rows[key]).any() for key in keys):
        with_present_ids(without_ignored(rows, schema), keys, "interactions", schema, [])
    return replace(found, interactions=without_missing(rows, keys, schema))


def _without_repeats_at_once(
    rows: pl.DataFrame, user: str, item: str, options: Mapping[str, TomlValue]
) -> pl.DataFrame:
    """Return rows without those that repeat the user's row before them within AT_ONCE of the time that lies between rows of different items. Times of
    which only the order counts tell no such time."""
    form = TimeForm(str(options.get("time_unit", "s")), str(options.get("time_format", "")))
    if form.unit == "order":
        return rows
    try:
        times = moments(rows[str(options["time"])], form)
    except DataError:
        return rows  # which the check of the tables tells
    ordered = pl.DataFrame({"user": rows[user], "item": rows[item], "time": times}).sort("user", "time")
    of_user, is_same = (pl.col(name) == pl.col(name).shift() for name in ("user", "item"))
    gaps = ordered.select(gap=pl.col("time").diff(), follows=of_user.fill_null(False), is_same=is_same.fill_null(False))
    between = gaps.filter(pl.col("follows") & ~pl.col("is_same"))["gap"].median()
    if not between:
        return rows
    at_once = gaps["follows"] & gaps["is_same"] & (gaps["gap"] < AT_ONCE * float(between)).fill_null(False)  # type: ignore[arg-type]
    return ordered.filter(~at_once).select(pl.col("user").alias(user), pl.col("item").alias(item))


def _lacks(of_table: pl.Series, of_rows: pl.Series, side: SideName) -> str:
    """Return why ids of the interactions that a side's table lacks are added: they are more than a table lacks by chance, and nearly all of its own
    are in the interactions, none in another spelling. Empty: they are not, or the ids are none, which a check of the tables tells."""
    if not all(ids.dtype.is_integer() or ids.dtype == pl.String for ids in (of_table, of_rows)):
        return ""
    known, asked = (ids.drop_nulls().unique(maintain_order=True).cast(pl.String) for ids in (of_table, of_rows))
    unknown = asked.filter(~asked.is_in(known.implode()))
    both = len(asked) - len(unknown)
    is_short = len(unknown) > MAX_UNKNOWN_SHARE * len(asked) and both >= MIN_KNOWN * max(1, len(known))
    if not is_short or spelled_alike(unknown, known):
        return ""
    return (
        f"The table of {side}s has {both:,} of {len(asked):,} ids of the interactions, and {both / len(known):.0%} of its own ids occur there, so "
        "that the others seem to be missing; 'drop' leaves their rows out."
    )


def _copies_of_rows(copies: int, rows: int) -> list[str]:
    """Return a line about so many `copies` among the rows of interactions with times, that equal another one in every column; an empty list if they are few."""
    if copies < MIN_COPIES * rows:
        return []
    return [
        f"{copies:,} of {rows:,} rows equal an earlier one in every column, the time included, as in a log that is read twice; drop them if they are "
        "no interactions of their own"
    ]


def _point_of_ids(found: FoundTables, name: str) -> str:
    """Return a line about ids of a text file that are whole numbers with a point, as programs write that had missing values; "" for
    others."""
    if not found.is_text or name not in found.interactions.columns:
        return ""
    ids = found.interactions[name].drop_nulls()
    if not ids.dtype.is_float() or not len(ids) or not (ids.abs() < 1e15).all() or (ids != ids.round()).any():
        return ""
    return (
        f"'{name}': ids such as {ids[0]} keep their point, and {ids[0]:.0f} is another id; write whole numbers if the tables of a side or "
        "the requests have these"
    )


def _own_name(frame: pl.DataFrame, rows: pl.DataFrame, names: Sequence[str], side: SideName) -> str:
    """Return the column of a side's table that holds the ids of the interactions, whose column is the first of some names; empty for none. Raises
    DataError if several may be it, or the number of the row alone, and if one holds the ids of another one of the names, of that with the most ids,
    which are text, or numbers as many as half of the table's."""
    key, *others = names
    numbers = row_numbers(frame)
    keys = [s for s in (*frame.drop(numbers), *frame.select(numbers)) if _holds_ids(s) and not s.is_duplicated().any()]
    ids = {name: rows[name].drop_nulls().unique() for name in others if name != key and _holds_ids(rows[name])}
    of_others = [s for s in ids.values() if len(s) > 1 and (s.dtype == pl.String or 2 * len(s) >= frame.height)]
    for known in (rows[key].unique(), *sorted(of_others, key=len, reverse=True)):
        asked = known.cast(pl.String)
        fits = [str(s.name) for s in keys if float(asked.is_in(s.cast(pl.String).implode()).mean() or 0) >= MIN_KNOWN]  # type: ignore[arg-type]
        plain = [name for name in fits if name not in numbers]
        if named := [name for name in plain if plain[1:] == [] or is_id(name) or names_user(name) or names_item(name)]:
            plain = named[:1]
        if known.name == key and len(plain) == 1:
            return plain[0]
        if fits:
            of_log = f"set schema.{side}_id = '{known.name}', and " if known.name != key else ""
            raise DataError(
                f"{side}s: {' and '.join(map(repr, plain or fits))} may hold the ids that '{known.name}' of the interactions has; {of_log}set "
                f"schema.{side}s_id = '{(plain or fits)[0]}' to say so"
            )
    return ""


def _holds_ids(series: pl.Series) -> bool:
    return series.dtype.is_integer() or series.dtype == pl.String


def _guess_columns(found: FoundTables, given: Mapping[str, TomlValue]) -> GuessedColumns:
    known, why = dict[str, TomlValue](), ""
    if found.schema:
        own = found.schema.model_dump(mode="json", exclude_defaults=True, include={*COLUMNS})
        known, why = {"user_id": found.schema.user_id, "item_id": found.schema.item_id, **own}, "as the data set has it"
    elif found.layout == "sequences":
        known = {"user_id": USER, "item_id": "item_id", "time": PLACE, "time_unit": "order"}
        why = "a line is a user and the user's items, oldest first"
    if not known:
        shared = {"user_id": found.users, "item_id": found.items}
        tables = {k: f for k, f in shared.items() if f is not None}
        return guess_columns(
            found.interactions,
            given,
            {k: _shared_columns(f, found.interactions) for k, f in tables.items()},
            {k: _keys(f) for k, f in tables.items()},
        )
    columns = GuessedColumns()
    for key, value in (known | {**given}).items():
        columns.put(key, value, "as given" if key in given else why)
    return columns


def _shared_columns(frame: pl.DataFrame, rows: pl.DataFrame) -> list[str]:
    """Return the columns of a side's table without those of which it and the interactions each have their own: true and false, and names of
    rows, none of which stands in the other table."""

    def is_own(name: str) -> bool:
        series, table = rows[name], frame[name]
        if series.dtype == pl.Boolean:
            return True
        names_rows = _holds_ids(series) and _holds_ids(table) and is_distinct(series)
        return names_rows and not bool(series.cast(pl.String).is_in(table.cast(pl.String).implode()).any())

    return [name for name in frame.columns if name not in rows.columns or not is_own(name)]


def _keys(frame: pl.DataFrame) -> list[str]:
    """Return the columns of whole numbers or text that are distinct in nearly all rows."""
    may_be = (s for s in frame if s.dtype.is_integer() or s.dtype == pl.String)
    return [s.name for s in may_be if s.n_unique() >= MAX_DISTINCT * len(s)]


def _side_features(frame: pl.DataFrame, side: SideName, key: str) -> SideFeatures:
    """Return the features of a side's table, without columns that number its rows."""
    numbers = row_numbers(frame, [key])
    found = guess_features(frame.drop(numbers), side, key)
    return replace(found, notes=(*notes_of_row_numbers(numbers, f"{side}s"), *found.notes))


def _of_schema(schema: Schema, side: SideName) -> SideFeatures:
    """Return the features of a data set's own schema, without those of ids and of histories."""
    made = []
    for f in schema.columns(side):
        if f.source != schema.id_column(side) and not f.computes:
            options = f.model_dump(mode="json", exclude_defaults=True)
            options = {"kind": f.kind, "side": f.side, "name": f.name} | options
            made.append(SideFeature(f.source, options, "as the data set has it", f.searchable))
    return SideFeatures(tuple(made), schema.title if side == "item" else "")
