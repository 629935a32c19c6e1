"""Tables of a log: files found by their names, and read in the form that DuckDB sniffs."""

from __future__ import annotations

import csv
import os
import re
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import polars as pl
from pydantic import ValidationError

from twotower.config.toml import TomlValue
from twotower.data.datasets import DATASETS
from twotower.data.datasets.named_dataset import NamedDataset
from twotower.data.lakes import lake_table
from twotower.data.parts import PART, PartFiles
from twotower.data.readers import TableLike, as_frame, read_file
from twotower.data.split import PART_NAMES
from twotower.data.table_path import TABLE_SUFFIXES, TablePath, ending
from twotower.data.table_paths import table_files, table_source
from twotower.data.text_files import Reading, check_line_ends, not_utf8
from twotower.data.text_format import SEPARATOR_OF, SPACE, TextFormat
from twotower.errors import ConfigError, DataError, did_you_mean
from twotower.features.schema import Schema, is_pattern
from twotower.features.values import with_texts
from twotower.files.urls import Url, is_url
from twotower.progress import doing
from twotower.section import first_problem
from twotower.suggestion.roles import plain, role_of_name

USER, ITEM, PLACE = "user_id", "item_id", "place"  # columns of files with one user a line, which have no names
SAMPLED_LINES = 200
MIN_SAME_WIDTH = 0.9  # share of lines that have as many values as the first from which a line is a row
SEQUENCE_WIDTH = 6  # values of a line from which a file of whole numbers alone has one user a line

_FILES = {
    "users": "users user customers customer members visitors readers queries",
    "items": "items item products product movies movie films articles article books songs tracks videos news catalog",
    "interactions": "interactions interaction ratings rating clicks click events event log logs orders purchases "
    "transactions views reviews likes sessions behaviors history data train inter",
}
_PARTS = {"train": "train training", "validation": "validation valid val dev", "test": "test testing"}
_DECIMAL_COMMA = r"^\s*[-+]?\d+(,\d+)?\s*$"


@dataclass(frozen=True)
class FoundTables:
    """Frames of the three tables as they come, and the section `[data]` that names them."""

    interactions: pl.DataFrame
    users: pl.DataFrame | None = None
    items: pl.DataFrame | None = None
    section: Mapping[str, TomlValue] | None = None  # None: the tables are frames, which no file names
    schema: Schema | None = None  # schema of a data set by name
    layout: str = "rows"
    is_text: bool = False  # True if the interactions are in text files, where ids keep their spelling
    notes: tuple[str, ...] = ()  # lines: which files are read, which are not, what their form is
    made: tuple[str, ...] = ()  # those of "items" and "users" with columns of the interactions, which no file has there

    @property
    def has_parts(self) -> bool:
        """True if files give the parts of the interactions."""
        return "train" in (self.section or {})


@doing("looking for the tables")
def find_tables(
    interactions: TableLike, users: TableLike | None = None, items: TableLike | None = None, folder: Path = Path(),
    form: TextFormat | None = None,
) -> FoundTables:  # fmt: skip
    """Read frames, paths, a folder with one file for each table, or a data set by name, such as ml-1m, or its archive.

    Paths of the section are relative to `folder`. The form of text files is sniffed if none is given. Raises DataError
    or ConfigError."""
    paths = {name: table for name, table in (("users", users), ("items", items)) if table is not None}
    if not isinstance(interactions, str | Path):
        notes = list[str]()
        frames = {name: _usable(as_frame(table, name, Reading(None)), notes) for name, table in paths.items()}
        frame = _usable(as_frame(interactions, "interactions", Reading(None)), notes)
        frame = _with_rows(frame, "interactions")
        return FoundTables(frame, frames.get("users"), frames.get("items"), notes=tuple(notes))
    if any(not isinstance(table, str | Path) for table in paths.values()):
        raise DataError("interactions: a path, and a frame for another table; give all tables as frames or as paths")
    if dataset := _named(str(interactions), folder):
        section, kind = dataset
        if paths:
            raise ConfigError(
                f"data set '{kind.kind}' has {next(iter(paths))} of its own; leave out `{next(iter(paths))}`"
            )
        tables = kind.load()
        return FoundTables(tables.interactions, tables.users, tables.items, section, kind.table_schema)
    files = folder_tables(table_source(interactions))
    sides = {**files.sides} | {name: table_source(str(table)) for name, table in paths.items()}
    return _read(replace(files, sides=sides), folder, form)


