"""Columns that number the rows of a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from twotower.errors import DataError
from twotower.suggestion.numbering import row_numbers
from twotower.suggestion.suggest import suggest

NAMES = ["", "Unnamed: 0", "Unnamed: 0.1", "unnamed_3", "...1", "rownames", "row_names", "__index_level_0__", "index"]


@pytest.mark.parametrize("name", NAMES)
def test_whole_numbers_that_are_distinct_in_all_rows_number_them_by_such_a_name(name: str) -> None:
    for numbers in ([0, 1, 2], [1, 2, 3], [2, 3, 7], [8, 2, 5]):
        assert row_numbers(pl.DataFrame({"user": [1, 2, 3], name: numbers})) == [name]
    assert row_numbers(pl.DataFrame({"user": [1, 2, 3], name: [1, 2, 3]}), but=[name]) == []
    for others in ([1, 1, 2], [1, None, 2], ["a", "b", "c"], [1.5, 2.5, 3.5]):
        assert row_numbers(pl.DataFrame({"user": [1, 2, 3], name: others}, strict=False)) == []
    assert row_numbers(pl.DataFrame({"user": [1], name: [1]})) == [], "of one row nothing is known"


@pytest.mark.parametrize("name", ["user", "nr", "row", "reindex", "index_of_price", "Unnamed"])
def test_another_name_numbers_no_rows(name: str) -> None:
    assert row_numbers(pl.DataFrame({name: [0, 1, 2]})) == []


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_the_rows_of_both_tables_are_the_ids_of_neither(name: str, tmp_path: Path) -> None:
    rows = pl.DataFrame(
        {name: range(1, 1001), "patient": [i * 7 % 100 for i in range(1000)], "drug": [i % 41 for i in range(1000)]}
    )
    of_users = pl.DataFrame({name: range(1, 101), "patient": range(100), "city": ["x", "y"] * 50})
    rows.write_csv(tmp_path / "rows.csv")
    of_users.sample(fraction=1, shuffle=True, seed=1).write_csv(tmp_path / "users.csv")
    found = suggest(tmp_path / "rows.csv", tmp_path / "users.csv")
    assert (found.schema.user_id, found.schema.item_id) == ("patient", "drug")
    if name != "__index_level_0__":  # left out where tables are read
        shown = f"'{name}'{'' if name else ' (without a name)'}"
        for table in ("interactions", "users"):
            assert f"Left out: {shown} numbers the rows of the {table}, and is no column of theirs." in found.reasons
    items = of_users.rename({"patient": "drug"})
    items.write_csv(tmp_path / "items.csv")
    found = suggest(tmp_path / "rows.csv", items=tmp_path / "items.csv")
    assert (found.schema.user_id, found.schema.item_id) == ("patient", "drug")


def test_an_index_that_repeats_in_the_interactions_is_their_id() -> None:
    rows = pl.DataFrame({"index": [i * 7 % 100 for i in range(1000)], "drug": [i % 41 for i in range(1000)]})
    users = pl.DataFrame({"index": range(100), "city": ["x", "y"] * 50})
    assert suggest(rows, users).schema.user_id == "index"


def test_numbers_of_the_rows_that_are_asked_for_are_read() -> None:
    rows = pl.DataFrame(
        {"index": range(1000), "user": [i * 7 % 100 for i in range(1000)], "item": [i % 41 for i in range(1000)]}
    )
    found = suggest(rows, overrides=["schema.time=index", "schema.time_unit=order"])
    assert found.schema.time == "index"
    assert not any("numbers the rows of the interactions" in line for line in found.reasons)


def test_ids_of_another_name_are_not_looked_for_in_numbers_of_rows() -> None:
    rows = pl.DataFrame({"user_id": [1 + i * 7 % 100 for i in range(1000)], "item_id": [i % 41 for i in range(1000)]})
    users = pl.DataFrame({"Unnamed: 0": range(1, 101), "number": range(1, 101)})
    assert suggest(rows, users).schema.users_id == "number"
    with pytest.raises(
        DataError, match="'Unnamed: 0' may hold the ids .* set schema.users_id = 'Unnamed: 0' to say so"
    ):
        suggest(rows, users.with_columns(number=pl.lit("x")))
    two = users.with_columns(rank=pl.col("number").reverse())
    with pytest.raises(
        DataError, match="'number' and 'rank' may hold the ids that 'user_id' of the interactions has; set"
    ):
        suggest(rows, two)
    assert suggest(rows, two.rename({"rank": "customer"})).schema.users_id == "customer"


def test_an_error_of_missing_ids_names_the_numbers_that_were_left_out() -> None:
    rows = pl.DataFrame({"user_id": [i % 20 for i in range(200)], "index": range(200)})
    told = "no column of item_id is found .*left out, as they number the rows: 'index'; name one if it holds ids"
    with pytest.raises(DataError, match=told):
        suggest(rows)
    assert suggest(rows, overrides=["schema.item_id=index"]).schema.item_id == "index"


def test_ids_of_the_rows_of_each_table_are_no_ids_that_they_share() -> None:
    rows = pl.DataFrame(
        {
            "row_id": [f"row-{i}" for i in range(1000)],
            "revoked": [False] * 1000,
            "source_ref": [f"user-{i * 7 % 100}" for i in range(1000)],
            "target_ref": [f"item-{i % 41}" for i in range(1000)],
        }
    )
    users = pl.DataFrame({"row_id": [f"user-{i}" for i in range(100)], "revoked": [i % 9 == 0 for i in range(100)]})
    items = pl.DataFrame({"row_id": [f"item-{i}" for i in range(41)], "revoked": [i % 9 == 0 for i in range(41)]})
    found = suggest(rows, users, items)
    assert (found.schema.user_id, found.schema.item_id) == ("source_ref", "target_ref")
    assert (found.schema.users_id, found.schema.items_id) == ("row_id", "row_id")
    found = suggest(rows, users.rename({"row_id": "source_ref"}), items.rename({"row_id": "target_ref"}))
    assert (found.schema.user_id, found.schema.users_id, found.schema.item_id) == ("source_ref", "", "target_ref")


def test_numbers_of_the_rows_are_no_hint_at_a_label() -> None:
    rng = np.random.default_rng(0)
    pairs = [(user, item) for user in range(60) for item in range(20) if rng.random() < 0.8]
    rows = pl.DataFrame(
        {"rownames": range(len(pairs)), "user_id": [u for u, _ in pairs], "item_id": [i for _, i in pairs]}
    )
    rows = rows.with_columns(value=pl.Series(rng.integers(1, 90, len(pairs))))
    hint = next(line for line in suggest(rows).reasons if "users have" in line and "of the items" in line)
    assert "schema.label=value" in hint
    assert "rownames" not in hint
