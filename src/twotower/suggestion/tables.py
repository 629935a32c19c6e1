"""Tables of a log: files found by their names, and read in the form that DuckDB sniffs."""

from __future__ import annotations

import csv
import os
import re
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import polars as pl

from twotower.config.toml import TomlValue
from twotower.data.datasets import DATASETS
from twotower.data.parts import PART, PartFiles
from twotower.data.reading.lakes import lake_table
from twotower.data.reading.readers import TableLike, as_frame, read_file
from twotower.data.reading.table_path import TABLE_SUFFIXES, TablePath, ending
from twotower.data.reading.table_paths import table_files, table_source
from twotower.data.reading.text_files import Reading
from twotower.data.reading.text_format import SEPARATOR_OF, SPACE, TextFormat
from twotower.data.split import PART_NAMES
from twotower.errors import DataError
from twotower.features.schema import is_pattern
from twotower.features.values import with_texts
from twotower.files.urls import Url
from twotower.progress import doing
from twotower.suggestion.roles import plain, role_of_name

USER, ITEM, PLACE = "user_id", "item_id", "place"  # columns of files with one user a line, which have no names
SAMPLED_LINES = 200
MIN_SAME_WIDTH = 0.9  # share of lines that have as many values as the first from which a line is a row

SEQUENCE_WIDTH = (
    6  # values of a line from which a file of whole numbers alone, no two first ones equal, has users in lines
)
PART_OF = "__given_part"  # column of the part of each row, where files give the parts

_FILES = {
    "users": "users user customers members visitors readers 用户",
    "items": "items item products movies films articles books songs videos news 商品 物品",
    "train": "train training", "validation": "validation valid val", "test": "test testing",
    "interactions": "interactions interaction ratings clicks events log orders purchases views data 交互 日志",
}  # fmt: skip
"""Last words of the names of files by role."""
_NUMBER = r"\s*[-+]?\d+([.,]\d*)?\s*"


@dataclass(frozen=True)
class FoundTables:
    """Frames of the three tables as they come, and the section `[data]` that names them."""

    interactions: pl.DataFrame
    users: pl.DataFrame | None = None
    items: pl.DataFrame | None = None
    section: Mapping[str, TomlValue] | None = None  # None: the tables are frames, which no file names
    layout: str = "rows"
    parts: pl.Series | None = None  # part of each row (PART_OF); None: files give none
    notes: tuple[str, ...] = ()  # lines: which files are read, which are not, what their form is
    made: tuple[str, ...] = ()  # those of "items" and "users" with columns of the interactions, which no file has there


@doing("looking for the tables")
def find_tables(
    interactions: TableLike, users: TableLike | None = None, items: TableLike | None = None, folder: Path = Path(),
    form: TextFormat | None = None,
) -> FoundTables:  # fmt: skip
    """Read frames, paths, or a folder with one file for each table.

    Paths of the section are relative to `folder`. The form of text files is sniffed if none is given. Raises DataError
    or ConfigError."""
    given = {"interactions": interactions, "users": users, "items": items}
    tables = {name: table for name, table in given.items() if table is not None}
    if not isinstance(interactions, str | Path):
        return _usable({name: as_frame(table, name, Reading(None)) for name, table in tables.items()}, [])
    if any(not isinstance(table, str | Path) for table in tables.values()):
        raise DataError("interactions: a path, and a frame for another table; give all tables as frames or as paths")
    if str(interactions) in DATASETS or str(interactions).lower().endswith(".zip"):
        raise DataError(
            f"{interactions}: a data set has a schema of its own, which the recipes of examples/recipes read by "
            "data.dataset; name tables, such as the files of an archive that is unpacked"
        )
    sources, notes = _sources(table_source(interactions))
    sources |= {name: table_source(str(table)) for name, table in tables.items() if name != "interactions"}
    return _read(sources, notes, folder, form)


