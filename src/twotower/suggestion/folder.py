"""Tables of a folder, found by the names of its files, and what of it is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from twotower.data.lakes import lake_table
from twotower.data.split import PART_NAMES
from twotower.data.table_path import TABLE_SUFFIXES, ending
from twotower.errors import DataError
from twotower.files.urls import Url
from twotower.suggestion import names


@dataclass(frozen=True)
class FolderTables:
    """Paths of the tables of a folder, or of a file."""

    log: Path | Url
    """Interactions: all of them, or those of the part train if there are `parts`."""
    parts: Mapping[str, Path] = field(default_factory=dict)
    """Interactions by part, in the order train, validation, test. Empty: the log is in one table."""
    sides: Mapping[str, Path | Url] = field(default_factory=dict)
    """Tables of users and items, by these names."""
    unread: tuple[str, ...] = ()
    """Files that are not read, each with the reason."""

    def without_parts(self, reason: str) -> FolderTables:
        """Return the tables with the file of the part train alone as interactions, the others left out for a reason."""
        left = tuple(f"{path.name}: {reason}" for name, path in self.parts.items() if name != "train")
        return FolderTables(self.log, {}, self.sides, (*self.unread, *left))


def folder_tables(path: Path | Url) -> FolderTables:
    """Return the tables of a path: those of a folder by the names of its files. A folder of one table, or of one in pieces, is
    the interactions. Raises DataError if two files have one role, or none is of interactions."""
    if isinstance(path, Url) or lake_table(path):
        return FolderTables(path)
    if not path.is_dir():
        return FolderTables(path, unread=_beside(path))
    inside = [p for p in sorted(path.iterdir()) if not p.name.startswith((".", "_"))]
    tables = [p for p in inside if p.is_dir() or ending(p) in TABLE_SUFFIXES]
    parts = _parts(tables)
    of_parts = {p for files in parts.values() for p in files}
    roles = _roles(path, [p for p in tables if p not in of_parts])
    if "interactions" in roles and "train" in parts and not _is_test(roles["interactions"]):
        raise DataError(
            f"{path}: {roles['interactions'].name} and {parts['train'][0].name} both look like interactions; name one file, and "
            "`users` and `items`"
        )
    found = {name: _one(path, files) for name, files in parts.items()} if "train" in parts else {}
    log = found.get("train") or roles.pop("interactions", None)
    if log is None and not roles:
        _check_one_part(path, tables, parts)
        return FolderTables(path)
    if log is None:
        left = [p for p in inside if p not in roles.values() and ending(p) in TABLE_SUFFIXES]
        if len(left) != 1:
            raise DataError(
                f"{path}: found {', '.join(p.name for p in roles.values())}, and no file of interactions; name that file, and give "
                "`users` and `items`"
            )
        log = left[0]
    read = {log, *roles.values(), *(of_parts if found else ())}
    unread = tuple(f"{p.name}: {_why_unread(p, parts)}" for p in inside if p not in read)
    whole = FolderTables(log, found if len(found) > 1 else {}, roles, unread)
    return (
        whole
        if "test" in found
        else whole.without_parts("a part train and no part test; name a file test, or split by a rule")
    )


def _beside(path: Path) -> tuple[str, ...]:
    """Return what is said of files of other parts beside a file of the part train."""
    if not path.is_file() or _part_of(path) != "train":
        return ()
    others = [p for p in sorted(path.parent.iterdir()) if p.is_file() and ending(p) in TABLE_SUFFIXES]
    return tuple(
        f"{p.name}: stands beside {path.name}; name the folder to train and test on the parts as they are"
        for p in others
        if p != path and _part_of(p) in PART_NAMES and _part_of(p) != "train"
    )


def _check_one_part(folder: Path, tables: Sequence[Path], parts: Mapping[str, Sequence[Path]]) -> None:
    """Raise DataError if files of a part stand beside others, with which they would be one table."""
    name, of_part = next(iter(parts.items()), ("", ()))
    other = next((p for p in tables if p not in of_part), None)
    if of_part and other is not None:
        raise DataError(
            f"{folder}: {of_part[0].name} looks like the part {name} of the interactions, {other.name} stands beside it, and no file is "
            "called train; call the file to train on so, or name one file"
        )


def _words(path: Path) -> list[str]:
    return names.plain(path.name.partition(".")[0]).split("_")


def _role_of(path: Path) -> str:
    """Return users, items or interactions by the name of a file, "" for none."""
    words = _words(path)
    known = {"_".join(words), words[-1]}
    return next((role for role, of_role in names.FILES.items() if known & {*of_role.split()}), "")


def _part_of(path: Path) -> str:
    """Return the part that the first or the last word of a file's name, numbers apart, tells, "" for none."""
    if _role_of(path) in ("users", "items"):
        return ""
    stem = path.name if path.is_dir() else re.sub(r"\.[^.]+(\.gz)?$", "", path.name)  # of log.train.csv, log.train
    words = [word for word in names.plain(stem).split("_") if not word.isdigit()] or [""]
    return next((part for part, of_part in names.PARTS.items() if {words[0], words[-1]} & {*of_part.split()}), "")


def _is_test(path: Path) -> bool:
    return _part_of(path) == "test"


def _parts(tables: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the files of each part, in the order train, validation, test."""
    found = dict[str, list[Path]]()
    for table in tables:
        if part := _part_of(table):
            found.setdefault(part, []).append(table)
    return {name: found[name] for name in PART_NAMES if name in found}


def _one(folder: Path, files: Sequence[Path]) -> Path:
    """Return the path of the table of a part: a file, or a pattern of files that differ in a number. Raises DataError."""
    if len(files) == 1:
        return files[0]
    pattern = re.sub(r"\d+", "*", files[0].name)
    if {*folder.glob(pattern)} != {*files}:
        raise DataError(
            f"{folder}: {files[0].name} and {files[1].name} both look like one part of the interactions; name one file, or rename the "
            "other"
        )
    return folder / pattern


def _roles(folder: Path, tables: Iterable[Path]) -> dict[str, Path]:
    """Return users, items and interactions by the names of files. Raises DataError for two files of one role."""
    roles: dict[str, Path] = {}
    for table in tables:
        if not (role := _role_of(table)):
            continue
        if role in roles:
            raise DataError(
                f"{folder}: {roles[role].name} and {table.name} both look like {role}; name one file, and `users` and `items`"
            )
        roles[role] = table
    return roles


def _why_unread(path: Path, parts: Mapping[str, Sequence[Path]]) -> str:
    if not path.is_dir() and ending(path) not in TABLE_SUFFIXES:
        return "no table"
    if any(path in files for files in parts.values()):
        return "a part of the interactions without a part train"
    return "its name is none of users, items and interactions; rename it, or name the tables one by one"
