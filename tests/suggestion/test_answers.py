"""Columns that hold the answers, of made logs and of the tables that they are made from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest

from twotower.config.toml import TomlValue
from twotower.suggestion.answers import MIN_ROWS, taken_rows
from twotower.suggestion.suggest import suggest

N_USERS, N_TAGS = 300, 40


def taken(n_users: int = N_USERS, seed: int = 0) -> list[list[str]]:
    """Return the tags that each user has."""
    rng = np.random.default_rng(seed)
    return [[f"t{tag}" for tag in rng.permutation(N_TAGS)[: 2 + user % 5]] for user in range(n_users)]


def log(tags: Sequence[Sequence[object]]) -> pl.DataFrame:
    return pl.DataFrame({"user_id": range(len(tags)), "item_id": tags}, strict=False).explode("item_id")


def table(tags: Sequence[object], **columns: Sequence[object]) -> pl.DataFrame:
    """Return users with a column `tags`, and a section, which is no answer."""
    n = len(tags)
    return pl.DataFrame({"user_id": range(n), "tags": tags, "section": [f"s{i % 5}" for i in range(n)], **columns})


def left_out(actions: pl.DataFrame, users: pl.DataFrame | None = None, items: pl.DataFrame | None = None) -> list[str]:
    """Return the columns that hold the answers, and check that no feature reads them."""
    found = suggest(actions, users, items)
    told = [reason for reason in found.reasons if ": the answers (add a feature of it if" in reason]
    columns = [line.split("'")[1] for line in told]
    assert not {*columns} & {f.source for f in found.schema.features}
    return columns


def test_a_list_that_the_log_is_exploded_from_is_left_out_and_told() -> None:
    tags = taken()
    found = suggest(log(tags), table(tags))
    assert (
        "Left out: 'tags' of the users, it holds the item of 100% of the rows with a value of it: the answers (add a feature of it if it was known before the rows)."
        in (found.reasons)
    )
    names = {f.source for f in found.schema.features}
    assert "tags" not in names
    assert "section" in names


@pytest.mark.parametrize("separator", ["|", ", ", "; ", " "])
def test_such_a_list_in_text_is_left_out(separator: str) -> None:
    tags = taken()
    assert left_out(log(tags), table([separator.join(own) for own in tags])) == ["tags"]


def test_a_list_that_a_program_has_written_as_its_own_is_left_out() -> None:
    tags = taken()
    assert left_out(log(tags), table([str(own) for own in tags])) == ["tags"]


@pytest.mark.parametrize("separator", [", ", " "])
def test_text_of_many_ids_is_left_out_and_words_are_not(separator: str) -> None:
    rng = np.random.default_rng(0)
    tags = [[f"id{tag}" for tag in rng.integers(3000, size=4)] for _ in range(1000)]
    texts = [separator.join(own) for own in tags]
    assert left_out(log(tags), table(texts, about=[f"word{i} and more of {i % 7}" for i in range(1000)])) == ["tags"]


def test_the_users_of_an_item_are_left_out() -> None:
    tags = taken()
    cast = log(tags).group_by("item_id", maintain_order=True).agg(cast="user_id")
    items = cast.with_columns(genre=pl.Series([f"g{i % 3}" for i in range(len(cast))]))
    assert left_out(log(tags), None, items) == ["cast"]
    spelled = items.with_columns(pl.col("cast").list.eval(pl.element().cast(pl.Float64).cast(pl.String)))
    assert left_out(log(tags), None, spelled.with_columns(pl.col("cast").list.eval(pl.element().str.head(-2)))) == [
        "cast"
    ], "as text beside whole numbers"


def test_one_value_is_left_out_where_it_is_most_of_the_rows() -> None:
    tags = [[f"t{user * 7 % N_TAGS}"] for user in range(N_USERS)]
    assert left_out(log(tags), table([own[0] for own in tags])) == ["tags"]
    assert left_out(log(taken()), table([own[0] for own in taken()])) == [], "one of four, a favourite"


@pytest.mark.parametrize(("others", "expected"), [(1, ["tags"]), (9, [])])
def test_a_list_of_other_users_is_none(others: int, expected: list[str]) -> None:
    tags = taken()
    mixed = [own if i % 10 >= others else tags[i - 1] for i, own in enumerate(tags)]
    assert left_out(log(tags), table(mixed)) == expected


def test_values_of_few_users_are_told_by_their_own_rows() -> None:
    tags = taken()
    some = [own if i % 5 == 0 else None for i, own in enumerate(tags)]
    assert left_out(log(tags), table(some)) == ["tags"]


def test_small_numbers_that_meet_by_chance_are_no_answers() -> None:
    """Most items are the number 1, and so is the plan of most users; the ages are those of items too."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(500), 6)
    actions = pl.DataFrame(
        {"user_id": users, "item_id": np.where(rng.random(3000) < 0.8, 1, rng.integers(60, size=3000))}
    )
    plans = [[1, 2, 3] if i % 9 else [2, 4] for i in range(500)]
    table_of_users = pl.DataFrame(
        {"user_id": range(500), "plans": plans, "plan": [1 if i % 9 else 2 for i in range(500)], "age": rng.integers(60, size=500)}
    )  # fmt: skip
    assert left_out(actions, table_of_users) == []
    numbers = actions.group_by("user_id", maintain_order=True).agg("item_id")["item_id"].to_list()
    assert left_out(actions, table_of_users.with_columns(taken=pl.Series(numbers))) == ["taken"]