def _sources(path: Path | Url) -> tuple[dict[str, Path | Url], list[str]]:
    """Return the path of each table, of a folder by the names of its files, and notes of files that are not read.

    A folder without a file of a known name is one table in pieces. Raises DataError if two files have one role, or
    none is of interactions."""
    if isinstance(path, Url) or lake_table(path) or not path.is_dir():
        return {"interactions": path}, []
    inside = [p for p in sorted(path.iterdir()) if not p.name.startswith((".", "_"))]
    files = dict[str, list[Path]]()
    for table in (p for p in inside if p.is_dir() or ending(p) in TABLE_SUFFIXES):
        words = [w for w in plain(re.sub(r"\.[^.]+(\.gz)?$", "", table.name)).split("_") if not w.isdigit()]
        if role := next((role for role, known in _FILES.items() if {*words[-1:]} & {*known.split()}), ""):
            files.setdefault(role, []).append(table)
    if role := next((role for role, of in files.items() if len(of) > 1), ""):
        names = " and ".join(p.name for p in files[role][:2])
        raise DataError(f"{path}: {names} both look like {role}; name one, and `users` and `items`")
    found: dict[str, Path | Url] = {role: files[role][0] for role in _FILES if role in files}
    others = [p for p in inside if not any(p in of for of in files.values()) and ending(p) in TABLE_SUFFIXES]
    if not found:
        return {"interactions": path}, []
    if not {"train", "test"} <= {*found}:  # one part is the log
        parts = [name for name in PART_NAMES if name in found]
        found |= {"interactions": found["train"]} if "train" in parts and "interactions" not in found else {}
        found = {name: place for name, place in found.items() if name not in parts}
    log = {*found} & {"interactions", "train"}
    if not log and len(others) == 1:
        found, log = found | {"interactions": others[0]}, {"interactions"}
    if len(log) != 1:
        several = "several files of interactions" if log else "no file of interactions to train on"
        raise DataError(f"{path}: has {several}; name one, and `users` and `items`")
    read = {p for role, of in files.items() for p in of if role in found} | {*found.values()}
    why = "its name is none of users, items and interactions, or a part without train and test"
    return found, [f"not read: {p.name}: {why}" for p in inside if p not in read]


def _read(sources: dict[str, Path | Url], notes: list[str], folder: Path, given: TextFormat | None) -> FoundTables:
    """Read tables in files, in a given form or the one that is sniffed. Raises DataError."""
    form, of_log = given or TextFormat(), "train" if "train" in sources else "interactions"
    first = {
        "interactions" if n == of_log else n: table_files(p)[0] for n, p in sources.items() if n not in PART_NAMES[1:]
    }
    texts = {name: replace(path, encoding=form.encoding) for name, path in first.items() if path.is_text}
    is_open = not form.model_fields_set - {"encoding"}  # the form of the values
    if is_open and texts:
        own = {name: sniff(path) for name, path in texts.items()}
        if unnamed := next((name for name in ("users", "items") if name in own and own[name].columns), ""):
            raise DataError(f"{unnamed}: the first line of {texts[unnamed]} names no columns; write a header line")
        form = own.get("interactions", form).model_copy(update={"encoding": form.encoding})
        usual = {name: form.separator or SEPARATOR_OF[path.ending] for name, path in texts.items()}
        separators = {name: of.separator or SEPARATOR_OF[texts[name].ending] for name, of in own.items()}
        others = {name: separator for name, separator in separators.items() if separator != usual[name]}
        form = form.model_copy(update={"separators": others}) if others else form
    frames = _frames(sources, form)
    of_commas = [frames[n] for n, p in texts.items() if (form.separator_of(n) or SEPARATOR_OF[p.ending]) != ","]
    if is_open and (names := _decimal_commas(of_commas)):
        form = form.model_copy(update={"decimal": ","})
        frames = _frames(sources, form)
        notes = [*notes, f"numbers with a decimal comma are read: {', '.join(map(repr, names))}"]
    if is_open and form.columns:
        names = [f"the first line of {texts['interactions'].name} names no columns, so these are "]
        notes = [*notes, f"{names[0]}{', '.join(form.columns)}; data.format.columns gives other names"]
    section: dict[str, TomlValue] = {name: _relative(path, folder) for name, path in sources.items()}
    if options := form.model_dump(mode="json", exclude_defaults=True):
        section["format"] = options
    if len(sources) > 1 or notes:
        notes = [f"read: {', '.join(f'{name} = {path.name}' for name, path in sources.items())}", *notes]
    log = frames["interactions"]
    parts = log[PART].alias(PART_OF) if PART in log.columns else None
    found = _usable({**frames, "interactions": log.drop(PART, strict=False)}, notes)
    return replace(found, section=section, layout=form.layout, parts=parts)


def _frames(sources: Mapping[str, Path | Url], form: TextFormat) -> dict[str, pl.DataFrame]:
    """Return the frames of the tables, in which times stay text, as in a training. Raises DataError."""
    reading = replace(Reading(None).of_table(form), option="data.format.{}", encoding=form.encoding)
    of_log = replace(reading, separator=form.separator_of("interactions"))
    if form.layout == "sequences":
        of_log = replace(of_log, numbers=frozenset([PLACE]), lines=(USER, ITEM, PLACE))
    parts = PartFiles({name: str(path) for name, path in sources.items() if name in PART_NAMES})
    log = parts if parts.sources else str(sources["interactions"])
    frames = {"interactions": as_frame(log, "interactions", of_log)}
    for name in {*sources} & {"users", "items"}:
        of_side = replace(reading, columns=(), separator=form.separator_of(name))
        frames[name] = read_file(str(sources[name]), of_side)
    return frames