@dataclass(frozen=True)
class FolderTables:
    """Paths of the tables of a folder, or of a file."""

    log: Path | Url  # all interactions, or the part train
    parts: Mapping[str, Path] = field(default_factory=dict)  # interactions by part, from train on; empty: no parts
    sides: Mapping[str, Path | Url] = field(default_factory=dict)  # tables of "users" and "items"
    unread: tuple[str, ...] = ()  # files that are not read, each with the reason


def folder_tables(path: Path | Url) -> FolderTables:
    """Return the tables of a path; of a folder by the names of its files.

    A folder without a file of a known name is one table in pieces. Raises DataError if two files have one role, or
    none is of interactions."""
    if isinstance(path, Url) or lake_table(path) or not path.is_dir():
        return FolderTables(path)
    inside = [p for p in sorted(path.iterdir()) if not p.name.startswith((".", "_"))]
    by_role = dict[str, list[Path]]()
    for table in (p for p in inside if p.is_dir() or ending(p) in TABLE_SUFFIXES):
        if role := _role_of(table):
            by_role.setdefault(role, []).append(table)
    found = {role: _one(path, role, files) for role, files in by_role.items()}
    parts = {name: found[name] for name in PART_NAMES if name in found}
    sides: dict[str, Path | Url] = {name: found[name] for name in ("users", "items") if name in found}
    log = found.get("train") or found.get("interactions")
    if "train" in found and "interactions" in found:
        raise DataError(
            f"{path}: {found['interactions'].name} and {found['train'].name} both look like interactions; name one, "
            "and `users` and `items`"
        )
    if log is None and not found:
        return FolderTables(path)
    if log is None:
        left = [p for p in inside if p not in found.values() and ending(p) in TABLE_SUFFIXES]
        if len(left) != 1 or parts:
            raise DataError(
                f"{path}: found {', '.join(p.name for p in found.values())}, and no file of interactions to train on; "
                "name that file, and `users` and `items`"
            )
        log = left[0]
    parts = parts if {"train", "test"} <= {*parts} else {}
    read = {log, *sides.values(), *(p for name in parts for p in by_role[name])}
    why = "its name is none of users, items and interactions, or a part without train and test"
    return FolderTables(log, parts, sides, tuple(f"{p.name}: {why}" for p in inside if p not in read))


def _role_of(path: Path) -> str:
    """Return users, items, interactions or the part of the interactions by the name of a file, "" for none."""
    words = [word for word in plain(path.name.partition(".")[0]).split("_") if not word.isdigit()] or [""]
    known = {"_".join(words), words[-1]}
    if role := next((role for role in ("users", "items") if known & {*_FILES[role].split()}), ""):
        return role
    stem = path.name if path.is_dir() else re.sub(r"\.[^.]+(\.gz)?$", "", path.name)  # of log.train.csv, log.train
    of_part = [word for word in plain(stem).split("_") if not word.isdigit()] or [""]
    part = next((part for part, of in _PARTS.items() if {of_part[0], of_part[-1]} & {*of.split()}), "")
    return part or ("interactions" if known & {*_FILES["interactions"].split()} else "")


def _one(folder: Path, role: str, files: list[Path]) -> Path:
    """Return the path of a table: a file, or for a part a pattern of files that differ in a number."""
    pattern = re.sub(r"\d+", "*", files[0].name)
    if len(files) > 1 and not (role in PART_NAMES and {*folder.glob(pattern)} == {*files}):
        raise DataError(
            f"{folder}: {files[0].name} and {files[1].name} both look like {role}; name one, and `users` and `items`"
        )
    return files[0] if len(files) == 1 else folder / pattern


