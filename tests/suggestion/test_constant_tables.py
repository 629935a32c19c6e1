"""Tables of items and users from columns of a log: what enters, its value, where it is written, and what reads it."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from suggestion_worlds import log

from twotower.cli.app import run_command
from twotower.config.toml import load_config
from twotower.data.dataset import build_dataset
from twotower.data.source import read
from twotower.data.tables import Tables, check
from twotower.errors import ConfigError
from twotower.suggestion.constant_tables import _values_of_ids, with_constant_columns
from twotower.suggestion.guess import guess_meaning
from twotower.suggestion.guessed_columns import GuessedColumns
from twotower.suggestion.suggest import suggest
from twotower.suggestion.tables import FoundTables, find_tables

ITEMS = 40
BRANDS = [f"b{i % 9}" for i in range(ITEMS)]


def shop(wrong: float = 0.0, seed: int = 0) -> pl.DataFrame:
    """Return a log with a brand of each item, in all but a share of the rows, a country of each user, and a device of each row."""
    rng = np.random.default_rng(seed)
    actions = log()
    n = actions.height
    shown = np.where(rng.random(n) < wrong, rng.integers(0, ITEMS, n), actions["item_id"].to_numpy())
    brand = pl.Series(BRANDS).gather(shown)
    country = [("ch", "de", "fr")[u % 3] for u in actions["user_id"]]
    return actions.with_columns(
        brand=brand, country=pl.Series(country), device=pl.Series(rng.choice(["web", "app"], n))
    )


def call(*arguments: object) -> int:
    return run_command([str(a) for a in arguments])


def test_constant_columns_are_tables_and_the_others_are_left_out() -> None:
    found = suggest(shop().with_columns(rare=pl.col("item_id") < 3))  # of too few items
    items, users = found.tables["items"], found.tables["users"]
    assert items.columns == ["item_id", "brand"]
    assert dict(items.iter_rows()) == {i: BRANDS[i] for i in items["item_id"]}
    assert (users.columns, users.height) == (["user_id", "country"], 60)
    assert "Left out: 'device', 'rare' of the interactions." in found.reasons
    assert "context" not in found.text
    line = "Table of items: 'brand' of the interactions, of each item the most frequent value, of equally frequent ones the smallest."
    assert line in found.reasons
    assert ("item", "brand") in {(f.side, f.name) for f in found.schema.features}
    dataset = build_dataset(check(users, items, shop(), found.schema), found.schema, found.config.split)
    codes = dataset.items.columns["brand"]
    assert isinstance(codes, np.ndarray)
    assert codes.max() == 9  # each brand has a code


def most_frequent(rows: Iterable[tuple[Any, ...]]) -> dict[Any, Any]:
    """Return the most frequent value of each id by plain loops, of equally frequent ones the smallest."""
    counts = dict[Any, Counter[Any]]()
    for key, value in rows:
        if key is not None:
            counts.setdefault(key, Counter()).update([] if value is None or value != value else [value])
    return {key: min(c, key=lambda v: (-c[v], v)) if c else None for key, c in counts.items()}


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b", None]), st.sampled_from([None, float("nan"), 1.0, 2.0, 3.0]))))
@examples(max_examples=50, deadline=None)
def test_the_value_of_an_id_is_that_of_plain_loops(rows: list[tuple[str | None, float | None]]) -> None:
    frame = pl.DataFrame(rows, schema={"id": pl.String, "x": pl.Float64}, orient="row")
    expected = most_frequent((key or None, value) for key, value in rows)
    assert dict(_values_of_ids(frame, "id", ["x"]).iter_rows()) == expected


@pytest.mark.parametrize(("wrong", "is_constant"), [(0.006, True), (0.03, False)])
def test_values_that_change_are_no_column_of_items(wrong: float, is_constant: bool) -> None:
    """An item without a value has none."""
    actions = shop(wrong)
    actions = actions.with_columns(brand=pl.when(pl.int_range(pl.len()) % 5 > 0).then("brand"))
    actions = actions.with_columns(brand=pl.when(pl.col("item_id") != 7).then("brand"))
    found = suggest(actions)
    assert ("brand" in found.tables.get("items", pl.DataFrame()).columns) == is_constant
    if not is_constant:
        said = r"Left out: 'brand': \d\.\d% of the rows differ from the most frequent value of their item \(at most 1%\), as of a price that changes"
        assert any(pl.Series([line]).str.contains(said).item() for line in found.reasons)
        return
    expected = most_frequent(actions.select("item_id", "brand").rows())
    assert dict(found.tables["items"].iter_rows()) == expected
    assert expected[7] is None


def test_a_log_without_two_rows_of_an_item_says_nothing_of_its_columns() -> None:
    frame = pl.DataFrame({"user_id": range(6), "item_id": range(6), "brand": list("abcabc")})
    reasons = suggest(frame).reasons
    assert "Left out: 'brand' of the interactions." in reasons
    assert not [line for line in reasons if "as of a price that changes" in line]


def test_numbers_counted_from_the_rows_are_no_column_of_items() -> None:
    actions = shop()
    rng = np.random.default_rng(0)
    actions = actions.filter(pl.Series(rng.random(actions.height) < actions["item_id"].to_numpy() / ITEMS))
    actions = actions.with_columns(sold=pl.len().over("item_id") + pl.col("item_id") / 100)
    found = suggest(actions)
    assert found.tables["items"].columns == ["item_id", "brand"]
    assert (
        "Left out: 'sold': one value for each item, which follows the number of its rows as a count of them would."
        in found.reasons
    )


def test_a_given_table_gets_the_columns_that_it_lacks() -> None:
    """A column that both tables have stays that of the table; one of the users of the same name is another one."""
    table = pl.DataFrame({"item_id": range(ITEMS + 3), "brand": ["own"] * 20 + ["other"] * 23})
    actions = shop().with_columns(colour=pl.col("item_id") % 5)
    found = suggest(actions, pl.DataFrame({"user_id": range(60), "colour": ["x", "y"] * 30}), table)
    items = found.tables["items"]
    assert items.drop("colour").equals(table)
    of_log = {*actions["item_id"]}
    assert items["colour"].to_list() == [i % 5 if i in of_log else None for i in items["item_id"]]
    assert not suggest(
        actions,
        items=table.with_columns(colour=pl.lit("red")),
        users=pl.DataFrame({"user_id": range(60), "country": ["x", "y"] * 30}),
    ).tables


@pytest.mark.parametrize("ending", ["csv", "parquet", "parts"])
def test_tables_of_files_are_written_where_the_config_is(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, actions, out = tmp_path / f"clicks.{ending}", shop(), tmp_path / "out" / "mine.toml"
    if ending == "csv":
        actions.write_csv(path)
    elif ending == "parquet":
        actions.write_parquet(path)
    else:
        path = tmp_path / "data"
        path.mkdir()
        late = actions.height - 100
        actions[:late].write_csv(path / "train.csv")
        actions[late:].with_columns(item_id=pl.col("item_id") + 1000).write_csv(path / "test.csv")
    out.parent.mkdir()
    assert call("suggest", path, "--output", out) == 0
    assert "Table of items: 'brand' of the interactions" in capsys.readouterr().out
    assert {p.name for p in out.parent.iterdir()} == {"mine.toml", "mine.items.parquet", "mine.users.parquet"}
    section = tomllib.loads(out.read_text())["data"]
    assert (section["items"], section["users"]) == ("mine.items.parquet", "mine.users.parquet")
    tables, schema = read(*load_config(out)[::-1])
    assert isinstance(tables, Tables)
    assert ("item", "brand") in {(f.side, f.name) for f in schema.features}
    expected = {(i, BRANDS[i % 1000]) for i in tables.interactions["item_id"]}  # of all parts
    assert {*tables.items.select("item_id", "brand").iter_rows()} == expected


def test_no_table_is_written_where_it_would_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "mine.toml"
    data.mkdir()
    shop().write_csv(data / "part-0.csv")
    printed = (
        "'brand' of the interactions, one value for each item; with an output file they are written as a table of items"
    )
    assert call("suggest", data) == 0  # printed
    assert printed in " ".join(capsys.readouterr().out.replace("#", "").split())
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    for place, out_of in ((data / "mine.toml", data), (tmp_path / "mine.toml", tmp_path / "*.parquet")):
        if out_of != data:
            shop().write_parquet(tmp_path / "log.parquet")
        assert call("suggest", out_of, "--output", place) == 2
        assert "would be read with the files of" in capsys.readouterr().err
        assert not place.exists()
    (tmp_path / "mine.users.parquet").write_text("mine")
    assert call("suggest", data, "--output", out) == 2
    assert "mine.users.parquet: exists already" in capsys.readouterr().err
    assert not out.exists()
    assert not (tmp_path / "mine.items.parquet").exists()
    with pytest.raises(ConfigError, match="mine.users.parquet: exists already"):
        suggest(data, folder=tmp_path, output="mine.toml")


def test_other_columns_are_told_once() -> None:
    """A label in words has a line of its own."""
    rng, actions = np.random.default_rng(0), log()
    words = pl.Series(["yea", "nay", "absent"]).gather(rng.integers(0, 3, actions.height))
    others = [pl.Series(name, 2 * rng.integers(0, 3, actions.height)) for name in "abcdefg"]
    reasons = suggest(actions.with_columns(*others, vote=words)).reasons
    assert "Left out: 'a', 'b', 'c', 'd', 'e', 'f', … of the interactions." in reasons
    assert len([line for line in reasons if "'vote'" in line]) == 1


def test_a_column_that_is_given_as_a_context_is_in_no_table() -> None:
    context = [{"kind": "categorical", "side": "context", "name": "from", "column": "country"}]
    made = [guess_meaning(find_tables(shop()), options).tables.made for options in ({}, {"features": context})]
    assert made == [("items", "users"), ("items",)]


def test_ids_of_another_name_find_the_rows_of_a_given_table() -> None:
    table = pl.DataFrame({"item_id": range(100, 100 + ITEMS), "sku": range(ITEMS)})
    for own in ("sku", "item_id"):
        columns = GuessedColumns({"user_id": "user_id", "item_id": "item_id", "items_id": own})
        items = with_constant_columns(FoundTables(shop(), items=table), columns, None).items
        assert items is not None
        assert items["brand"].to_list() == (BRANDS if own == "sku" else [None] * ITEMS)
    columns = GuessedColumns({"user_id": "user_id", "item_id": "item_id"})
    found = with_constant_columns(FoundTables(shop(), items=table.drop("item_id")), columns, None)
    assert found.made == ("users",)
    assert "'brand' of the interactions, one value for each item; add them to the table of items" in columns.notes
