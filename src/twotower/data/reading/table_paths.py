"""Files of tables: a file, a folder of files or a pattern, on the disk or at a URL, and the columns that their folders
give."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import unquote

import polars as pl

from twotower.data.parts import PartFiles
from twotower.data.reading.lakes import DeltaLakeTable, lake_table
from twotower.data.reading.table_path import TABLE_SUFFIXES, FolderColumn, TablePath, ending, table_server
from twotower.data.split import PART_NAMES
from twotower.errors import ConfigError, DataError
from twotower.files import check_name
from twotower.files.object_stores import ObjectClient, ObjectInfo
from twotower.files.urls import Url, is_url

_SKIPPED = (".", "_")
"""Beginnings of names in a folder that are no files of its table: Spark puts _SUCCESS and .crc there."""
_PARTITION = re.compile(r"([^=]+)=(.*)", re.DOTALL)
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def table_source(source: Path | str) -> Path | Url:
    """Return the place of a table. Raises ConfigError for a URL that cannot be read."""
    return Url.parse(source) if is_url(source) else Path(source)


def result_place(out: Path | str) -> Path | Url:
    """Return the place of a result. Raises ConfigError for a server that cannot be written."""
    place = table_source(out)
    if isinstance(place, Url) and not place.is_object_store:
        raise ConfigError(
            f"{place}: a server of {place.scheme}:// cannot be written; name a folder, or an object store, such as "
            "s3://BUCKET/FOLDER"
        )
    return place


def absolute(place: Path | Url) -> Path | Url:
    """Return a place that another process finds, whatever its working directory."""
    return place.absolute() if isinstance(place, Path) else place


def exists(place: Path | Url) -> bool:
    """Return True if there is a file, or on the disk a folder, of that name. Raises RunError."""
    if isinstance(place, Path):
        return place.exists()
    with table_server():
        return ObjectClient(place).head(place.key) is not None


def table_files(source: Path | str | Url) -> list[TablePath]:
    """Return the files of a table (a file, a folder of files or a pattern) in the order of their names.

    In a folder, and around files, folders named `name=value` are columns. A table of a lake is one file. Raises
    DataError if there is no file, or one with another ending."""
    place = source if isinstance(source, Url) else table_source(source)
    if table := lake_table(place):
        return [table]
    if isinstance(place, Path):
        found = _on_disk(place)
    else:
        with table_server():
            found = _at(place)
    if not found:
        raise DataError(f"{source}: no file found; name a table, a folder of tables or a pattern")
    for path in found:
        if path.ending not in TABLE_SUFFIXES:
            raise DataError(
                f"{path}: found a '{path.path.suffix.lower()}' file, expected .csv, .tsv, .txt or .parquet; convert or "
                "rename it"
            )
    _refuse_files_of_a_lake(found)
    return _with_columns_of_folders(sorted(found, key=lambda p: p.path))


def check_one_kind(paths: Sequence[TablePath]) -> None:
    """Raise DataError if some paths are files of text and of Parquet."""
    if other := next((path for path in paths if path.is_text != paths[0].is_text), None):
        raise DataError(f"{other}: is not of the form of {paths[0].name}; give all files as text or all as Parquet")


def _refuse_files_of_a_lake(paths: list[TablePath]) -> None:
    """Raise DataError for files of a Delta table, among which are such that are removed from it."""
    for folder in dict.fromkeys(_folder_above(p.place) for p in paths):
        if DeltaLakeTable.finds(folder):
            raise DataError(
                f"{paths[0]}: lies in a table of {DeltaLakeTable.what}, whose log tells which files are in it; name "
                f"the folder {folder}"
            )


def _folder_above(place: Path | Url) -> Path | Url:
    """Return the folder of a file that is above those named `name=value`."""
    folder = place.absolute().parent if isinstance(place, Path) else place.parent
    while _PARTITION.fullmatch(folder.name):
        folder = folder.parent
    return folder


def _on_disk(source: Path) -> list[TablePath]:
    """Return the files of a table on the disk. Raises DataError."""
    if source.is_dir():
        paths = _inside(source)
    elif not source.exists() and glob.has_magic(str(source)):
        paths = [Path(p) for p in glob.glob(str(source), recursive=True)]  # noqa: PTH207 - Path.glob wants no root
        paths = [p for p in paths if not p.is_dir()]
    else:
        paths = [source]
    for path in paths:
        check_name(path)
        if path.is_dir():
            raise _folder_within(source, path.name)
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    return [TablePath(p) for p in paths]


def _folder_within(source: Path | Url, name: str) -> DataError:
    return DataError(f"{source}: found the folder {name} in it; name all files, as in '{source}/*/*.parquet'")


def _inside(folder: Path) -> list[Path]:
    """Return the files and folders within a folder, of folders named `name=value` what is within them."""
    found = list[Path]()
    for path in folder.iterdir():
        if not path.name.startswith(_SKIPPED):
            found += _inside(path) if _PARTITION.fullmatch(path.name) and path.is_dir() else [path]
    return found


def _at(url: Url) -> list[TablePath]:
    """Return the files of a table at a URL. Raises DataError."""
    bucket, key = ObjectClient(url), url.key
    is_pattern = url.is_object_store and glob.has_magic(key)
    if not url.is_object_store and not url.parts:
        raise DataError(f"{url}: names no file; name a Parquet or text file")
    is_named = ending(url.path) in TABLE_SUFFIXES or not url.is_object_store
    if (is_named or is_pattern) and bucket.head(key):
        return [TablePath(url)]
    if not url.is_object_store:
        raise DataError(f"{url}: no such file (a server of https:// cannot list folders or patterns; name one file)")
    if is_pattern:
        fixed = next(n for n, part in enumerate(url.parts) if glob.has_magic(part))
        listed = bucket.list("/".join(url.parts[:fixed]))
        return [TablePath(url.of_key(o.key)) for o in listed if _is_file(o) and _is_visible_match(o.key, url.parts)]
    found = list[TablePath]()
    for o in bucket.list(key):
        *folders, name = PurePosixPath(o.key).parts[len(url.parts) :]
        if _is_file(o) and not any(part.startswith(_SKIPPED) for part in (*folders, name)):
            if strange := next((part for part in folders if not _PARTITION.fullmatch(part)), ""):
                raise _folder_within(url, strange)
            found.append(TablePath(url.of_key(o.key)))
    if not found and key and not is_named and bucket.head(key):
        return [TablePath(url)]
    if not found and is_named:
        raise DataError(f"{url}: no such file")
    return found


def _is_file(found: ObjectInfo) -> bool:
    """Return False for the empty objects that some programs write for folders."""
    return found.size > 0 or ending(PurePosixPath(found.key)) in TABLE_SUFFIXES


def _is_visible_match(key: str, pattern: Sequence[str]) -> bool:
    """Return True if a pattern, as the shell reads it, matches a key: * and ** stand for no name that begins with a
    dot."""
    parts = key.split("/")
    hidden = [p for p in parts if p.startswith(".")]
    return _matches(parts, pattern) and all(any(q.startswith(".") for q in pattern) for _ in hidden)


def _with_columns_of_folders(paths: list[TablePath]) -> list[TablePath]:
    """Return the files with the columns of the folders just above them that are named `name=value`."""
    given = [_folder_values(p.place.absolute() if isinstance(p.place, Path) else p.path) for p in paths]
    names = list(given[0])
    for path, values in zip(paths, given, strict=True):
        if list(values) != names:
            shown = ["/".join(f"{name}=…" for name in of) or "no such folder" for of in (names, values)]
            raise DataError(
                f"{path}: lies in {shown[1]}, and {paths[0]} in {shown[0]}; the folders of all files of a table must "
                "have the same names"
            )
    as_text = any(path.is_text for path in paths)
    columns = {name: _typed([values[name] for values in given], as_text) for name in names}
    return [
        replace(path, folder_columns=tuple(FolderColumn(name, c[n], c.dtype) for name, c in columns.items()))
        for n, path in enumerate(paths)
    ]


def _folder_values(path: PurePath) -> dict[str, str | None]:
    """Return the values of the folders just above a file that are named `name=value`, the outer ones first."""
    values = list[tuple[str, str | None]]()
    for folder in path.parent.parts[::-1]:
        if not (found := _PARTITION.fullmatch(folder)):
            break
        values.append((unquote(found[1]), None if found[2] == _NO_VALUE else unquote(found[2])))
    return dict(reversed(values))


def _typed(texts: Sequence[str | None], as_text: bool) -> pl.Series:
    """Return the values of a column: whole numbers or dates if all are spelled as such, else text."""
    text = pl.Series(texts, dtype=pl.String)
    if not as_text and not text.is_null().all():
        for read in (text.cast(pl.Int64, strict=False), text.str.to_date("%Y-%m-%d", strict=False)):
            if read.cast(pl.String).equals(text):
                return read
    return text


def takes_in(source: Path | Url, path: Path | Url) -> bool:
    """Return True if `path`, once it exists, is read with the table `source`: below a folder, or one that a pattern
    matches."""
    if isinstance(source, Url) and isinstance(path, Url):
        return source.root == path.root and (
            _is_within(path.parts, source.parts) or _is_visible_match(path.key, source.parts)
        )
    if isinstance(source, Url) or isinstance(path, Url):
        return False
    if source.is_dir():
        return _is_within(path.resolve().parts, source.resolve().parts)
    parts, pattern = (Path(os.path.abspath(p)).parts for p in (path, source))  # noqa: PTH100 - links are not followed
    return not source.exists() and glob.has_magic(str(source)) and _matches(parts, pattern)


def _is_within(parts: Sequence[str], folder: Sequence[str]) -> bool:
    """Return True if the parts of a path lie below those of a folder, and no name between them is skipped."""
    below = parts[len(folder) :]
    return parts[: len(folder)] == folder and not any(name.startswith(_SKIPPED) for name in below)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return True if the parts of a path match those of a pattern, in which ** stands for any number of folders."""
    if not parts or not pattern:
        return not parts and not pattern
    if pattern[0] == "**":
        return any(_matches(parts[n:], pattern[1:]) for n in range(len(parts) + 1))
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def part_paths(files: PartFiles) -> dict[str, list[TablePath]]:
    """Return the files of each part, in the order train, validation, test. Raises DataError if a file is in two."""
    found = {name: table_files(files.sources[name]) for name in PART_NAMES if name in files.sources}
    owners: dict[str, str] = {}
    for name, paths in found.items():
        for path in paths:
            if (other := owners.setdefault(path.identity, name)) != name:
                raise DataError(f"{path}: named by data.{other} and by data.{name}; name a file for one part")
    return found