def _read(files: FolderTables, folder: Path, given: TextFormat | None) -> FoundTables:
    """Read tables in files, in a given form or the one that is sniffed. Raises DataError."""
    encoding = (given or TextFormat()).encoding
    if given and given.model_fields_set == {"encoding"}:  # the form of the values is open
        given = None
    first = {name: table_files(path)[0] for name, path in {"interactions": files.log, **files.sides}.items()}
    texts = {name: replace(path, encoding=encoding) for name, path in first.items() if path.is_text}
    own = {name: sniff(path) for name, path in texts.items()} if given is None else {}
    if unnamed := next((name for name in files.sides if name in own and own[name].columns), ""):
        raise DataError(f"{unnamed}: the first line of {texts[unnamed]} names no columns; write a header line")
    form = (given or own.get("interactions") or TextFormat()).model_copy(update={"encoding": encoding})
    notes = [f"not read: {line}" for line in files.unread]
    if given is None and "interactions" in own:
        _check_parts(files, form)
    separators = {name: of.separator or SEPARATOR_OF[texts[name].ending] for name, of in own.items()}
    usual = {name: form.separator or SEPARATOR_OF[path.ending] for name, path in texts.items()}
    if others := {name: separator for name, separator in separators.items() if separator != usual[name]}:
        form = form.model_copy(update={"separators": others})

    frames = _frames(files, form)
    if given is None and (comma := _decimal_commas(frames, form, texts)):
        form = form.model_copy(update={"decimal": ","})
        frames = _frames(files, form)
        notes.append(f"numbers with a decimal comma are read: {', '.join(map(repr, comma))}")
    if form.columns and given is None:
        notes.append(
            f"the first line of {texts['interactions'].name} names no columns, so these are {', '.join(form.columns)}; "
            "data.format.columns gives other names"
        )
    shown = {**files.sides, **(files.parts or {"interactions": files.log})}
    section: dict[str, TomlValue] = {name: _relative(path, folder) for name, path in shown.items()}
    if options := form.model_dump(mode="json", exclude_defaults=True):
        section["format"] = options
    if len(shown) > 1 or notes:
        notes.insert(0, f"read: {', '.join(f'{name} = {path.name}' for name, path in shown.items())}")
    kept = {name: _usable(frame, notes) for name, frame in frames.items()}
    log = _with_rows(kept.pop("interactions"), str(files.log))
    return FoundTables(
        log, kept.get("users"), kept.get("items"), section, None, form.layout, "interactions" in texts, tuple(notes)
    )


def _frames(files: FolderTables, form: TextFormat) -> dict[str, pl.DataFrame]:
    """Return the frames of the tables, in which times stay text, as in a training. Raises DataError."""
    reading = replace(
        Reading(None).of_table(form), option="data.format.{}", encoding=form.encoding,
        separator=form.separator_of("interactions"),
    )  # fmt: skip
    if form.layout == "sequences":
        reading = replace(reading, numbers=frozenset([PLACE]), lines=(USER, ITEM, PLACE))
    if files.parts:
        parts = PartFiles({name: str(path) for name, path in files.parts.items()})
        frames = {"interactions": as_frame(parts, "interactions", reading).drop(PART)}
    else:
        frames = {"interactions": read_file(str(files.log), reading)}
    of_side = replace(reading, lines=(), columns=(), numbers=None)
    for name, path in files.sides.items():
        frames[name] = read_file(str(path), replace(of_side, separator=form.separator_of(name)))
    return frames


def _check_parts(files: FolderTables, form: TextFormat) -> None:
    """Raise DataError if files of the parts have another form than the part train."""
    for name, path in files.parts.items():
        own = sniff(replace(table_files(path)[0], encoding=form.encoding))
        if own.separator != form.separator or (form.layout == "rows" and len(own.columns) != len(form.columns)):
            raise DataError(
                f"{path}: the part {name} has another separator or header line than train; give all one form"
            )


def _decimal_commas(frames: Mapping[str, pl.DataFrame], form: TextFormat, texts: Mapping[str, TablePath]) -> list[str]:
    """Return the columns of numbers with a decimal comma, where no number has a point."""
    found, has_points = list[str](), False
    for name, path in texts.items():
        if (form.separator_of(name) or SEPARATOR_OF[path.ending]) != ",":
            for series in frames[name]:
                values = series.drop_nulls()
                has_points |= series.dtype.is_float()
                if values.dtype == pl.String and len(values) and values.str.contains(_DECIMAL_COMMA).all():
                    found += [series.name] if values.str.contains(",").any() else []
    return [] if has_points else found


