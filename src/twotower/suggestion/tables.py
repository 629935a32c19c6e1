"""Tables of the data that a config is suggested for: found by names and contents, and read as a training reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
from pydantic import ValidationError

from twotower.config.toml import TomlValue
from twotower.data.datasets import DATASETS
from twotower.data.datasets.named_dataset import NamedDataset
from twotower.data.parts import PART, PartFiles
from twotower.data.readers import Reading, TableLike, as_frame, read_file
from twotower.data.table_path import TABLE_SUFFIXES, ending
from twotower.data.table_paths import table_files, table_source
from twotower.data.text_format import SEPARATOR_OF, TextFormat
from twotower.errors import ConfigError, DataError, did_you_mean
from twotower.features.schema import Schema, is_pattern
from twotower.features.values import with_texts
from twotower.files.urls import Url, is_url
from twotower.progress import doing
from twotower.section import first_problem
from twotower.suggestion.folder import FolderTables, folder_tables
from twotower.suggestion.guessed_columns import is_distinct
from twotower.suggestion.text_form import guess_form, has_decimal_commas, looks_like_scale, looks_like_seconds
from twotower.suggestion.time_form import has_digits_of_dates, is_dated, time_form

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
    is_text: bool = False
    """True if the interactions stand in text files, where ids keep their spelling."""
    unnamed: frozenset[str] = frozenset()
    """Tables of users and items whose first line names no columns, as far as its values tell."""
    notes: tuple[str, ...] = ()
    """Lines: which files are read and as what, which are not and why, what their form is."""
    made: tuple[str, ...] = ()
    """Those of "items" and "users" that have columns of the interactions, which no file or frame has there."""

    @property
    def has_parts(self) -> bool:
        """True if files give the parts of the interactions."""
        return "train" in (self.section or {})


@doing("looking for the tables")
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
        notes = list[str]()
        of_users = None if users is None else _of_values(as_frame(users, "users", Reading(None)), notes)
        of_items = None if items is None else _of_values(as_frame(items, "items", Reading(None)), notes)
        frame = _of_rows(as_frame(interactions, "interactions", Reading(None)), "interactions", notes)
        return FoundTables(_of_values(frame, notes), of_users, of_items, notes=tuple(notes))
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
    files = folder_tables(table_source(interactions))
    sides = {**files.sides} | {name: table_source(str(table)) for name, table in paths.items() if table is not None}
    read = _Files(files, sides, folder, form)
    return read.found()


class _Files:
    """Tables in files: their forms, guessed where none is given, their frames and the section that names them."""

    def __init__(
        self, files: FolderTables, sides: Mapping[str, Path | Url], folder: Path, form: TextFormat | None
    ) -> None:
        self.files, self.sides, self.folder, self.given = files, sides, folder, form
        first = {name: table_files(path)[0] for name, path in {"interactions": files.log, **sides}.items()}
        encoding = (form or TextFormat()).encoding
        self.texts = {name: replace(path, encoding=encoding) for name, path in first.items() if path.is_text}
        if form and form.model_fields_set == {"encoding"}:  # which tells nothing of the values
            form = self.given = None
        own = {name: guess_form(path) for name, path in self.texts.items()} if form is None else {}
        self.form = (form or own.get("interactions") or TextFormat()).model_copy(update={"encoding": encoding})
        self.separators = {name: of.separator for name, of in own.items()}
        self.unnamed = frozenset(name for name in sides if name in own and own[name].columns)
        self.notes = [f"not read: {line}" for line in files.unread]

    def found(self) -> FoundTables:
        """Read the tables. Raises DataError."""
        frame = self._interactions()
        frames = {name: self._side(name) for name in self.sides}
        form = self.form
        if self.given is None:
            form = form.model_copy(update=self._separators())
            comma = self._decimal_commas({"interactions": frame, **frames})
            if comma:
                form = self.form = form.model_copy(update={"decimal": ","})
                frame = self._interactions()
                frames = {name: self._side(name) for name in self.sides}
            named = dict[str, str]()
            if form.columns:
                given = _column_names(frame, len(form.columns))
                named = dict(zip(form.columns, given, strict=True))
                form, frame = form.model_copy(update={"columns": given}), frame.rename(named)
                elsewhere = [name for name in (USER, ITEM) if name in given[2:]]
                moved = f" ({' and '.join(elsewhere)} after columns that hold no ids)" if elsewhere else ""
                self.notes.append(
                    f"the first line of {self.texts['interactions'].name} names no columns, so these are named by places and values: "
                    f"{', '.join(form.columns)}{moved}; data.format.columns corrects them"
                )
            if comma:
                shown_as = {("interactions", old): new for old, new in named.items()}
                listed = ", ".join(f"'{shown_as.get(column, column[1])}'" for column in comma)
                self.notes.append(f"numbers with a decimal comma are read: {listed}")
        shown = {**self.sides, **(self.files.parts or {"interactions": self.files.log})}
        section: dict[str, TomlValue] = {name: _relative(path, self.folder) for name, path in shown.items()}
        if options := form.model_dump(mode="json", exclude_defaults=True):
            section["format"] = options
        if len(shown) > 1 or self.notes:
            self.notes.insert(0, f"read: {', '.join(f'{name} = {path.name}' for name, path in shown.items())}")
        return FoundTables(
            frame, frames.get("users"), frames.get("items"), section, None, form.layout, "interactions" in self.texts, self.unnamed,
            tuple(self.notes),
        )  # fmt: skip

    def _interactions(self) -> pl.DataFrame:
        log = self.files.log
        reading = replace(
            Reading(None, dates=False).of_table(self.form), option="data.format.{}", encoding=self.form.encoding
        )  # times stay text, as in a training
        if self.form.layout == "sequences":
            reading = replace(reading, numbers=frozenset([PLACE]), lines=(USER, ITEM, PLACE))
        if self.files.parts:
            try:
                self._check_parts()
                frame = as_frame(
                    PartFiles({name: str(path) for name, path in self.files.parts.items()}), "interactions", reading
                ).drop(PART)
                return _of_rows(frame, str(log), self.notes)
            except DataError as e:
                self.files = self.files.without_parts(f"no part beside {log.name} ({e})")
                self.notes = [f"not read: {line}" for line in self.files.unread]
        try:
            frame = read_file(str(log), reading)
        except DataError as e:
            is_folder = isinstance(log, Url) or log.is_dir()
            hint = "; or name the file of the interactions, and give `users` and `items`" if is_folder else ""
            raise DataError(f"{e}{hint}") from None
        return _of_rows(frame, str(log), self.notes)

    def _check_parts(self) -> None:
        """Raise DataError if files of the parts have other forms than that of the part train."""
        first = {name: table_files(path)[0] for name, path in self.files.parts.items()}
        if self.given is not None or not first["train"].is_text:
            return  # reading tells of other columns
        for path in first.values():
            own = guess_form(replace(path, encoding=self.form.encoding)) if path.is_text else None
            same = own is not None and own.separator == self.form.separator
            if self.form.layout == "rows" and own is not None:  # a line of a few items of one user may look like a row
                same &= (own.layout, len(own.columns)) == (self.form.layout, len(self.form.columns))
            if not same:
                raise DataError(f"the form of {path.name} is another: text, separator, header line or columns")

    def _side(self, name: str) -> pl.DataFrame:
        separator = self.separators.get(name, self.form.separator_of(name)) if name in self.texts else ""
        comma = self.form.decimal == ","
        reading = Reading(None, separator=separator, dates=False, decimal_comma=comma, encoding=self.form.encoding)
        found = read_file(str(self.sides[name]), reading)
        return _without_reserved(found, self.notes)

    def _separators(self) -> dict[str, TomlValue]:
        """Return the options of the separators: one for all text files, or one for each table whose own is another."""
        own = {name: self.separators[name] or SEPARATOR_OF[path.ending] for name, path in self.texts.items()}
        common = self.form.separator
        others = {n: s for n, s in own.items() if s != (common or SEPARATOR_OF[self.texts[n].ending])}
        return {"separators": others} if others else {}

    def _decimal_commas(self, frames: Mapping[str, pl.DataFrame]) -> list[tuple[str, str]]:
        """Return the tables and columns of numbers with a decimal comma. Where numbers with points stand beside them, there are
        none, and a note says so."""
        found, points = list[tuple[str, str]](), list[str]()
        for name, path in self.texts.items():
            if (self.separators.get(name, "") or SEPARATOR_OF[path.ending]) == ",":
                continue
            points += [f"'{series.name}'" for series in frames[name] if series.dtype.is_float()]
            texts = [series for series in frames[name] if series.dtype == pl.String]
            found += [(name, series.name) for series in texts if has_decimal_commas(series)]
        if found and points:
            self.notes.append(
                f"numbers with a decimal comma stay text ({', '.join(repr(column) for _, column in found)}), because others have a point "
                f"({', '.join(points)}); write all with one mark"
            )
            return []
        return found


def _of_rows(frame: pl.DataFrame, what: str, notes: list[str]) -> pl.DataFrame:
    if not frame.height:
        raise DataError(f"{what}: the table has no rows, expected at least one; fill it")
    return _without_reserved(frame, notes)


def _without_reserved(frame: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """Return a frame without the index that pandas writes, `__index_level_0__`, and columns whose names are patterns,
    which are noted; dictionaries of texts become text."""
    for name in filter(is_pattern, frame.columns):
        note = f"not read: column '{name}', as tables are searched for this name as a pattern; rename it"
        notes += [] if note in notes else [note]
    left = {s.name: s for s in frame if not is_pattern(s.name) and not re.fullmatch(r"__index_level_\d+__", s.name)}
    return with_texts(pl.DataFrame(left))


def _of_values(frame: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """Return the columns of a frame without those of Python objects, of which each is noted."""
    objects = [name for name, dtype in frame.schema.items() if dtype == pl.Object]
    for name in objects:
        notes.append(
            f"not read: column '{name}', whose values are objects of Python; make them numbers, texts or times"
        )
    return _without_reserved(frame.drop(objects), notes)


def _named(name: str, folder: Path) -> tuple[dict[str, TomlValue], NamedDataset] | None:
    """Return the section and the data set of a name, or of an archive of one; None for a path of tables."""
    if is_url(name):
        return None
    path = Path(name)
    options: dict[str, TomlValue] = {}
    is_path = path.exists() or ending(path) in TABLE_SUFFIXES or re.search(r"[/\\]", name)  # C:\log.csv too
    if name in DATASETS or (":" in name and not is_path):
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


def _relative(path: Path | Url | str, folder: Path) -> str:
    """Return a path relative to the folder of the config, or absolute where none leads there, with forward slashes; a URL as it is."""
    if isinstance(path, Url):
        return str(path)
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return Path(path).absolute().as_posix()


def _column_names(frame: pl.DataFrame, own: int) -> tuple[str, ...]:
    """Return names for the `own` first columns, of a file without a header line, none twice; the others are of its folders. The
    first two that may be ids are, a column of times is a time, one of 0 and 1 a label, one of few steps on a scale a rating."""
    folders, columns = frame.columns[own:], frame.columns[:own]
    wanted = [name for name in (USER, ITEM) if name not in folders]
    left = [name for name in columns if not _is_no_id(frame[name])]
    others = [name for name in left if _meaning(frame[name]) != "label"]
    left = others if len(others) >= len(wanted) else left
    if not any(_tells_time(frame[name]) for name in columns if name not in left):
        others = [name for name in left if not (frame[name].is_sorted() and _tells_time(frame[name]))]
        enough = sum(not _meaning(frame[name]) for name in others) >= len(wanted)
        left = others if enough else left  # the others are times of which many rows share one
    if ITEM in wanted and any(
        not is_distinct(frame[name]) for name in left[len(wanted) - 1 :]
    ):  # each row its own item is none
        left = left[: len(wanted) - 1] + [name for name in left[len(wanted) - 1 :] if not is_distinct(frame[name])]
    if len(left) < len(wanted):
        left = columns
    ids, given = dict(zip(left, wanted, strict=False)), list[str]()
    for name in columns:
        found = ids.get(name) or _meaning(frame[name]) or name
        given.append(found if found not in (*given, *folders) else name)
    return tuple(given)


def _is_no_id(series: pl.Series) -> bool:
    """Return True for times, fractions, and numbers of the rows."""
    values = series.drop_nulls()
    if not len(values) or is_dated(values) or has_digits_of_dates(values):
        return True
    if values.dtype.is_float():
        return not bool((values == values.round()).all())
    if not values.dtype.is_integer():
        return False
    distinct = values.n_unique()
    return (looks_like_seconds(values) and 2 * distinct > len(values)) or (
        distinct == len(series) and values.is_sorted()
    )


def _tells_time(series: pl.Series) -> bool:
    """Return True for dates, and for seconds."""
    values = series.drop_nulls()
    return is_dated(values) or has_digits_of_dates(values) or looks_like_seconds(values)


def _meaning(series: pl.Series) -> str:
    """Return the name of a column by its values, "" for none."""
    form = time_form(series, strict=False) if not series.null_count() else None
    if (form is not None and form.unit != "order") or looks_like_seconds(series):
        return "time"
    if series.dtype == pl.Boolean:
        return "label"
    if not series.dtype.is_numeric():
        return ""
    values = [float(value) for value in series.drop_nulls().unique().sort()]
    if len(values) == 2:
        return "label" if values in ([0, 1], [-1, 1]) else ""
    return "rating" if looks_like_scale(series) else ""
