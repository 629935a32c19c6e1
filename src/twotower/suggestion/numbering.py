"""Numbers of the rows, of a table and of each user: places in files and in histories."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import polars as pl

from twotower.suggestion.names import names_place

MIN_NUMBERED = 20
"""Rows beyond the first of their users from which numbers that fit are no chance."""
MIN_PLACES = 3
"""Values from which numbers may be an order; two may be an outcome."""
MIN_ANSWERED = 0.5
"""Share of numbered questions that users answer, the mean."""
_OF_FILE = re.compile(
    r"(_duplicated_\d+|unnamed(: ?|_)\d+(\.\d+)*|\.{3}\d+|row_?names|__index_level_\d+__|index)?", re.IGNORECASE
)
"""Names of the index that pandas writes and of the row names of R; none, of a header line that leaves its first place empty."""


def row_numbers(frame: pl.DataFrame, but: Collection[str] = ()) -> list[str]:
    """Return the columns that number the rows of a file, as pandas writes an index and R its row names: known by such a name, or none, and by
    whole numbers that are distinct in all rows, in order unless rows were left out or sorted anew. `but` are those that have another meaning."""
    found = (frame[name] for name in frame.columns if name not in but and _OF_FILE.fullmatch(name.strip()))
    return [s.name for s in found if s.dtype.is_integer() and not s.null_count() and 1 < len(s) == s.n_unique()]


def notes_of_row_numbers(columns: Iterable[str], table: str) -> list[str]:
    """Return a note for each of such columns of a table."""
    unnamed = {"": " (without a name)"}
    return [
        f"'{name}'{unnamed.get(name, '')} numbers the rows of the {table}, and is no column of theirs"
        for name in columns
    ]


def numbers_rows(frame: pl.DataFrame, user_id: str, column: str) -> bool:
    """Return True for a column of whole numbers that counts the rows of each user, without gap or repeat, from one first number
    for all."""
    if not {user_id, column} <= {*frame.columns} or user_id == column:
        return False
    values = frame[column]
    if not values.dtype.is_integer() or values.null_count() or not len(values):
        return False
    first = values.min()
    assert isinstance(first, int)
    if int((values == first).sum()) != frame[user_id].n_unique():
        return False  # each user has the first number once
    value = pl.col(column)
    of_users = frame.group_by(user_id).agg(n=pl.len(), distinct=value.n_unique(), low=value.min(), high=value.max())
    if len(frame) - len(of_users) < MIN_NUMBERED:
        return False
    n, distinct, low, high = (pl.col(name) for name in ("n", "distinct", "low", "high"))
    fits = (distinct == n) & (low == first) & (high.cast(pl.Int128) - first + 1 == n)
    return bool(of_users.select(fits.all()).item())


def may_order(frame: pl.DataFrame, user_id: str, column: str) -> bool:
    """Return True for such numbers of three values or more, of users with different numbers of rows: answers to the same questions,
    and places in lists of one length, need be no order."""
    if not numbers_rows(frame, user_id, column) or frame[column].n_unique() < MIN_PLACES:
        return False
    return frame[user_id].value_counts()["count"].n_unique() > 1


def counts_occasions(frame: pl.DataFrame, user_id: str, column: str) -> bool:
    """Return True for such numbers that are no items: named as places, or users have less than half of them, the mean, while answers to the
    same questions have most, though some users end early."""
    if not may_order(frame, user_id, column):
        return False
    return names_place(column) or len(frame) < MIN_ANSWERED * frame[user_id].n_unique() * frame[column].n_unique()


def note_orders(frame: pl.DataFrame, user_id: str, columns: Iterable[str], notes: list[str]) -> None:
    """Add to `notes`, which begin with the column in quotes, those of `columns` that number rows and are not read as an order."""
    for name in columns:
        if not numbers_rows(frame, user_id, name) or frame[name].n_unique() < MIN_PLACES:
            continue
        order = f"schema.time={name} would read an order, the oldest first"
        told = next((place for place, note in enumerate(notes) if note.startswith(f"'{name}'")), None)
        if told is None:
            notes.append(
                f"'{name}' numbers the rows of each user; {order}, a feature with side = 'context' what is known before"
            )
        else:
            notes[told] += f"; {order}"