def sniff(path: TablePath) -> TextFormat:
    """Return the form of a text file: its separator, rows or users in lines, and whether it has a header line.

    `columns` of a file without one are column_1, column_2, …. Raises DataError if it cannot be read."""
    lines = _first_lines(path)
    default = SEPARATOR_OF[path.ending]
    separator, has_header = _sniffed(lines)
    widths = {s: [len(row) for row in csv.reader(lines, delimiter=s)] for s in (default, separator, SPACE)}
    regular = [s for s, n in widths.items() if n[0] > 1 and sum(w == n[0] for w in n) >= MIN_SAME_WIDTH * len(n)]
    separator = separator if separator in regular else next(iter(regular), default)
    given = "" if separator == default else separator
    rows = [*csv.reader(lines, delimiter=separator)]
    if separator not in regular:
        rows = [line.split() for line in lines] if separator == SPACE else rows  # a tab is a space here
        # One user a line: the numbers of values differ, and no user has two lines.
        if min(map(len, rows)) < 1 or max(map(len, rows)) < 2 or len({row[0] for row in rows}) < len(rows):
            return TextFormat(separator=given)
        return TextFormat(separator=given, layout="sequences")
    first, rest = rows[0], [row for row in rows[1:] if len(row) == len(rows[0])]
    recurs = any(value in column for value, *column in zip(first, *rest, strict=True)) and len({*first}) == len(first)
    has_number = any(re.fullmatch(r"\s*[-+]?\d+([.,]\d*)?\s*", value) for value in first)
    if not has_number and (any(map(role_of_name, first)) or (has_header and not recurs)):
        return TextFormat(separator=given)
    whole = all(re.fullmatch(r"\d+", value) for row in rows for value in row)
    if whole and len(first) >= SEQUENCE_WIDTH and len({row[0] for row in rows}) == len(rows):
        return TextFormat(separator=given, layout="sequences")
    return TextFormat(separator=given, columns=tuple(f"column_{i}" for i in range(1, len(first) + 1)))


def _sniffed(lines: list[str]) -> tuple[str, bool]:
    """Return the separator of lines, and True if the first one is a header line, as DuckDB sniffs them."""
    import duckdb

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lines.csv")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with duckdb.connect() as connection:
            try:
                found = connection.execute("SELECT Delimiter, HasHeader FROM sniff_csv(?)", [str(path)]).fetchall()
            except duckdb.Error:
                return "", True
    return str(found[0][0]), bool(found[0][1])


def _first_lines(path: TablePath) -> list[str]:
    """Return the first lines of a text file that are not empty. Raises DataError."""
    try:
        with path.open() as f:
            found = [line.decode("utf-8-sig") for line in islice(f, SAMPLED_LINES)]
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read ({e}); is the file complete?") from None
    check_line_ends(path, [text.rstrip("\r\n") for text in found[:1]])
    lines = [line for text in found if (line := text.rstrip("\r\n")).strip()]
    if not lines:
        raise DataError(f"{path}: the file is empty; it needs at least one row")
    if re.fullmatch(r'"?sep=(.|\\t)"?', lines[0], re.IGNORECASE):
        raise DataError(f"{path}: the first line is {lines[0]!r}, which only spreadsheets read; remove it (tail -n +2)")
    return lines


def _with_rows(frame: pl.DataFrame, what: str) -> pl.DataFrame:
    if not frame.height:
        raise DataError(f"{what}: the table has no rows, expected at least one; fill it")
    return frame


def _usable(frame: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """Return a frame with dictionaries of texts as text, without the index that pandas writes, and without columns of
    Python objects or names that are patterns, which are noted."""
    for name, dtype in frame.schema.items():
        if dtype == pl.Object:
            notes.append(f"not read: column '{name}', whose values are objects of Python; make them numbers or texts")
        elif is_pattern(name):
            notes.append(f"not read: column '{name}', as tables are searched for this name as a pattern; rename it")
    kept = [s for s in frame if s.dtype != pl.Object and not is_pattern(s.name)]
    return with_texts(pl.DataFrame([s for s in kept if not re.fullmatch(r"__index_level_\d+__", s.name)]))


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
        kind, options = _of_archive(path), {"archive": _relative(path, folder)}
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
    if found := next((kind for kind in DATASETS if kind.kind in folders), None):
        return found
    raise DataError(f"{path}: holds no data set ({', '.join(DATASETS.names)}); unpack it, and name the tables")


def _relative(path: Path | Url | str, folder: Path) -> str:
    """Return a path relative to the folder of the config with forward slashes, or absolute where none leads there."""
    if isinstance(path, Url):
        return str(path)
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return Path(path).absolute().as_posix()