def _decimal_commas(frames: list[pl.DataFrame]) -> list[str]:
    """Return the columns of numbers with a decimal comma, where no number has a point."""
    columns = [series.drop_nulls() for frame in frames for series in frame]
    texts = [s for s in columns if s.dtype == pl.String and len(s) and s.str.contains(r"^\s*[-+]?\d+(,\d+)?\s*$").all()]
    found = [s.name for s in texts if s.str.contains(",").any()]
    return [] if any(s.dtype.is_float() for s in columns) else found


def sniff(path: TablePath) -> TextFormat:
    """Return the form of a text file: its separator, rows or users in lines, and whether it has a header line.

    `columns` of a file without one are column_1, column_2, …. What cannot be read is refused by its reader."""
    try:
        with path.open() as f:
            lines = [line.decode("utf-8-sig").rstrip("\r\n") for line in islice(f, SAMPLED_LINES)]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return TextFormat()
    lines = [line for line in lines if line.strip()]
    if not lines or any("\r" in line for line in lines):
        return TextFormat()
    default = SEPARATOR_OF[path.ending]
    separators = dict.fromkeys((_sniffed(lines), default, SPACE))
    rows = {s: [*csv.reader(lines, delimiter=s)] for s in separators if s}
    widths = {s: [*map(len, values)] for s, values in rows.items()}
    regular = [s for s, n in widths.items() if n[0] > 1 and sum(w == n[0] for w in n) >= MIN_SAME_WIDTH * len(n)]
    separator = next(iter(regular), default)
    form = TextFormat(separator="" if separator == default else separator)
    values = rows[separator]
    if not regular:  # one user a line: the numbers of values differ, and no user has two lines
        values = [line.split() for line in lines] if separator == SPACE else values  # a tab is a space here
        are_lists = (
            min(map(len, values)) > 0 and max(map(len, values)) > 1 and len({row[0] for row in values}) == len(values)
        )
        return form.model_copy(update={"layout": "sequences"}) if are_lists else form
    whole = all(value.isdigit() for row in values for value in row) and len({row[0] for row in values}) == len(values)
    if whole and len(values[0]) >= SEQUENCE_WIDTH:
        return form.model_copy(update={"layout": "sequences"})
    header, rest = values[0], [row for row in values[1:] if len(row) == len(values[0])]
    recurs = any(value in column for value, *column in zip(header, *rest, strict=True)) and len({*header}) == len(
        header
    )
    if not any(re.fullmatch(_NUMBER, value) for value in header) and (any(map(role_of_name, header)) or not recurs):
        return form
    return form.model_copy(update={"columns": tuple(f"column_{i}" for i in range(1, len(header) + 1))})


def _sniffed(lines: list[str]) -> str:
    """Return the separator of lines as DuckDB sniffs it, "" for none."""
    import duckdb

    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
        path = Path(folder, "lines.csv")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            (found,) = connection.execute("SELECT Delimiter FROM sniff_csv(?)", [str(path)]).fetchall()
        except duckdb.Error:
            return ""
    return str(found[0])


def _usable(frames: Mapping[str, pl.DataFrame], notes: list[str]) -> FoundTables:
    """Return tables with dictionaries of texts as text, without the index that pandas writes, and without columns of
    Python objects or names that are patterns, which are noted. Raises DataError for a log without rows."""
    if not frames["interactions"].height:
        raise DataError("interactions: the table has no rows, expected at least one; fill it")
    notes, kept = [*notes], dict[str, pl.DataFrame]()
    for table, frame in frames.items():
        objects = [f"'{s.name}', whose values are objects of Python" for s in frame if s.dtype == pl.Object]
        patterns = [
            f"'{name}', as tables are searched for this name as a pattern" for name in frame.columns if is_pattern(name)
        ]
        notes += [f"not read: column {what}" for what in (*objects, *patterns)]
        columns = [s for s in frame if s.dtype != pl.Object and not is_pattern(s.name)]
        kept[table] = with_texts(pl.DataFrame([s for s in columns if not s.name.startswith("__index_level_")]))
    return FoundTables(kept["interactions"], kept.get("users"), kept.get("items"), notes=tuple(notes))


def _relative(path: Path | Url | str, folder: Path) -> str:
    """Return a path relative to the folder of the config with forward slashes, or absolute where none leads there."""
    if isinstance(path, Url):
        return str(path)
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return Path(path).absolute().as_posix()
