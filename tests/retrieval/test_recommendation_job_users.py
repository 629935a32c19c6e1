"""Tables of users as files: types of a CSV are those of the bundle."""

from __future__ import annotations

import gc
import gzip
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from messages import collected_messages
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

import twotower
from twotower import api
from twotower.errors import DataError
from twotower.features.categorical import Categorical
from twotower.retrieval.batches import recommend_batch
from twotower.retrieval.recommendation_job import UserTable
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    """A bundle whose ids are integers, and whose users have a column of booleans."""
    folder = tmp_path_factory.mktemp("numbered")
    users, items, actions = checkerboard()
    users = users.with_columns(member=pl.col("user_id") % 3 == 0)
    schema = CHECKERBOARD_SCHEMA.model_copy(
        update={"features": (*CHECKERBOARD_SCHEMA.features, Categorical(name="member", side="user"))}
    )
    some = actions.filter(pl.col("item_id") % 4 > 0)
    twotower.publish(
        twotower.fit((users, items, some), schema, settings(), folder=folder / "run"), folder / "store", force=True
    )
    return api.retriever(folder / "store")


def read(path: Path, retriever: Retriever) -> pl.DataFrame:
    table = UserTable(path, retriever, 2)
    frame = pl.concat([table.read(shard) for shard in table.shards(7)])
    return frame.with_columns(pl.col("user_id").cast(table.id_type))


