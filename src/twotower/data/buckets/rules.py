"""Rules of docs/prepared-format.md by number, problems of a folder of buckets, and records read in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import polars as pl

from twotower.arrays.types import Bools
from twotower.errors import RunError
from twotower.escaping import escape_controls
from twotower.files.readers import read_checked


class Rule(IntEnum):
    """Number of a rule in docs/prepared-format.md."""

    FILES = 1
    IDS = 2
    FEATURES = 3
    USER_ORDER = 4
    COLUMNS = 5
    SAME_COLUMNS = 6
    VALUES = 7
    RANGES = 8
    ROWS = 9
    ORDER = 10
    PAIRS = 11
    SCHEMA = 12
    FACTS = 13
    COUNTS = 14


@dataclass
class Problems:
    """Problems of a folder, one line for each rule that a file breaks: the first record that breaks it."""

    folder: Path
    lines: list[str] = field(default_factory=list)
    _known: set[tuple[Path, Rule]] = field(default_factory=set)

    def add(self, path: Path, rule: Rule, what: str) -> None:
        """Add a problem of a file, if it is the file's first with a rule. `what` says what was found and expected."""
        if (path, rule) not in self._known:
            self._known.add((path, rule))
            self.lines.append(escape_controls(f"{path.relative_to(self.folder)}: rule {rule.value}: {what}"))

    def columns(self, path: Path) -> dict[str, pl.DataType]:
        """Return the columns of a Parquet file; none, and a problem, for a file that cannot be read."""
        if not path.is_file():
            self.add(path, Rule.FILES, "a folder or special file, expected a file" if path.exists() else "no such file")
            return {}
        try:
            found = read_checked(path, lambda p: pl.scan_parquet(p, glob=False).collect_schema())
        except RunError as e:
            self.unreadable(path, e)
            return {}
        if not found:
            self.add(path, Rule.FILES, "no columns")
        return dict(found)

    def unreadable(self, path: Path, error: RunError) -> None:
        """Add the problem of a file that cannot be read."""
        self.add(path, Rule.FILES, str(error).removeprefix(f"{path}: "))


def read_blocks(path: Path, columns: Sequence[str], n: int) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield blocks of `n` records of a Parquet file, each after the number of its first record. Raises RunError."""

    def read(path: Path) -> pl.DataFrame:
        return pl.scan_parquet(path, glob=False).select(columns).slice(start, n).collect()

    start = 0
    while (block := read_checked(path, read)).height:
        yield start, block
        start += block.height


def first_true(found: Bools | pl.Series) -> int | None:
    """Return the place of the first True of (n,); None without one. A null is False."""
    flags = found if isinstance(found, pl.Series) else pl.Series(found)
    return flags.arg_max() if flags.any() else None
