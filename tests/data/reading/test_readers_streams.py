"""Arrow streams of databases and lakes are tables."""

from __future__ import annotations

from pathlib import Path

import adbc_driver_sqlite.dbapi
import duckdb
import polars as pl
from deltalake import DeltaTable, QueryBuilder, write_deltalake

from twotower.data.reading.readers import as_frame

CLICKS = pl.DataFrame({"user": ["a", "ü", "c"], "item": [1, 2, 3], "liked": [True, False, True]})


def test_a_query_of_duckdb_is_a_table() -> None:
    with duckdb.connect() as connection:
        connection.register("clicks", CLICKS.to_arrow())
        query = connection.sql("SELECT * FROM clicks WHERE item > 1")
        for _ in range(2):
            assert as_frame(query, "interactions").equals(CLICKS[1:])


def test_a_query_of_deltalake_is_a_table(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "t", CLICKS)
    query = QueryBuilder().register("clicks", DeltaTable(tmp_path / "t"))
    found = as_frame(query.execute("SELECT * FROM clicks WHERE item > 1"), "interactions")
    assert found.sort("item").equals(CLICKS[1:])


def test_a_result_of_adbc_is_a_table() -> None:
    with adbc_driver_sqlite.dbapi.connect() as connection, connection.cursor() as cursor:
        cursor.adbc_ingest("clicks", CLICKS.drop("liked").to_arrow())
        cursor.execute("SELECT * FROM clicks WHERE item > 1")
        assert as_frame(cursor.fetch_record_batch(), "interactions").equals(CLICKS[1:].drop("liked"))
