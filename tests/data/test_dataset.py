"""What `prepare` learns comes from the train part alone, and sequences hold what a plain loop says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, ID_FEATURES, checkerboard, everything

from twotower.arrays.ragged import Ragged
from twotower.data.dataset import Dataset, assemble_dataset, build_dataset
from twotower.data.memmap import load_tables, save_tables
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import check
from twotower.errors import DataError
from twotower.features.encoders import Encoders
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence

SPLITS = [SplitConfig(), SplitConfig(kind="last"), SplitConfig(kind="time")]
SIDES: list[Literal["user", "item"]] = ["user", "item"]


def lists(ragged: Any) -> list[list[int]]:
    assert isinstance(ragged, Ragged)
    return [row.tolist() for row in np.split(ragged.values, ragged.offsets[1:-1])]


def sources(ragged: Any) -> list[list[int]]:
    assert isinstance(ragged, Ragged)
    assert ragged.source is not None
    return [row.tolist() for row in np.split(ragged.source, ragged.offsets[1:-1])]


def assert_same_columns(one: Dataset, other: Dataset) -> None:
    for side in SIDES:
        assert one.side(side).columns.keys() == other.side(side).columns.keys()
        for name, column in one.side(side).columns.items():
            again = other.side(side).columns[name]
            if isinstance(column, Ragged):
                assert lists(column) == lists(again), name
            else:
                np.testing.assert_array_equal(column, again, name)
    assert one.encoders.digest == other.encoders.digest


@pytest.mark.parametrize("config", SPLITS, ids=lambda c: c.kind)
def test_pairs_are_the_interactions_by_row(config: SplitConfig) -> None:
    users, items, actions = everything()
    data = build_dataset(check(users.sample(fraction=1, shuffle=True, seed=3), items, actions, EVERYTHING_SCHEMA),
                   EVERYTHING_SCHEMA, config)  # fmt: skip
    assert data.users.ids[data.pairs.user].to_list() == actions["uid"].to_list()
    assert data.items.ids[data.pairs.item].to_list() == actions["iid"].to_list()
    assert data.pairs.positive.tolist() == (actions["stars"] > 3).to_list()
    assert data.times.tolist() == (actions["when"] * 10**6).to_list()
    sizes = [len(data.train), len(data.validation), len(data.test)]
    assert sizes == np.bincount(data.parts).tolist()
    assert data.describe() == (
        f"60 users, 40 items, 1,200 interactions ({sizes[0]:,} train, {sizes[1]} validation, {sizes[2]} test)"
    )


@pytest.mark.parametrize("config", SPLITS, ids=lambda c: c.kind)
def test_what_validation_and_test_rows_say_changes_nothing_that_is_learnt(config: SplitConfig) -> None:
    users, items, actions = everything()
    before = build_dataset(check(users, items, actions, EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, config)
    held = pl.Series(before.parts != TRAIN)
    changed = actions.with_columns(stars=pl.when(held).then(6 - pl.col("stars")).otherwise("stars"))
    after = build_dataset(check(users, items, changed, EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, config)
    assert after.parts.tolist() == before.parts.tolist()
    assert (after.pairs.positive != before.pairs.positive)[before.parts != TRAIN].all()
    assert_same_columns(before, after)


def test_what_a_training_row_says_does_change_what_is_learnt() -> None:
    users, items, actions = everything()
    before = build_dataset(check(users, items, actions, EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, SplitConfig())
    one = int(np.flatnonzero(before.parts == TRAIN)[0])
    changed = actions.with_columns(
        stars=pl.when(pl.int_range(pl.len()) == one).then(6 - pl.col("stars")).otherwise("stars")
    )
    after = build_dataset(check(users, items, changed, EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, SplitConfig())
    row = before.pairs.item[one]
    for name in ("mean_stars", "fans"):
        old, new = before.items.columns[name], after.items.columns[name]
        if isinstance(old, Ragged):
            assert lists(old)[row] != lists(new)[row]
        else:
            assert old[row] != new[row]  # type: ignore[index]


def test_users_seen_only_in_held_out_rows_teach_nothing() -> None:
    users, items, actions = everything()
    late = ["u1", "u2", "u3"]
    actions = actions.with_columns(when=pl.col("when") + 10**6 * pl.col("uid").is_in(late))
    strange = users.with_columns(
        city=pl.when(pl.col("uid").is_in(late)).then(pl.lit("nowhere")).otherwise("city"),
        age=pl.when(pl.col("uid").is_in(late)).then(1e9).otherwise("age"),
        income=pl.when(pl.col("uid").is_in(late)).then(-1e9).otherwise("income"),
    )
    before, after = (
        build_dataset(check(u, items, actions, EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, SplitConfig(kind="time"))
        for u in (users, strange)
    )
    assert not before.users.ids[before.train.user].is_in(late).any()
    assert after.encoders.digest == before.encoders.digest
    assert (after.users.columns["uid"] == 0).tolist() == before.users.ids.is_in(late).to_list()  # type: ignore


@pytest.mark.parametrize("config", SPLITS, ids=lambda c: c.kind)
def test_statistics_equal_a_loop_over_the_train_part(config: SplitConfig) -> None:
    schema = Schema(
        user_id="uid", item_id="iid", label="stars", positive_above=3, time="when",
        features=(
            *(f for f in EVERYTHING_SCHEMA.features if f.name in ("uid", "iid")),
            Numeric(name="shown", side="item", statistic="count"),
            Numeric(name="stars", side="item", statistic="mean"),
            Numeric(name="paid", side="user", statistic="mean", statistic_column="price"),
        ),
    )  # fmt: skip
    users, items, actions = everything(n_items=120, n=250)
    prices = np.random.default_rng(0).random(250)
    prices[::7] = np.nan
    actions = actions.with_columns(price=pl.Series(prices))
    data = build_dataset(check(users, items, actions, schema), schema, config)
    rows = [r for r, part in zip(actions.rows(named=True), data.parts, strict=True) if part == TRAIN]
    of_item = [[r["stars"] for r in rows if r["iid"] == i] for i in items["iid"]]
    of_user = [[r["price"] for r in rows if r["uid"] == u and r["price"] == r["price"]] for u in users["uid"]]
    assert [] in of_item, "some item should be new, or the test says little"
    np.testing.assert_allclose(data.items.frame["__count:shown"], np.log1p([len(v) for v in of_item]))
    for found, values in ((data.items.frame["__mean:stars"], of_item), (data.users.frame["__mean:paid"], of_user)):
        np.testing.assert_allclose(found, [np.mean(v) if v else np.nan for v in values])


@pytest.mark.parametrize("max_length", [0, 1, 4])
@pytest.mark.parametrize("of", ["all", "positive", "negative"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("config", SPLITS, ids=lambda c: c.kind)
def test_sequences_equal_a_loop(config: SplitConfig, side: Any, of: Any, max_length: int) -> None:
    sequence = Sequence(name="history", side=side, interactions=of, max_length=max_length)
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": (*ID_FEATURES, sequence)})
    users, items, actions = checkerboard(8, 7)
    # Times that repeat and are not in the table's order.
    actions = actions.with_columns(at=pl.Series(np.random.default_rng(1).integers(0, 9, actions.height)))
    data = build_dataset(check(users, items, actions, schema), schema, config)
    own, other = ("user_id", "item_id") if side == "user" else ("item_id", "user_id")
    code = {v: n for n, v in enumerate(sorted(set(actions.filter(data.parts == TRAIN)[other])), 1)}
    rows = [
        (r["at"], n, r) for n, r in enumerate(actions.rows(named=True))
        if data.parts[n] == TRAIN and of in ("all", "positive" if r["liked"] else "negative")
    ]  # fmt: skip
    expected = [
        [(code[r[other]], n) for _, n, r in sorted(rows, key=lambda x: x[:2]) if r[own] == v][-max_length:]
        for v in data.side(side).ids
    ]
    found = data.side(side).columns["history"]
    assert lists(found) == [[c for c, _ in row] for row in expected]
    assert sources(found) == [[n for _, n in row] for row in expected]


@pytest.mark.parametrize("config", SPLITS, ids=lambda c: c.kind)
def test_a_sequence_reaches_up_to_the_part_that_is_asked_and_no_further(config: SplitConfig) -> None:
    """Test questions know train and validation where the parts follow one another in time; all else knows train."""
    extra = (
        Sequence(name="seen", side="user", max_length=6),
        Sequence(name="haters", side="item", interactions="negative", share_embedding=False),
    )
    schema = EVERYTHING_SCHEMA.model_copy(update={"features": (*EVERYTHING_SCHEMA.features, *extra)})
    data = build_dataset(check(*everything(), schema), schema, config)
    assert data.time_ordered is (config.kind != "random")
    before = {side: dict(data.side(side).columns) for side in SIDES}
    for part in (TRAIN, VALIDATION, TEST):
        may = {TRAIN, VALIDATION} if part == TEST and config.kind != "random" else {TRAIN}
        for side in SIDES:
            known = data.side_before(side, part)
            own = data.pairs.user if side == "user" else data.pairs.item
            assert known.frame is data.side(side).frame
            assert known.columns.keys() == data.side(side).columns.keys()
            for feature in schema.side(side):
                found = known.columns[feature.name]
                if not isinstance(feature, Sequence):
                    assert found is data.side(side).columns[feature.name]
                    continue
                right = [
                    feature.interactions == "all" or p == (feature.interactions == "positive")
                    for p in data.pairs.positive
                ]
                order = [i for i in np.argsort(data.times, kind="stable").tolist() if data.parts[i] in may and right[i]]
                wanted = [[i for i in order if own[i] == row][-feature.max_length :] for row in range(len(known))]
                assert sources(found) == wanted, (feature.name, part)
                assert len(may) == 1 or VALIDATION in {data.parts[i] for row in wanted for i in row}
    # Nothing of it stays.
    assert all(data.side(side).columns[n] is c for side in SIDES for n, c in before[side].items())
    empty = [f for f in schema.features if not isinstance(f, Sequence)]
    plain = schema.model_copy(update={"features": tuple(empty)})
    without = build_dataset(check(*everything(), plain), plain, config)
    assert without.side_before("user", TEST) is without.users


def test_a_saved_dataset_knows_whether_its_parts_follow_one_another(tmp_path: Path) -> None:
    for config in SPLITS:
        data = build_dataset(check(*everything(), EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, config)
        folder = tmp_path / config.kind
        folder.mkdir()
        save_tables(data, folder)
        again = load_tables(folder, EVERYTHING_SCHEMA, config)
        assert again.time_ordered is data.time_ordered is (config.kind != "random")
        assert_same_columns(data, again)
        for side in SIDES:
            a, b = data.side_before(side, TEST), again.side_before(side, TEST)
            for name, column in a.columns.items():
                if isinstance(column, Ragged) and column.source is not None:
                    assert sources(column) == sources(b.columns[name])


def test_without_times_a_sequence_keeps_the_tables_order() -> None:
    schema = CHECKERBOARD_SCHEMA.model_copy(
        update={"time": "", "features": (*ID_FEATURES, Sequence(name="history", side="user"))}
    )
    data = build_dataset(check(*checkerboard(), schema), schema, SplitConfig())
    assert data.times.tolist() == list(range(len(data.pairs)))
    assert all(row == sorted(row) for row in sources(data.users.columns["history"]))


def test_encoded_again_from_its_parts_a_dataset_is_the_same(everything_data: Dataset, tmp_path: Path) -> None:
    d = everything_data
    d.encoders.save(tmp_path)
    again = assemble_dataset(Encoders.load(d.schema, tmp_path), d.users.frame, d.items.frame, d.pairs, d.parts, d.times)
    assert_same_columns(d, again)


def test_the_tables_order_of_users_and_items_is_kept_and_those_without_interactions_stay() -> None:
    users = pl.DataFrame({"user_id": [5, 3, 9, 1]})
    actions = {"user_id": [1, 3, 5, 1, 3, 5], "item_id": [1, 2, 3, 2, 3, 1]}
    schema = Schema(features=ID_FEATURES)
    data = build_dataset(check(users, None, actions, schema), schema, SplitConfig())
    assert data.users.ids.to_list() == [5, 3, 9, 1]
    assert data.users.columns["user_id"][2] == 0  # type: ignore[index]


def test_an_item_without_a_title_shows_its_id() -> None:
    schema = Schema(title="name", features=ID_FEATURES)
    items = {"item_id": [7, 8, 9], "name": ["Heat", None, "漢"]}
    actions = {"user_id": [1, 2, 3, 1, 2, 3], "item_id": [7, 8, 9, 8, 9, 7]}
    assert build_dataset(check(None, items, actions, schema), schema, SplitConfig()).titles() == ["Heat", "8", "漢"]


def test_a_train_part_without_positives_is_refused(board: Dataset) -> None:
    parts = np.where(board.pairs.positive, TEST, TRAIN).astype(np.int8)
    parts[np.flatnonzero(board.pairs.positive)[:3]] = VALIDATION
    with pytest.raises(DataError, match="no positive interaction in the train part; there is nothing to learn from"):
        assemble_dataset(board.encoders, board.users.frame, board.items.frame, board.pairs, parts, board.times)
