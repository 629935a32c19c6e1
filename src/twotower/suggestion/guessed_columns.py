"""Options that the columns of the interactions decide, and what several guesses ask of a column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import polars as pl

from twotower.config.toml import TomlValue
from twotower.suggestion import names

MAX_DISTINCT = 0.95
"""Share of distinct values in the rows from which a column names rows, and no items if another column repeats."""
MIN_ROWS = 20
"""Rows from which that share, and a column that is constant for each item, tell anything."""

HEAD_ROWS = 10_000
"""Rows, the first ones, that tell most columns that vary for an id."""


@dataclass
class GuessedColumns:
    """Options of the schema that the interactions decide, each with the reason for it."""

    options: dict[str, TomlValue] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    """Reason by option."""
    notes: list[str] = field(default_factory=list)
    """Columns that are not used, each with the reason."""
    remarks: list[str] = field(default_factory=list)
    """Values of used columns that may be wrong."""
    is_numbered: bool = False
    """True if the time is numbers of the rows of each user, which order them only if the items follow one another."""

    def put(self, option: str, value: TomlValue, why: str) -> None:
        self.options[option], self.why[option] = value, why

    @property
    def named(self) -> set[str]:
        """Columns that the options name."""
        keys = ("user_id", "item_id", "time", "label", "weight", "event")
        return {str(self.options[key]) for key in keys if self.options.get(key)}


def free(frame: pl.DataFrame, found: GuessedColumns, test: Callable[[str], bool]) -> list[str]:
    """Return the columns that pass a test of their name and have no meaning yet."""
    return [name for name in frame.columns if name not in found.named and test(name)]


def put_first(
    found: GuessedColumns, option: str, columns: list[str], why: Mapping[str, str], frame: pl.DataFrame
) -> None:
    """Put the first of some columns, and note the others."""
    first, *others = columns
    what = {"user_id": "user", "item_id": "item"}.get(option, option)
    article = "an" if what[0] in "aei" else "a"
    found.put(
        option, first, f"{why[first]}; {', '.join(others)} also looks like {article} {what}" if others else why[first]
    )
    for name in others:
        distinct = ", but its values are distinct" if option == "item_id" and is_distinct(frame[name]) else ""
        found.notes.append(f"'{name}' also looks like {article} {what}{distinct}; schema.{option}={name} would read it")


def is_distinct(series: pl.Series) -> bool:
    """Return True for a column of distinct values in nearly all rows."""
    return len(series) >= MIN_ROWS and series.n_unique() >= MAX_DISTINCT * len(series)


def is_of(frame: pl.DataFrame, found: GuessedColumns, option: str, name: str) -> bool:
    """Return True for a column of several values that is constant for each id of users or items, which repeat: theirs, and no
    outcome."""
    key = str(found.options[option])
    if key not in frame.columns or frame.height < MIN_ROWS:
        return False
    head = frame.select(key, name).head(HEAD_ROWS)  # most that vary do so among the first rows
    if head.n_unique() > head[key].n_unique() or (ids := frame[key].n_unique()) * 2 > frame.height:
        return False
    return frame[name].n_unique() > 1 and int(frame.select(pl.struct(key, name).n_unique()).item()) == ids


def rows_vary(frame: pl.DataFrame, found: GuessedColumns, option: str, columns: Iterable[str]) -> list[str]:
    """Return the columns that vary for an item, of these by their rank, and note the others."""
    left = []
    for name in columns:
        if is_of(frame, found, "item_id", name):
            found.notes.append(f"'{name}': each item has one value, so it tells of items, and is no {option}")
        else:
            left.append(name)
    return sorted(left, key=lambda name: names.rank(name, option))
