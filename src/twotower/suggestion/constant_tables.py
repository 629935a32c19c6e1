"""Tables of items and users from columns of the interactions that have one value for each of them."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl

from twotower.data.constant_columns import MIN_SHARE, Constancy, measure_constancy
from twotower.data.table_paths import table_source, takes_in
from twotower.errors import ConfigError
from twotower.suggestion.answers import counted_columns, taken_rows
from twotower.suggestion.guessed_columns import GuessedColumns
from twotower.suggestion.numbering import row_numbers
from twotower.suggestion.side_features import guess_features
from twotower.suggestion.tables import FoundTables

MAX_ROWS, MIN_IDS = 500_000, 2_000
"""Rows in which columns are measured; of more, those of some items or users, about MIN_IDS of them or more."""
MAX_CHANGED = 0.25
"""Largest ratio of the rows without the most frequent value of their item to the rows without that of the log, of a
column that seems to be one of items whose values change."""


def with_constant_columns(
    found: FoundTables, columns: GuessedColumns, output: Path | None, context: Collection[str] = ()
) -> FoundTables:
    """Return the tables, with tables of items and users made of columns of the interactions: columns without another
    meaning (`context` names some that have one), which no table has, with one value in MIN_SHARE of the rows of each
    item or user. Notes of `columns` say which are left out. The new files are named by `output`, the file of the
    config; without it tables of files get none. Raises ConfigError if such a file exists."""
    log, options = found.interactions, columns.options
    ids = {"items": str(options["item_id"]), "users": str(options["user_id"])}
    if found.schema is not None or not {*ids.values()} <= {*log.columns}:
        return found
    meant = {*columns.named, *row_numbers(log, columns.named), *context}
    left = [name for name in log.columns if name not in meant and not re.match(r"__|\*$|\^.*\$$", name)]  # no patterns
    for table, key in ids.items():
        frames = (found.items,) if table == "items" else (found.items, found.users)
        taken = {name for frame in frames if frame is not None for name in frame.columns}
        side, other = table[:-1], ids["users" if table == "items" else "items"]
        own = str(options.get(f"{table}_id") or key)
        measured = _measured(found, key, other, [name for name in left if name not in taken])
        made = _values_of_ids(log, key, [name for name, constancy in measured.items() if constancy.exists])
        counted = counted_columns(guess_features(made, "item", key), made, key, taken_rows(log, options), log)
        columns.notes += [
            f"'{name}': one value for each {side}, which follows the number of its rows as a count of them would"
            for name in counted
        ]
        if table == "items":
            columns.notes += [
                f"'{name}': {1 - c.share:.1%} of the rows differ from the most frequent value of their item "
                f"(at most {1 - MIN_SHARE:.0%}), as of a price that changes, so it is no column of items"
                for name, c in measured.items()
                if _changes(c)
            ]
        left = [name for name in left if name not in made.columns]
        if not (names := [name for name in made.columns if name not in (key, *counted)]):
            continue
        listed = f"{', '.join(map(repr, names))} of the interactions"
        columns.notes[:] = [note for note in columns.notes if not note.startswith(tuple(f"'{n}'" for n in names))]
        if why := _why_unwritten(found, own, output, table):
            columns.notes.append(f"{listed}, one value for each {side}; {why}")
            continue
        found = _with_table(found, table, own, made.select(pl.col(key).alias(own), *names), listed, output)
    told = {name for note in (*columns.notes, *found.notes) for name in note.split("'")[1::2]}
    if left := [f"'{name}'" for name in left if name not in told]:
        columns.notes.append(f"{', '.join(left[:6])}{', …' if left[6:] else ''} of the interactions")
    return found


def table_file(frame: pl.DataFrame) -> bytes:
    """Return the content of a Parquet file of a table."""
    file = io.BytesIO()
    frame.write_parquet(file)
    return file.getvalue()


def table_path(output: Path, table: str) -> Path:
    """Return the file of a table by the file of its config."""
    return output.with_name(f"{output.stem}.{table}.parquet")


def refuse_among_tables(found: FoundTables, path: Path) -> None:
    """Raise ConfigError for a path in the folder of the config that would be read with one of the tables."""
    named = {name: value for name, value in (found.section or {}).items() if name not in ("format", "dataset")}
    for source in map(table_source, map(str, named.values())):
        if takes_in(path.parent / source if isinstance(source, Path) else source, path):
            raise ConfigError(f"{path}: would be read with the files of {source}; choose another folder for `output`")


def _present(frame: pl.DataFrame, name: str) -> pl.Expr:
    """Return a column whose missing values are null, also those of numbers."""
    return pl.col(name).fill_nan(None) if frame[name].dtype.is_float() else pl.col(name)


def _measured(found: FoundTables, key: str, other: str, names: Collection[str]) -> Mapping[str, Constancy]:
    """Return how far columns are functions of ids, in the rows of some ids if there are many; empty for ids whose
    spelling a table would change."""
    log, is_float = found.interactions, found.interactions[key].dtype.is_float()
    if not (log[key].dtype == pl.String or log[key].dtype.is_integer() or (is_float and not found.is_text)):
        return {}
    every = min(log.height // MAX_ROWS, log[key].n_unique() // MIN_IDS)
    rows = log.filter(pl.col(key).hash() % every == 0) if every > 1 else log
    return {name: measure_constancy(rows[name], rows[key], rows[other]) for name in names}


def _changes(found: Constancy) -> bool:
    """Return True for a column of which most rows of an item have one value, and too many another one."""
    return found.share < MIN_SHARE and 0 < found.rows - found.same <= MAX_CHANGED * (found.rows - found.common)


def _values_of_ids(log: pl.DataFrame, key: str, names: Collection[str]) -> pl.DataFrame:
    """Return a table of the ids of a log with the most frequent value of each column, of equal counts the smallest."""
    rows = log.select(_present(log, name) for name in (key, *names)).filter(pl.col(key).cast(pl.String) != "")
    table = rows.select(pl.col(key).unique().sort())
    for name in names:
        counts = rows.select(key, name).drop_nulls().group_by(key, name).agg(__n=pl.len())
        best = counts.sort("__n", name, descending=[True, False]).unique(key, keep="first", maintain_order=True)
        table = table.join(best.select(key, name), on=key, how="left", maintain_order="left")
    return table


def _why_unwritten(found: FoundTables, own: str, output: Path | None, table: str) -> str:
    """Return why no table has columns of the interactions, empty if one may. Raises ConfigError if its file exists."""
    given, form = getattr(found, table), (found.section or {}).get("format")
    separators = form.get("separators") if isinstance(form, Mapping) else None
    if (given is not None and own not in given.columns) or (isinstance(separators, Mapping) and table in separators):
        return f"add them to the table of {table}"
    if found.section is None:
        return ""
    if output is None:
        return f"with an output file they are written as a table of {table}, which the config reads"
    path = table_path(output, table)
    refuse_among_tables(found, path)
    if path.exists():
        raise ConfigError(
            f"{path}: exists already, and the table of {table} would be written there; choose another file for "
            "`output`, or remove this one"
        )
    return ""


def _with_table(
    found: FoundTables, table: str, own: str, made: pl.DataFrame, listed: str, output: Path | None
) -> FoundTables:
    """Return the tables with `made` as a table, or added to the one that is given, and with a note."""
    given, section = getattr(found, table), found.section
    note = f"table of {table}: {listed}, of each {table[:-1]} the most frequent value, of equally frequent ones the smallest"
    if given is not None:
        made = made.select(pl.col(own).cast(pl.String).alias("__key"), pl.exclude(own))
        given = given.with_columns(pl.col(own).cast(pl.String).alias("__key"))
        made = given.join(made, on="__key", how="left", maintain_order="left").drop("__key")
        note += f", added to the table of {table}"
    if section is not None and output is not None:
        section = {**section, table: table_path(output, table).name}
        note += f", in {section[table]}; it does not follow later rows"
    found = replace(found, section=section, made=(*found.made, table), notes=(*found.notes, note))
    return replace(found, items=made) if table == "items" else replace(found, users=made)