@pytest.mark.parametrize(("rows", "expected"), [(MIN_ROWS, ["tags"]), (MIN_ROWS - 1, [])])
def test_few_rows_tell_nothing(rows: int, expected: list[str]) -> None:
    tags = taken()
    known, n = list[list[str] | None](), 0
    for own in tags:
        own = own[: max(0, rows - n)]
        known, n = [*known, own or None], n + len(own)
    actions = log([own or every for own, every in zip(known, tags, strict=True)])
    assert left_out(actions, table(known, shop=[f"h{i % 3}" for i in range(N_USERS)])) == (
        expected if n / N_USERS > 1 else []
    )


def test_a_list_of_what_was_liked_is_left_out_beside_refused_rows() -> None:
    tags, rng = taken(), np.random.default_rng(3)
    liked = log(tags).with_columns(clicked=pl.lit(1))
    n = 3 * len(liked)
    refused = pl.DataFrame(
        {
            "user_id": rng.integers(N_USERS, size=n),
            "item_id": [f"t{i}" for i in rng.integers(N_TAGS, size=n)],
            "clicked": np.zeros(n, int),
        }
    )
    actions = pl.concat([liked, refused.with_columns(pl.col("clicked").cast(liked["clicked"].dtype))])
    actions = actions.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    assert left_out(actions, table(tags)) == ["tags"]
    kinds = actions.with_columns(
        event=pl.when(pl.col("clicked") > 0).then(pl.lit("click")).otherwise(pl.lit("impression"))
    )
    assert left_out(kinds.drop("clicked"), table(tags)) == ["tags"]


def test_a_title_and_a_query_that_say_what_is_taken_are_read() -> None:
    names = [f"red lamp {i}" for i in range(60)]
    items = pl.DataFrame({"item_id": names, "title": names, "kind": [f"k{i % 4}" for i in range(60)]})
    users = pl.DataFrame({"user_id": range(600), "query": [names[i % 60] for i in range(600)]})
    actions = pl.DataFrame({"user_id": range(600), "item_id": [names[i % 60] for i in range(600)]})
    assert left_out(actions, users, items) == []


@pytest.mark.parametrize("buy", [1, "positive", {"target": "positive"}])
@pytest.mark.parametrize("name", ["buy", "*"])
def test_rows_are_taken_by_every_form_of_a_rule_of_events(buy: TomlValue, name: str) -> None:
    rows = pl.DataFrame({"kind": ["buy", "view", "skip", "buy"], "n": range(4)})
    rules: TomlValue = {name: buy, "view": "input", "skip": {"target": "negative"}}
    assert taken_rows(rows, {"event": "kind", "events": rules})["n"].to_list() == [0, 3]
    free: TomlValue = {name: {"weight": 0}, "view": "input", "skip": "ignored"}
    assert not len(taken_rows(rows, {"event": "kind", "events": free}))


@pytest.mark.parametrize(("noise", "told"), [(0.0, True), (0.02, True), (2.0, False)])
def test_totals_of_the_rows_of_items_are_told_where_they_are_read(noise: float, told: bool) -> None:
    rng = np.random.default_rng(0)
    actions = pl.DataFrame({"user_id": rng.integers(400, size=6000), "item_id": rng.integers(80, size=6000) ** 2 // 80})
    actions = actions.unique(maintain_order=True).with_columns(
        rating=pl.Series(rng.integers(2, size=len(actions.unique())))
    )
    items = actions.group_by("item_id", maintain_order=True).agg(n=pl.len(), liked=pl.col("rating").mean())
    items = items.with_columns(
        total=pl.col("n").log() + noise * pl.Series(rng.normal(size=len(items))),
        size=pl.Series(rng.normal(size=len(items))),
    )
    line = "counted from these rows, as totals and means are, they give the answers away"
    found = suggest(actions, None, items.select("item_id", "total", "size"), recipe="ranking")
    assert [f.name for f in found.schema.side("item") if f.name == "total"], "the recipe reads it"
    assert (line in " ".join(found.reasons)) == told
    assert not any("'size'" in reason for reason in found.reasons if line in reason)
    if noise:
        return
    means = suggest(actions, None, items.select("item_id", "liked"), recipe="ranking")
    assert any("'liked' of the items" in reason for reason in means.reasons if line in reason)
    few = suggest(actions, None, items.select("item_id", total=pl.col("n") // 200), recipe="ranking")
    assert line not in " ".join(few.reasons), "a few steps"
