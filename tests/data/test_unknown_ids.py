"""Ids of the interactions that no table of users or items has are added, dropped or refused, and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from worlds import CHECKERBOARD_SCHEMA, ID_FEATURES, checkerboard, settings

from twotower import api
from twotower.data.config import DataConfig
from twotower.data.prepare import write_prepared
from twotower.data.split import SplitConfig
from twotower.data.tables import Tables, check
from twotower.errors import DataError
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.store.store import Store

AGE = Numeric(name="age", side="user")
LOG = {"user_id": [30, 20, 10, 5, 20, 30], "item_id": [1, 2, 1, 2, 1, 3]}
USERS = {"user_id": [30, 10], "age": [3.0, 1.0]}
"""Users of the log but 5 and 20, who have 3 of its 6 interactions."""


def schema(users: str, *features: Any, **options: Any) -> Schema:
    return Schema(features=(*ID_FEATURES, *features), unknown_users=users, **options)


def test_unknown_ids_become_rows_without_features_after_the_known_ones() -> None:
    tables = check(USERS, None, LOG, schema("add", AGE))
    assert tables.users.rows() == [(30, 3.0), (10, 1.0), (5, None), (20, None)]
    assert tables.interactions["user_id"].to_list() == LOG["user_id"]
    assert tables.notes == [
        "users: 2 of 4 ids of 'user_id' were added from the interactions (the first: 5; 3 of 6 interactions), without "
        "features"
    ]


def test_interactions_of_unknown_ids_are_dropped_and_counted_for_each_side() -> None:
    both = schema("drop", AGE, unknown_items="drop")
    tables = check(USERS, {"item_id": [2, 1]}, LOG, both)
    assert tables.interactions.select("user_id", "item_id").rows() == [(30, 1), (10, 1)]
    assert tables.notes == [
        "interactions: 2 of 4 ids of 'user_id' are not in users (the first: 5); 3 of 6 interactions dropped",
        "interactions: 1 of 3 ids of 'item_id' are not in items (the first: 3); 1 of 6 interactions dropped",
    ]


@pytest.mark.parametrize("side", ["user", "item"])
def test_up_to_a_fifth_of_unknown_ids_is_added_and_more_is_refused(side: str) -> None:
    key = f"{side}_id"
    log = {"user_id": [*range(10)], "item_id": [*range(10)]}

    def checked(known: int, unknown: str = "auto") -> Tables:
        given = {f"{side}s": {key: [*range(known)]}}
        found = Schema(features=ID_FEATURES, **{f"unknown_{side}s": unknown})
        return check(given.get("users"), given.get("items"), log, found)

    assert getattr(checked(8), f"{side}s")[key].to_list() == [*range(10)]
    with pytest.raises(DataError) as caught:
        checked(7)
    assert str(caught.value) == (
        f"interactions: 3 of 10 ids of '{key}' are not in {side}s, more than a fifth (7 in interactions, 0 in "
        f"{side}s); spell the ids of both tables alike, or set schema.unknown_{side}s = 'add' or 'drop'"
    )
    assert len(checked(7, "add").interactions) == 10
    assert len(checked(7, "drop").interactions) == 7


def test_ids_that_only_look_alike_are_shown_in_both_spellings(tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("user_id\n010\n007\n012\n")
    (tmp_path / "clicks.csv").write_text("user_id,item_id\n7,1\n10,2\n8,1\n")
    with pytest.raises(DataError, match=r"\('10' in interactions, '010' in users\)"):
        check(tmp_path / "users.csv", None, tmp_path / "clicks.csv", schema("auto"))
    frames = pl.DataFrame({"user_id": ["010", "007"]}), pl.DataFrame({"user_id": [7, 10], "item_id": [1, 2]})
    with pytest.raises(DataError, match=r"users has String \('010'\) and interactions Int64 \(7\); give both the same"):
        check(frames[0], None, frames[1], schema("add"))


def test_a_feature_that_refuses_missing_values_refuses_unknown_ids_and_names_the_way_out() -> None:
    strict = AGE.model_copy(update={"missing": "error"})
    with pytest.raises(DataError) as caught:
        check(USERS, None, LOG, schema("add", strict))
    assert str(caught.value) == (
        "interactions: 2 of 4 ids of 'user_id' are not in users (the first: 5), so that 'age' is missing, and feature "
        "'age' has missing = 'error'; set missing = 'impute', or schema.unknown_users = 'drop'"
    )
    assert len(check(USERS, None, LOG, schema("drop", strict)).interactions) == 3
    assert len(check(USERS, None, LOG, schema("add", AGE)).interactions) == 6


def test_interactions_of_which_none_is_left_are_refused(tmp_path: Path) -> None:
    strangers = {"user_id": [1, 2]}
    with pytest.raises(DataError, match="no row has both an id of users and an id of items; give the tables of these"):
        check(strangers, None, LOG, schema("drop"))
    pl.DataFrame(LOG).write_parquet(tmp_path / "log.parquet")
    pl.DataFrame(strangers).write_parquet(tmp_path / "users.parquet")
    data = DataConfig(users=str(tmp_path / "users.parquet"), interactions=str(tmp_path / "log.parquet"))
    with pytest.raises(DataError, match="no row has both an id of users and an id of items"):
        write_prepared(data, schema("drop"), SplitConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_ids_of_a_log_meet_whole_numbers_of_a_csv_in_memory_and_prepared(tmp_path: Path) -> None:
    log = pl.DataFrame({"user_id": [f"{n % 8}" for n in range(64)] + ["guest"], "item_id": [n % 5 for n in range(65)]})
    log.write_parquet(tmp_path / "log.parquet")
    (tmp_path / "users.csv").write_text("user_id\n" + "".join(f"{n}\n" for n in range(8)))
    data = DataConfig(users=str(tmp_path / "users.csv"), interactions=str(tmp_path / "log.parquet"))
    memory = check(data.users, None, data.interactions, schema("auto"))
    disk = write_prepared(data, schema("auto"), SplitConfig(), tmp_path / "out")
    expected = [*map(str, range(8)), "guest"]
    assert memory.users["user_id"].to_list() == expected
    assert sorted(disk.users.ids) == sorted(expected)


IDS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12, unique=True)
TREATMENTS = st.sampled_from(["add", "drop"])


@examples(max_examples=30, deadline=None)
@given(IDS, st.permutations(range(6)), st.integers(2, 6), TREATMENTS, TREATMENTS)
def test_checking_unknown_ids_equals_a_loop(
    pairs: list[tuple[int, int]], order: list[int], n: int, users: str, items: str
) -> None:
    known = order[:n]
    kept = [(u, i) for u, i in pairs if (users == "add" or u in known) and (items == "add" or i in known)]
    frame = pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row")
    found = schema(users, unknown_items=items, duplicates="error")
    if not kept:
        with pytest.raises(DataError, match="no row has both"):
            check({"user_id": known}, {"item_id": known}, frame, found)
        return
    tables = check({"user_id": known}, {"item_id": known}, frame, found)
    assert tables.interactions.select("user_id", "item_id").rows() == kept
    for place, (side, treatment) in enumerate((("users", users), ("items", items))):
        strangers = sorted({pair[place] for pair in pairs} - {*known}) if treatment == "add" else []
        assert getattr(tables, side)[f"{side[:-1]}_id"].to_list() == known + strangers


def test_an_added_user_is_trained_and_served_as_others_are(tmp_path: Path) -> None:
    users, items, actions = checkerboard()
    absent = users["user_id"][3]
    known = users.filter(pl.col("user_id") != absent)
    run = api.fit((known, items, actions), CHECKERBOARD_SCHEMA, settings(), folder=tmp_path / "run")
    assert run.dataset.users.ids.to_list() == [*known["user_id"], absent]
    api.publish(run, tmp_path / "store", settings().index)
    retriever = Retriever(Store(tmp_path / "store").current())
    answers = {user: retriever.recommend(Request(user), 5, 2) for user in (str(absent), "nobody")}
    assert [answers[user].source for user in answers] == ["model", "popular"]
    assert answers[str(absent)].unknown == []
