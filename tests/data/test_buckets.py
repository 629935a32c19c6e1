"""Hashes and order of users, which every engine computes in the same way; see bucket_vectors.py."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import polars as pl
import pytest
from bucket_vectors import HASHES, SAME_HASH

from twotower.data.buckets import in_user_order, user_hashes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "prepared-format.md"
NUMBERS = [i for i in HASHES if isinstance(i, int) and i < 2**63]
LARGE = [i for i in HASHES if isinstance(i, int) and i >= 2**63]
TEXTS = [i for i in HASHES if isinstance(i, str)]
COLUMNS = [pl.Series(NUMBERS, dtype=pl.Int64), pl.Series(LARGE, dtype=pl.UInt64), pl.Series(TEXTS)]


@pytest.mark.parametrize("ids", COLUMNS, ids=lambda column: str(column.dtype))
def test_hashes_of_ids_are_those_of_the_contract(ids: pl.Series) -> None:
    assert user_hashes(ids).tolist() == [HASHES[i] for i in ids.to_list()]


def test_the_page_shows_hashes_of_the_vectors() -> None:
    _, _, section = PAGE.read_text(encoding="utf-8").partition("| id | hash |")
    rows = re.findall(r"^\| `(.*)`.* \| (\d+) \|$", section.partition("\n\n")[0], re.M)
    assert len(rows) > 5
    assert {(str(i), h) for i, h in HASHES.items()} > {(i, int(h)) for i, h in rows}


@pytest.mark.parametrize("ids", COLUMNS, ids=lambda column: str(column.dtype))
def test_the_sql_of_the_contract_hashes_in_duckdb_as_here(ids: pl.Series) -> None:
    (expression,) = re.findall(r"`([^`]+)` \(DuckDB\)", PAGE.read_text(encoding="utf-8"))
    db = duckdb.connect()
    db.register("users", ids.to_frame("id").to_arrow())
    found = db.sql(f"SELECT {expression} FROM users").fetchall()
    assert [h for (h,) in found] == [HASHES[i] for i in ids.to_list()]


@pytest.mark.parametrize(("hashed", "ids"), SAME_HASH.items())
def test_ids_of_one_hash_are_ordered_by_value_or_bytes(hashed: int, ids: tuple[str | int, str | int]) -> None:
    column = pl.Series("id", ids)
    assert user_hashes(column).tolist() == [hashed] * 2
    for given in (column, column.reverse()):
        assert in_user_order(given.to_frame(), "id")["id"].to_list() == list(ids)