@pytest.mark.parametrize("nulls", [(True,), (True, True), (True, False), (False, True)])
def test_a_column_of_nulls_gives_nothing(numbered: Retriever, tmp_path: Path, nulls: tuple[bool, ...]) -> None:
    """`nulls` says of each file of a table if its columns have no type."""
    (tmp_path / "t").mkdir()
    parts = []
    for n, is_null in enumerate(nulls):
        typed = {"member": pl.lit(n % 2 == 0), "history": pl.lit([3])}
        part = pl.DataFrame({"user_id": [n, 20 + n]})
        part = part.with_columns(**dict.fromkeys(typed, pl.lit(None)) if is_null else typed)
        part.write_parquet(tmp_path / "t" / f"{n}.parquet")
        parts.append(part)
    frame = read(tmp_path / "t", numbered)
    assert frame.columns == ["user_id", "member", "history"]
    expected = [recommend_batch(numbered, part, 4, 2) for part in parts]
    assert recommend_batch(numbered, frame, 4, 2).drop("score").equals(pl.concat(expected).drop("score"))


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_csv_has_the_types_of_the_bundle(
    numbered: Retriever, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    users = pl.DataFrame({"user_id": [*range(20), 99], "member": [None, True, False] * 7, "more": [1.5] * 21})
    users.write_parquet(tmp_path / "t.parquet")
    text = users.write_csv().encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    table = UserTable(tmp_path / name, numbered, 2)
    assert len([table.read(shard) for shard in table.shards(7)]) == 3
    assert len(list((tmp_path / "scratch").rglob("*.parquet"))) == 1, "the CSV is read once, and its copy by shards"
    del table
    gc.collect()
    assert not list((tmp_path / "scratch").iterdir()), "the copy goes with the table"
    typed, parsed = (read(tmp_path / n, numbered) for n in ("t.parquet", name))
    assert parsed.equals(typed)
    assert parsed.schema == {"user_id": pl.Int64, "member": pl.Boolean}
    answers = [recommend_batch(numbered, frame, 4, 2) for frame in (typed, parsed)]
    assert answers[0].drop("score").equals(answers[1].drop("score"))
    np.testing.assert_allclose(answers[0]["score"], answers[1]["score"], atol=1e-6)
    without = recommend_batch(numbered, typed.drop("member"), 4, 2)
    assert not without["score"].equals(answers[0]["score"])


def test_one_copy_of_a_text_file_is_there_at_a_time(
    tmp_path: Path, numbered: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the temporary folder, which may be in memory, holds the whole table in the end."""
    (tmp_path / "t").mkdir()
    for name, ids in (("a", [1, 2]), ("b", [3, 4]), ("c", [5])):
        pl.DataFrame({"user_id": ids}).write_csv(tmp_path / "t" / f"{name}.csv")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    table = UserTable(tmp_path / "t", numbered)
    found = list[str]()
    for shard in table.shards(1):
        found.extend(table.read(shard)["user_id"])
        assert len(list((tmp_path / "scratch").rglob("*.parquet"))) == 1
    assert found == ["1", "2", "3", "4", "5"]


ODD = ["abc", "007", "7.0", "+7", " 7", "99999999999999999999"]
"""Ids that a bundle of whole numbers could not have."""


def answers(numbered: Retriever, table: Path, out: Path, **options: Any) -> pl.DataFrame:
    """Run the job with shards of two users; return its answers."""
    store = numbered.bundle.folder.parents[1]
    api.recommend_users(store, table, out, k=2, shard_rows=2, threads=1, **options)
    return pl.read_parquet(out / "part-*.parquet")


def written(path: Path, ids: list[str]) -> Path:
    path.write_text("user_id\n" + "".join(f"{i}\n" for i in ids), encoding="utf-8")
    return path


@pytest.mark.parametrize("odd", ODD)
def test_an_id_of_a_csv_that_the_bundle_could_not_have_is_unknown_to_it(
    numbered: Retriever, tmp_path: Path, odd: str
) -> None:
    table = written(tmp_path / "t.csv", ["1", "2", "3", odd])
    found = answers(numbered, table, tmp_path / "popular")
    assert found["user_id"].to_list() == [i for i in ("1", "2", "3", odd) for _ in range(2)]
    assert found["source"].to_list() == ["model"] * 6 + ["popular"] * 2
    dropped = answers(numbered, table, tmp_path / "drop", unknown="drop")
    assert dropped["user_id"].to_list() == [1, 1, 2, 2, 3, 3], "whole numbers, as nobody else gets an answer"
    with pytest.raises(
        DataError, match=rf"user '{re.escape(odd)}' is not among the \d+ users of this bundle; set"
    ) as e:
        answers(numbered, table, tmp_path / "error", unknown="error")
    assert "\n" not in str(e.value)


def test_one_odd_id_makes_the_ids_of_all_shards_text(numbered: Retriever, tmp_path: Path) -> None:
    """Shards of two types would not be one table."""
    written(tmp_path / "1.csv", ["1", "2", "3"])
    written(tmp_path / "2.csv", ["5", "4", "007", "1"])
    with collected_messages() as lines:
        found = answers(numbered, tmp_path / "*.csv", tmp_path / "text")
    assert "the id '007' is no Int64, as those of the bundle are; the answers have String" in "\n".join(lines)
    assert found["user_id"].to_list() == [i for i in ("1", "2", "3", "5", "4", "007", "1") for _ in range(2)]
    numbers = answers(numbered, tmp_path / "1.csv", tmp_path / "numbers")
    assert numbers["user_id"].to_list() == [1, 1, 2, 2, 3, 3]
    kept = answers(numbered, tmp_path / "*.csv", tmp_path / "kept", unknown="drop", method=2)
    assert kept["user_id"].dtype == pl.String, "by method 2 a user whom the table describes gets an answer"
    with pytest.raises(DataError, match="user '007' is not among"):
        answers(numbered, tmp_path / "*.csv", tmp_path / "error", unknown="error")


def test_a_csv_beside_parquet_has_the_types_of_parquet(numbered: Retriever, tmp_path: Path) -> None:
    written(tmp_path / "a.csv", ["1", "2"])
    pl.DataFrame({"user_id": ["3", "x"]}).write_parquet(tmp_path / "b.parquet")
    found = answers(numbered, tmp_path / "[ab].*", tmp_path / "out")
    assert found["user_id"].to_list() == [i for i in "123x" for _ in range(2)]


def test_files_of_other_columns_are_refused(numbered: Retriever, tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"user_id": [2], "member": [True]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: column 'member' is not in a\.parquet; give all files the same"):
        UserTable(tmp_path, numbered, 2)
    assert UserTable(tmp_path, numbered, 1).rows == 2


def test_files_with_other_types_of_a_column_are_answered_as_one_table(numbered: Retriever, tmp_path: Path) -> None:
    users = pl.DataFrame({"user_id": [*range(9)], "member": [True, None, False] * 3})
    for name, older in {
        "today": {},
        "years": {"user_id": pl.col("user_id").cast(pl.Int16), "member": pl.lit(None)},
    }.items():
        (tmp_path / name).mkdir()
        users[:4].with_columns(member=pl.lit(None, pl.Boolean)).with_columns(**older).write_parquet(
            tmp_path / name / "a.parquet"
        )
        users[4:].write_parquet(tmp_path / name / "b.parquet")
    found, expected = (read(tmp_path / name, numbered) for name in ("years", "today"))
    assert found.equals(expected)
    assert found.schema == expected.schema == {"user_id": pl.Int64, "member": pl.Boolean}
    for name in ("today", "years"):
        answers(numbered, tmp_path / name, tmp_path / f"{name}.out", method=2)
    first, second = (pl.read_parquet(tmp_path / f"{name}.out" / "part-*.parquet") for name in ("today", "years"))
    assert first.equals(second)
    users.select("user_id").write_parquet(tmp_path / "years" / "c.parquet")
    with pytest.raises(
        DataError, match=r"c\.parquet: no column 'member', which a\.parquet has; give all files the same"
    ):
        UserTable(tmp_path / "years", numbered, 2)
