"""Features of columns, tables of columns of the log, and columns that hold the answers."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from suggestion_worlds import log

from twotower.cli.app import run_command
from twotower.config.toml import load_config
from twotower.data.source import read
from twotower.data.tables import Tables
from twotower.errors import ConfigError
from twotower.suggestion.features import MAX_CATEGORIES, MIN_OWNERS, guess_features, most_frequent
from twotower.suggestion.suggest import suggest

N, ITEMS = 60, 40
BRANDS = [f"b{i % 9}" for i in range(ITEMS)]
WORDS = ("red", "blue", "green", "old", "new", "fast", "slow")


def kind(values: Sequence[object], name: str = "x", side: str = "item") -> str:
    frame = pl.DataFrame({"item_id": range(len(values)), name: values}, strict=False)
    found = guess_features(frame, side, "item_id")  # type: ignore[arg-type]
    return str(found.features[0].options["kind"]) if found.features else found.notes[0]


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ([f"c{i % 5}" for i in range(N)], "x", "categorical"), ([i % 5 for i in range(N)], "x", "categorical"),
        ([i % 2 == 0 for i in range(N)], "x", "categorical"), ([1990 + i % 20 for i in range(N)], "year", "numeric"),
        ([1 + i % 20 for i in range(N)], "x", "categorical"), ([0.37 * i for i in range(N)], "price", "numeric"),
        ([i % 30 + 10 for i in range(N)], "shop_id", "categorical"), (list(range(N)), "x", "a key"),
        ([["a", "b"][: 1 + i % 2] for i in range(N)], "x", "multi_hot"),
        ([[0.1, 0.2 * i] for i in range(N)], "x", "vector"),
        ([[0.1] * (1 + i % 2) for i in range(N)], "x", "several lengths"), ([1] * N, "x", "one value"),
        ([date(2020, 1, 1) + timedelta(i) for i in range(N)], "x", "date"),
        ([f"{1 + i % 28:02}.{1 + i % 12:02}.{1980 + i % 40}" for i in range(N)], "x", "date"),
        ([f"2020-01-{1 + i % 28:02}" for i in range(N)], "last_review", "gives the answers away"),
        ([f"0{1 + i % 9}/0{1 + i % 8}/2020" for i in range(N)], "x", "fit several formats"),
        ([f"the {WORDS[i % 7]} story {i}" for i in range(N)], "x", "text"),
        ([f"x{i}" for i in range(N)], "title", "text"),
        ([f"S{i}K" for i in range(N)], "x", "too many for a category"),
        ([f"{i}.5" for i in range(N)], "x", "numbers that are text"),
        ([f"{WORDS[i % 7]} {WORDS[i % 5]}" for i in range(N)], "query", "text"),
        ([f"club {i % 3}" for i in range(N)], "x", "categorical"),
        ([None] * 40 + ["a", "b"] * 10, "x", "categorical"),
        ([None] * 59 + ["a"], "x", "missing"), ([{"a": 1}] * N, "x", "several fields"),
    ],
)  # fmt: skip
def test_a_column_has_a_kind_by_its_type_and_values(values: list[object], name: str, expected: str) -> None:
    found = kind(values, name)
    assert found == expected or (" " in found and expected in found)


@pytest.mark.parametrize("separator", ["|", ";", ", ", ","])
def test_lists_in_text_have_their_separator(separator: str) -> None:
    values = [separator.join(np.random.default_rng(i).choice(WORDS, 3, replace=False)) for i in range(N)]
    frame = pl.DataFrame({"item_id": range(N), "tags": values})
    (feature,) = guess_features(frame, "item", "item_id").features
    assert (feature.options["kind"], feature.options["separator"]) == ("multi_hot", separator)


def test_categories_end_at_their_number() -> None:
    few = [f"v{i % MAX_CATEGORIES}" for i in range(2 * MAX_CATEGORIES)]
    many = [f"v{i % (MAX_CATEGORIES + 1)}" for i in range(2 * MAX_CATEGORIES + 2)]
    assert kind(few, side="user") == kind(many, side="item") == "categorical"
    assert "too many for a category" in kind(many, side="user")


def shop(wrong: float = 0.0) -> pl.DataFrame:
    """Return a log with a brand of each item, wrong in a share of the rows, a country of each user, and a device."""
    rng, actions = np.random.default_rng(0), log()
    shown = np.where(
        rng.random(len(actions)) < wrong, rng.integers(0, ITEMS, len(actions)), actions["item_id"].to_numpy()
    )
    country = pl.Series([("ch", "de", "fr")[u % 3] for u in actions["user_id"]])
    device = pl.Series(rng.choice(["web", "app"], len(actions)))
    return actions.with_columns(brand=pl.Series(BRANDS).gather(shown), country=country, device=device)


def test_constant_columns_are_tables_and_the_others_are_left_out() -> None:
    found = suggest(shop())
    items, users = found.tables["items"], found.tables["users"]
    assert dict(items.iter_rows()) == {i: BRANDS[i] for i in items["item_id"]}
    assert (items.columns, users.columns, users.height) == (["item_id", "brand"], ["user_id", "country"], 60)
    assert "Left out: 'device' of the interactions." in found.reasons
    assert "Table of items: 'brand' of the interactions, of each item the most frequent value." in found.reasons
    assert {f.source for f in found.schema.side("item")} >= {"item_id", "brand"}
    changing = suggest(shop(0.2))
    assert "items" not in changing.tables
    assert "brand" not in {f.source for f in changing.schema.features}


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, "a", "b", "c"])), min_size=1, max_size=30))
@examples(max_examples=50, deadline=None)
def test_the_value_of_an_id_is_that_of_plain_loops(rows: list[tuple[int, str | None]]) -> None:
    frame = pl.DataFrame(rows, schema={"id": pl.Int64, "v": pl.String}, orient="row")
    expected = dict[int, str | None]()
    for key in sorted({key for key, _ in rows}):
        counts = Counter(value for own, value in rows if own == key and value is not None)
        expected[key] = min(counts, key=lambda v: (-counts[v], v)) if counts else None
    assert dict(most_frequent(frame, "id", ["v"]).iter_rows()) == expected


def test_tables_of_files_are_written_where_the_config_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop().write_parquet(tmp_path / "clicks.parquet")
    output = tmp_path / "mine.toml"
    assert run_command(["suggest", str(tmp_path / "clicks.parquet"), "-o", str(output)]) == 0
    assert "in mine.items.parquet; it does not follow later rows" in capsys.readouterr().out
    assert tomllib.loads(output.read_text())["data"]["items"] == "mine.items.parquet"
    schema, config = load_config(output)
    tables, _ = read(config, schema)
    assert isinstance(tables, Tables)
    assert "brand" in tables.items.columns
    printed = suggest(tmp_path / "clicks.parquet")
    assert "with an output file they are written as a table of items" in " ".join(printed.reasons)
    output.unlink()
    with pytest.raises(ConfigError, match=r"mine\.items\.parquet: exists already; choose another file for `output`"):
        suggest(tmp_path / "clicks.parquet", folder=tmp_path, output="mine.toml")
    (tmp_path / "folder").mkdir()
    shop().write_parquet(tmp_path / "folder" / "a.parquet")
    with pytest.raises(ConfigError, match="would be read with the files of"):
        suggest(tmp_path / "folder", folder=tmp_path / "folder", output="b.parquet")


def test_a_given_table_gets_no_columns_and_a_context_is_no_column_of_items() -> None:
    items = pl.DataFrame({"item_id": range(ITEMS), "size": [i % 3 for i in range(ITEMS)]})
    found = suggest(shop(), items=items)
    assert "items" not in found.tables
    told = "Left out: 'brand' of the interactions, one value for each item; add them to the table of items."
    assert told in found.reasons
    named = (("context", "brand"), ("item", "item_id"), ("user", "user_id"))
    listed = ",".join(f'{{kind="categorical",side="{side}",name="{name}"}}' for side, name in named)
    assert "items" not in suggest(shop(), overrides=[f"schema.features=[{listed}]", "scorers=[]"]).tables


def taken(n: int = 300) -> list[list[str]]:
    """Return the tags that each user has."""
    return [[f"t{tag}" for tag in np.random.default_rng(u).permutation(40)[: 2 + u % 5]] for u in range(n)]


def exploded(tags: Sequence[object]) -> pl.DataFrame:
    return pl.DataFrame({"user_id": range(len(tags)), "item_id": tags}, strict=False).explode("item_id")


def table(tags: Sequence[object]) -> pl.DataFrame:
    sections = [f"s{i % 5}" for i in range(len(tags))]
    return pl.DataFrame({"user_id": range(len(tags)), "tags": tags, "section": sections}, strict=False)


def left_out(actions: pl.DataFrame, users: pl.DataFrame | None = None, items: pl.DataFrame | None = None) -> list[str]:
    """Return the columns that hold the answers, and check that no feature reads them."""
    found = suggest(actions, users, items)
    columns = [line.split("'")[1] for line in found.reasons if line.endswith(": the answers.")]
    assert not {*columns} & {f.source for f in found.schema.features}
    return columns


def test_a_list_that_the_log_is_exploded_from_is_left_out() -> None:
    tags = taken()
    assert left_out(exploded(tags), table(tags)) == ["tags"]
    found = suggest(exploded(tags), table(tags))
    assert (
        "Left out: 'tags' of the users, it holds the item of 100% of the rows with a value of it: the answers."
        in found.reasons
    )
    shuffled = [tags[(u + 7) % len(tags)] for u in range(len(tags))]
    assert left_out(exploded(tags), table(shuffled)) == [], "lists of other users"


def test_the_users_of_an_item_and_one_answer_are_left_out() -> None:
    tags = taken()
    rows = exploded(tags)
    fans = rows.group_by("item_id").agg(fans="user_id")
    assert left_out(rows, items=fans) == ["fans"]
    first = table([own[0] for own in tags])
    assert left_out(exploded([own[:1] for own in tags]), first) == ["tags"]
    assert left_out(rows, first) == [], "a third of the rows"


@pytest.mark.parametrize(("rows", "expected"), [(MIN_OWNERS - 1, []), (MIN_OWNERS, ["tags"])])
def test_few_rows_say_nothing(rows: int, expected: list[str]) -> None:
    tags = [[f"t{u}"] for u in range(rows)]
    others = pl.DataFrame({"user_id": range(rows, 200), "item_id": [f"t{u % 9}" for u in range(rows, 200)]})
    tags_of = pl.Series([*tags, *[None] * (200 - rows)], dtype=pl.List(pl.String))
    users = pl.DataFrame({"user_id": range(200), "tags": tags_of})
    assert left_out(pl.concat([exploded(tags), others]), users) == expected


def test_what_was_liked_is_looked_for_among_refused_rows() -> None:
    tags = taken()
    shown = exploded(tags).with_columns(liked=1)
    other = shown.with_columns(pl.col("user_id").reverse(), liked=0)
    assert left_out(pl.concat([shown, other]), table(tags)) == ["tags"]
    kinds = pl.concat([shown, other]).with_columns(
        event=pl.when(pl.col("liked") > 0).then(pl.lit("like")).otherwise(pl.lit("skip"))
    )
    assert left_out(kinds.drop("liked"), table(tags)) == ["tags"]
