"""Tables of users as files: types of a CSV are those of the bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

import twotower
from twotower import api
from twotower.errors import DataError
from twotower.features.categorical import Categorical
from twotower.retrieval.batches import recommend_batch
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.user_table import UserTable


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


def read(path: Path, retriever: Retriever, scratch: Path) -> pl.DataFrame:
    table = UserTable(path, retriever, 2)
    return pl.concat([table.read(shard, scratch) for shard in table.shards(7)])


def test_a_csv_has_the_types_of_the_bundle(numbered: Retriever, tmp_path: Path) -> None:
    users = pl.DataFrame({"user_id": [*range(20), 99], "member": [None, True, False] * 7, "more": [1.5] * 21})
    users.write_parquet(tmp_path / "t.parquet")
    users.write_csv(tmp_path / "t.csv")
    typed, parsed = (read(tmp_path / name, numbered, tmp_path) for name in ("t.parquet", "t.csv"))
    assert parsed.equals(typed)
    assert parsed.schema == {"user_id": pl.Int64, "member": pl.Boolean}
    assert (tmp_path / "0.parquet").exists(), "the CSV is read once, and its copy by shards"
    answers = [recommend_batch(numbered, frame, 4, 2) for frame in (typed, parsed)]
    assert answers[0].drop("score").equals(answers[1].drop("score"))
    np.testing.assert_allclose(answers[0]["score"], answers[1]["score"], atol=1e-6)
    without = recommend_batch(numbered, typed.drop("member"), 4, 2)
    assert not without["score"].equals(answers[0]["score"])


@pytest.mark.parametrize("bad", ["007", "x1", "7.0", "99999999999999999999"])
def test_an_id_of_a_csv_that_the_bundle_could_not_have_is_refused(
    numbered: Retriever, tmp_path: Path, bad: str
) -> None:
    """No user of the bundle is spelled so, and the column of ids in the answers could not hold it."""
    (tmp_path / "t.csv").write_text(f"user_id,member\n1,true\n{bad},false\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"t\.csv: the id '{bad}' of column 'user_id' is no Int64, as the ids of the"):
        read(tmp_path / "t.csv", numbered, tmp_path)
    frame = pl.DataFrame({"user_id": ["1", bad]})
    assert recommend_batch(numbered, frame, 2)["source"].to_list() == ["model"] * 2 + ["popular"] * 2


def test_files_of_other_columns_are_refused(numbered: Retriever, tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"user_id": [2], "member": [True]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: column 'member' is not in a\.parquet; give all files the same"):
        UserTable(tmp_path, numbered, 2)
    assert UserTable(tmp_path, numbered, 1).rows == 2
