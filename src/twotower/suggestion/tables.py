"""Tables of the data that a config is suggested for: found by names and contents, and read as a training reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
from pydantic import ValidationError

from twotower.config.toml import TomlValue
from twotower.data.datasets import DATASETS
from twotower.data.datasets.named_dataset import NamedDataset
from twotower.data.readers import Reading, TableLike, as_frame, read_file
from twotower.data.table_paths import TABLE_SUFFIXES, ending, is_text, table_files
from twotower.data.text_format import TextFormat
from twotower.errors import ConfigError, DataError, did_you_mean
from twotower.features.schema import Schema
from twotower.section import first_problem
from twotower.suggestion import names
from twotower.suggestion.text_form import guess_form, looks_like_seconds
from twotower.suggestion.time_form import is_dated

USER, ITEM, PLACE = "user_id", "item_id", "place"
"""Columns of files with one user a line, which have no names."""


@dataclass(frozen=True)
class FoundTables:
    """Frames of the three tables as they come, and the section `[data]` that names them."""

    interactions: pl.DataFrame
    users: pl.DataFrame | None = None
    items: pl.DataFrame | None = None
    section: Mapping[str, TomlValue] | None = None
    """None: the tables are frames, which no file names."""
    schema: Schema | None = None
    """Schema of a data set by name."""
    layout: str = "rows"


def find_tables(
    interactions: TableLike,
    users: TableLike | None = None,
    items: TableLike | None = None,
    folder: Path = Path(),
    form: TextFormat | None = None,
) -> FoundTables:
    """Read the tables of frames, of paths, of a folder with one file for each table, or of a data set by name, such as ml-1m, or
    of its archive. Paths of the section are relative to `folder`; the form of text files is guessed if none is given. Raises
    DataError or ConfigError."""
    if not isinstance(interactions, str | Path):
        of_users = None if users is None else as_frame(users, "users", Reading(None))
        of_items = None if items is None else as_frame(items, "items", Reading(None))
        frame = _of_rows(as_frame(interactions, "interactions", Reading(None)), "interactions")
        return FoundTables(frame, of_users, of_items)
    for table in (users, items):
        if table is not None and not isinstance(table, str | Path):
            raise DataError(
                "interactions: a path, beside a table that is none; give all tables as frames or all as paths"
            )
    paths = {"users": users, "items": items}
    if dataset := _named(str(interactions), folder):
        if given := next((name for name, table in paths.items() if table is not None), ""):
            raise ConfigError(f"data set '{dataset[1].kind}' has {given} of its own; leave out `{given}`")
        section, kind = dataset
        tables = kind.load()
        return FoundTables(tables.interactions, tables.users, tables.items, section, kind.table_schema)
    log, found = _of_folder(Path(interactions))
    for name, table in paths.items():
        if table is not None:
            found[name] = Path(str(table))
    files = {name: table_files(path) for name, path in {"interactions": log, **found}.items()}
    if form is None:
        form = guess_form(files["interactions"][0]) if is_text(files["interactions"][0]) else TextFormat()
        guessed = True
    else:
        guessed = False
    reading = Reading(None, dates=False).of_table(form)  # a training reads times as text
    if form.layout == "sequences":
        reading = replace(reading, numbers=frozenset([PLACE]), lines=(USER, ITEM, PLACE))
    try:
        frames = {"interactions": read_file(log, reading)}
    except DataError as e:
        hint = "; or name the file of the interactions, and give `users` and `items`" if log.is_dir() else ""
        raise DataError(f"{e}{hint}") from None
    for name, path in found.items():
        frames[name] = read_file(
            path, Reading(None, separator=form.separator if is_text(files[name][0]) else "", dates=False)
        )
    section = {name: _relative(path, folder) for name, path in {**found, "interactions": log}.items()}
    frame = _of_rows(frames["interactions"], str(interactions))
    if guessed and form.columns:
        form = form.model_copy(update={"columns": _column_names(frame)})
        frame = frame.rename(dict(zip(frame.columns, form.columns, strict=True)))
    if options := form.model_dump(mode="json", exclude_defaults=True):
        section["format"] = options
    return FoundTables(frame, frames.get("users"), frames.get("items"), section, None, form.layout)


def _of_rows(frame: pl.DataFrame, what: str) -> pl.DataFrame:
    if not frame.height:
        raise DataError(f"{what}: the table has no rows, expected at least one; fill it")
    return frame


def _named(name: str, folder: Path) -> tuple[dict[str, TomlValue], NamedDataset] | None:
    """Return the section and the data set of a name, or of an archive of one; None for a path of tables."""
    path = Path(name)
    options: dict[str, TomlValue] = {}
    if name in DATASETS or (":" in name and not path.exists()):
        kind: type[NamedDataset] = DATASETS.find(name, trust=True)
    elif path.suffix.lower() == ".zip":
        kind = _of_archive(path)
        options = {"archive": _relative(path, folder)}
    elif not path.exists() and not ending(path) and (hint := did_you_mean(name, DATASETS.names)):
        raise DataError(f"{name}: no such file or folder, nor a data set{hint}")
    else:
        return None
    try:
        made = kind.model_validate({key: str(path) for key in options})
    except ValidationError as e:
        raise ConfigError(f"data set '{name}': {first_problem(e)}") from None
    return ({"dataset": {"kind": kind.kind, **options}} if options else {"dataset": kind.kind}), made


def _of_archive(path: Path) -> type[NamedDataset]:
    """Return the data set whose archive a zip file is, by the folder inside it that bears its name."""
    from zipfile import BadZipFile, ZipFile

    try:
        with ZipFile(path) as archive:
            folders = {name.partition("/")[0] for name in archive.namelist()}
    except (OSError, BadZipFile) as e:
        raise DataError(f"{path}: no zip archive that can be read ({e})") from None
    for kind in DATASETS:
        if kind.kind in folders:
            return kind
    raise DataError(
        f"{path}: holds no folder of a data set ({', '.join(DATASETS.names)}); unpack it, and name the tables"
    )


def _of_folder(path: Path) -> tuple[Path, dict[str, Path]]:
    """Return the interactions, and the users and items by these names, of a path: those of a folder by the names of its files.
    A folder of one table, or of one in pieces, is the interactions."""
    if not path.is_dir():
        return path, {}
    inside = [p for p in sorted(path.iterdir()) if not p.name.startswith((".", "_"))]
    roles: dict[str, Path] = {}
    for table in inside:
        stem = names.plain(table.name.partition(".")[0])
        role = next(
            (role for role, words in names.FILES.items() if {stem, stem.rpartition("_")[2]} & {*words.split()}), ""
        )
        if role and (table.is_dir() or ending(table) in TABLE_SUFFIXES):
            if role in roles:
                raise DataError(
                    f"{path}: {roles[role].name} and {table.name} both look like {role}; name one file, and `users` and `items`"
                )
            roles[role] = table
    if "interactions" in roles:
        return roles.pop("interactions"), roles
    if roles:
        left = [p for p in inside if p not in roles.values() and ending(p) in TABLE_SUFFIXES]
        if len(left) == 1:
            return left[0], roles
        raise DataError(
            f"{path}: found {', '.join(p.name for p in roles.values())}, and no file of interactions; name that file, and give "
            "`users` and `items`"
        )
    return path, {}


def _relative(path: Path | str, folder: Path) -> str:
    """Return a path relative to the folder of the config, with forward slashes."""
    return Path(os.path.relpath(path, folder)).as_posix()


def _column_names(frame: pl.DataFrame) -> tuple[str, ...]:
    """Return names for the columns of a file without a header line: the first two are ids, a column of seconds is a time, one of
    few numbers a rating."""
    given = [USER, ITEM]
    for name in frame.columns[2:]:
        series = frame[name]
        numeric = series.dtype.is_numeric() or series.dtype == pl.Boolean
        found = name
        if is_dated(series) or (numeric and series.n_unique() > 20 and looks_like_seconds(series)):
            found = "time"
        elif numeric and 2 <= series.n_unique() <= 20:
            found = "rating"
        given.append(found if found not in given else name)
    return tuple(given[: frame.width])
