"""Tables of both sides of a log: the first reading of all interactions, which looks at ids, times and averaged
columns."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container

import polars as pl

from twotower.data.buckets import in_user_order
from twotower.data.events import event_counts, event_notes, without_ignored
from twotower.data.labels import POSITIVE
from twotower.data.prepare.log_pieces import Log, Sides
from twotower.data.readers import read_file, table_errors
from twotower.data.table_path import TablePath
from twotower.data.table_paths import table_files
from twotower.data.tables import (
    averaged_columns,
    averaged_gaps,
    averaged_notes,
    check_side,
    imputed_note,
    missing_note,
    side_columns,
    with_id_name,
    with_present_ids,
    without_missing,
)
from twotower.data.text_files import Reading
from twotower.data.times import TIME, Times
from twotower.data.unknown_ids import COUNT, counted_ids, of_one_type
from twotower.data.versions import no_versions
from twotower.errors import DataError
from twotower.features.side import SIDES, SideName
from twotower.features.values import missing_count
from twotower.progress import JobProgress

log = logging.getLogger(__name__)

PENDING_IDS = 2**20
"""Ids that are collected before they are merged with the earlier ones."""


class LogIds:
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


def settle_sides(source: Log, known: Sides | None, notes: list[str]) -> tuple[Sides, Sides, Times | None, Counter[str]]:
    """Return the tables of both sides, the users in the order of their rows, those of the versions of sides that have
    some, a reader of the times that has looked at all of them, and the numbers of interactions that are left out, by
    reason. `known` are the tables, if an earlier call has written them and those of versions. Raises DataError."""
    schema = source.schema
    keys = [schema.id_column(side) for side in SIDES]
    times, drops = (Times(schema) if schema.time else None), source.drops
    if times and times.drops:  # the ids of rows that are left out are none, so all times are looked at first
        for piece in source.pieces:
            rows = source.read(piece, list(dict.fromkeys([*keys, schema.time, *filter(None, [schema.event])])))
            times.look(without_missing(without_ignored(rows, schema), keys, schema)[schema.time])
        times.settle()
        notes += times.notes
    ids = {} if known else {side: LogIds(schema.id_column(side)) for side in SIDES}
    averaged = [] if known else [a for a in averaged_columns(schema) if a != POSITIVE]
    read_as_is = (f.source for f in schema.columns("context") if not (f.computes or f.reads_time))
    of_context = [] if known else list(dict.fromkeys(read_as_is))
    wanted = [*(keys if ids or drops else []), *averaged, *of_context, *filter(None, [schema.time])]
    columns = list(dict.fromkeys([*wanted, *filter(None, [schema.event])]))
    progress, gaps, kept = JobProgress(log, "interactions looked at", source.rows), Counter[str](), 0
    types, missing, left_out = Counter[str](), Counter[str](), Counter[str]()
    for piece in source.pieces if wanted else ():
        read = source.read(piece, columns)
        named = without_ignored(read, schema)
        present = without_missing(named, keys, schema) if drops else named
        if not known:
            present = with_present_ids(present, keys, "interactions", schema, [])
        if times and not times.drops:
            times.look(present[schema.time])
        frame = times.kept(present) if times else present
        left_out["rows are ignored events"] += read.height - named.height
        left_out["rows lack an id"] += named.height - present.height
        left_out["rows have bad times"] += present.height - frame.height
        types.update(event_counts(read, schema))
        progress.advance(piece.rows or 0)
        kept += frame.height
        if not known:
            for of_side in ids.values():
                of_side.add(frame)
            gaps.update(averaged_gaps(frame, schema))
            missing.update({name: missing_count(frame[name]) for name in of_context})
    if times and not times.drops:
        times.settle()
    if n := left_out["rows lack an id"]:
        notes += [missing_note("interactions", n, n + kept + left_out["rows have bad times"], keys)]
    if known:
        return known, {}, times, left_out
    notes += [*event_notes(types, schema), *averaged_notes(gaps, kept)]
    notes += [imputed_note("interactions", name, n, kept) for name, n in missing.items() if n]
    found, versions = Sides(), Sides()
    for side, given in zip(SIDES, (source.data.users, source.data.items), strict=True):
        key, counted = schema.id_column(side), ids[side].counted()
        if given:
            from_text = table_files(given)[0].is_text or source.is_text
            wanted = [schema.table_id(side), *side_columns(side, schema)[1:], *filter(None, [schema.valid_from])]
            reading = Reading.of(schema, side, source.data.format)
            frame = with_id_name(read_file(given, reading, wanted), side, schema)
            notes += _left_out(side, table_files(given), frame, wanted)
            for path in table_files(given):
                source.check_unchanged(f"{side}s", path)
            newest, every = check_side(frame, side, schema, notes, counted, from_text)
            found[side] = newest.select(columns := side_columns(side, schema))
            if every is not None:
                versions[side] = every.select(*columns, TIME)
        else:
            found[side], _ = check_side(counted.select(pl.col(key).sort()), side, schema, notes)
    if schema.valid_from and not versions:
        raise no_versions(schema)
    found["user"] = in_user_order(found["user"], schema.user_id)
    return found, versions, times, left_out


def _left_out(side: SideName, paths: list[TablePath], frame: pl.DataFrame, wanted: Container[str]) -> list[str]:
    """Return a line about the columns of a table that the schema does not name, none without such. A frame of text
    files has all columns."""
    names = dict.fromkeys(frame.columns)
    for path in () if paths[0].is_text else paths:
        with table_errors(path):
            names |= dict.fromkeys(path.scan().collect_schema().names())
    left = ", ".join(f"'{name}'" for name in names if name not in wanted)
    return (
        [f"{side}s: not kept, as the schema does not name them, so that no filter or slice reads them: {left}"]
        if left
        else []
    )
