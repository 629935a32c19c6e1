"""Files of tables: a file, a folder of files, or a pattern."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from twotower.data.parts import PartFiles
from twotower.data.split import PART_NAMES
from twotower.errors import DataError
from twotower.files import check_name

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".pq")
_SKIPPED = (".", "_")
"""Beginnings of names in a folder that are no files of its table: Spark puts _SUCCESS and .crc there."""


def table_files(source: Path | str, endings: tuple[str, ...] = TABLE_SUFFIXES) -> list[Path]:
    """Return the files of a table (a file, a folder of files or a pattern) in the order of their names.

    Raises DataError if there is none, or one with another ending."""
    source = Path(source)
    if source.is_dir():
        paths = [p for p in source.iterdir() if not p.name.startswith(_SKIPPED)]
    elif not source.exists() and glob.has_magic(str(source)):
        paths = [Path(p) for p in glob.glob(str(source), recursive=True)]  # noqa: PTH207 - Path.glob wants no root
        paths = [p for p in paths if not p.is_dir()]
    else:
        paths = [source]
    if not paths:
        raise DataError(f"{source}: no file found; name a table, a folder of tables or a pattern")
    for path in paths:
        check_name(path)
        if path.is_dir():
            raise DataError(
                f"{source}: found the folder {path.name} in it; name all files, as in '{source}/*/*.parquet'"
            )
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if ending(path) not in endings:
            shown = ".csv, .tsv, .txt or .parquet" if ".csv" in endings else ".parquet"
            raise DataError(f"{path}: found a '{path.suffix.lower()}' file, expected {shown}; convert or rename it")
    return sorted(paths)


def takes_in(source: Path, path: Path) -> bool:
    """Return True if `path`, once it exists, is read with the table `source`: below a folder, or one that a pattern matches."""
    if source.is_dir():
        base, inner = source.resolve(), path.resolve()
        return base in inner.parents and not inner.relative_to(base).parts[0].startswith(_SKIPPED)
    parts, pattern = (Path(os.path.abspath(p)).parts for p in (path, source))  # noqa: PTH100 - links are not followed
    return not source.exists() and glob.has_magic(str(source)) and _matches(parts, pattern)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return True if the parts of a path match those of a pattern, in which ** stands for any number of folders."""
    if not parts or not pattern:
        return not parts and not pattern
    if pattern[0] == "**":
        return any(_matches(parts[n:], pattern[1:]) for n in range(len(parts) + 1))
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def ending(path: Path) -> str:
    """Return the ending of a file's name in lower case; of gzipped text files, that before ".gz"."""
    inner = Path(path.name.lower().removesuffix(".gz")).suffix
    return inner if inner in TEXT_SUFFIXES else path.suffix.lower()


def is_text(path: Path) -> bool:
    """Return True for a text file, gzipped or not, by the file's ending."""
    return ending(path) in TEXT_SUFFIXES


def part_paths(files: PartFiles, endings: tuple[str, ...] = TABLE_SUFFIXES) -> dict[str, list[Path]]:
    """Return the files of each part, in the order train, validation, test. Raises DataError if a file is in two."""
    found = {name: table_files(files.sources[name], endings) for name in PART_NAMES if name in files.sources}
    owners: dict[Path, str] = {}
    for name, paths in found.items():
        for path in paths:
            if (other := owners.setdefault(path.resolve(), name)) != name:
                raise DataError(f"{path}: named by data.{other} and by data.{name}; name a file for one part")
    return found
