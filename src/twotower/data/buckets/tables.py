"""Check of the tables of users and items of a folder of buckets: columns, ids, order and number."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from twotower.data.buckets import Buckets, user_hashes
from twotower.data.buckets.rules import Problems, Rule, first_true, read_blocks
from twotower.data.tables import side_columns
from twotower.errors import RunError
from twotower.features.schema import Schema
from twotower.features.side import SideName
from twotower.files import layout

ID_TYPES = (pl.Int64, pl.UInt64, pl.String)


def check_table(buckets: Buckets, side: SideName, schema: Schema | None, problems: Problems, block_rows: int) -> None:
    """Add the problems of the table of a side; `block_rows` of its ids are read at a time."""
    path = buckets.table(side)
    columns = problems.columns(path)
    if not columns:
        return
    if schema:
        _check_names(path, list(columns), side_columns(side, schema), problems)
    key, dtype = next(iter(columns.items()))
    if dtype not in ID_TYPES:
        problems.add(path, Rule.IDS, f"first column '{key}' holds {dtype}, expected Int64, UInt64 or String")
        return
    try:
        check = _check_users if side == "user" else _check_items
        rows = check(path, list(columns), problems, block_rows)
    except RunError as e:
        problems.unreadable(path, e)
        return
    expected = buckets.facts.users if side == "user" else buckets.facts.items
    if rows not in (None, expected):
        problems.add(
            path, Rule.COUNTS, f"number of {side}s {rows:,}, expected {expected:,} as in {layout.BUCKET_FACTS}"
        )


def _check_names(path: Path, found: list[str], named: list[str], problems: Problems) -> None:
    """Add the problem of a table whose first column is not the id of the schema, or that lacks another column."""
    if found[0] != named[0]:
        problems.add(path, Rule.FEATURES, f"first column '{found[0]}', expected '{named[0]}', the id of the schema")
    if absent := [name for name in named[1:] if name not in found]:
        problems.add(
            path, Rule.FEATURES, f"no column '{absent[0]}', which the schema names (found: {', '.join(found)})"
        )


def _check_users(path: Path, columns: list[str], problems: Problems, block_rows: int) -> int | None:
    """Check ids and order of the users. Return their number; None if they were not read to the end."""
    key, rows, last = columns[0], 0, pl.DataFrame()
    for start, block in read_blocks(path, columns, block_rows):
        if _has_null(path, start, block[key], problems):
            return None
        users = pl.DataFrame({"id": block[key], "hash": user_hashes(block[key])})
        if start:
            users = pl.concat([last, users])
        before, after = users[:-1], users[1:]
        place = rows + 1 - last.height  # of the first record of `after`
        same = after["hash"] == before["hash"]
        if (at := first_true(same & (after["id"] == before["id"]))) is not None:
            problems.add(path, Rule.IDS, f"record {place + at} repeats id '{after['id'][at]}', expected each id once")
        if (at := first_true((after["hash"] < before["hash"]) | (same & (after["id"] < before["id"])))) is not None:
            (one, hash_one), (two, hash_two) = before.row(at), after.row(at)
            problems.add(
                path,
                Rule.USER_ORDER,
                f"record {place + at} has id '{two}' of hash {hash_two} after '{one}' of hash {hash_one}, expected "
                "ascending hashes, and ascending ids of one hash",
            )
        last = users.tail(1)
        rows += block.height
    return rows


def _check_items(path: Path, columns: list[str], problems: Problems, block_rows: int) -> int | None:
    """Check the ids of the items, all in memory. Return their number; None if one is null."""
    blocks = [block[columns[0]] for _, block in read_blocks(path, columns, block_rows)]
    if not blocks:
        return 0
    ids = pl.concat(blocks)
    if _has_null(path, 0, ids, problems):
        return None
    if (at := first_true(~ids.is_first_distinct())) is not None:
        problems.add(path, Rule.IDS, f"record {at} repeats id '{ids[at]}', expected each id once")
    return len(ids)


def _has_null(path: Path, start: int, ids: pl.Series, problems: Problems) -> bool:
    """Return True, and add a problem, if an id is null."""
    at = first_true(ids.is_null())
    if at is not None:
        problems.add(path, Rule.IDS, f"record {start + at} has no id, expected one")
    return at is not None
