"""Versions of users and items: an interaction sees the row of its own time, never a later one."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from version_worlds import CHANGING_SCHEMA, CITY_SCHEMA, changing, leaking_city
from worlds import EVERYTHING_SCHEMA, everything

from twotower.arrays.ragged import Ragged
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.memmap import load_tables, save_tables
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST
from twotower.data.tables import check
from twotower.data.versions import BEGINNING, ROW, SINCE, Versions
from twotower.errors import DataError, RunError
from twotower.evaluation.moments import users_during
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.files import layout


@pytest.fixture(scope="module")
def data() -> Dataset:
    return build_dataset(check(*changing(), CHANGING_SCHEMA), CHANGING_SCHEMA, Config().split)


def versions_of(data: Dataset, side: Any) -> Versions:
    versions = data.side(side).versions
    assert versions is not None
    return versions


def test_the_version_of_a_time_is_the_latest_that_is_not_later() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    since = np.concatenate(
        [np.r_[BEGINNING, np.sort(rng.choice(50, (rows == r).sum() - 1, replace=False))] for r in range(30)]
    )
    versions = Versions(pl.DataFrame({ROW: rows, SINCE: since}))
    asked, times = rng.integers(0, 30, 500).astype(np.int32), rng.integers(-1, 51, 500)
    for row, time, found in zip(asked.tolist(), times.tolist(), versions.at(asked, times).tolist(), strict=True):
        assert found == max(v for v in range(len(rows)) if rows[v] == row and since[v] <= time)


@pytest.mark.parametrize("side", SIDES)
def test_each_interaction_reads_the_features_of_its_own_time(data: Dataset, side: Any) -> None:
    """Against a loop over the rows of the table; the row of an interaction before the first has its id alone."""
    given = changing()[SIDES.index(side)]
    key, column = data.schema.id_column(side), {"user": "age", "item": "picture"}[side]
    rows = data.pairs.user if side == "user" else data.pairs.item
    found = data.input_rows(side, rows, np.arange(len(rows)))
    early = 0
    frame = versions_of(data, side).frame
    for at in range(0, len(rows), 7):
        own = given.filter(pl.col(key) == data.side(side).ids[int(rows[at])])
        known = own.filter(pl.col("since") * 1_000_000 <= int(data.times[at])).sort("since")
        read = frame.row(int(found[at]), named=True)
        assert read[key] == own[key][0]
        assert read[column] == (known[column].to_list()[-1] if known.height else None)
        early += not known.height
    assert early > 3
    assert np.array_equal(data.input_rows(side, rows, ~np.arange(len(rows))), found), (
        "a pair drawn beside an interaction"
    )


def test_a_side_is_the_newest_version_of_each_id(data: Dataset) -> None:
    for side, given in zip(SIDES, changing()[:2], strict=True):
        key, of_side = data.schema.id_column(side), data.side(side)
        newest = given.sort("since").group_by(key).last()
        assert of_side.frame.select(newest.columns).sort(key).equals(newest.sort(key), null_equal=True)
        versions = versions_of(data, side)
        assert len(versions) == given.height + len(of_side)
        for name, column in versions.columns.items():
            own, last = of_side.columns[name], versions.offsets[1:] - 1
            if isinstance(column, Ragged):
                assert isinstance(own, Ragged)
                assert np.array_equal(column.take(last).values, own.values)
            else:
                assert not isinstance(own, Ragged)
                assert np.array_equal(column[last], own)


def test_encoders_learn_from_the_versions_that_training_sees() -> None:
    """A city before the first or after the last training interaction is unknown; means are of seen versions."""
    day = 1_600_000_000
    users = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 2, 2],
            "city": ["never seen", "a", "too late", "b", "too late"],
            "age": [1000.0, 20.0, 1000.0, 40.0, 1000.0],
            "since": [day, day + 10, day + 90, day, day + 90],
        }
    )
    actions = pl.DataFrame(
        {
            "user_id": [1, 1, 2, 2, 1, 2],
            "item_id": [1, 2, 1, 2, 3, 3],
            "at": [day + t for t in (20, 30, 40, 50, 95, 96)],
        }
    )
    features = (
        Categorical(name="city", side="user"),
        Numeric(name="age", side="user"),
        Categorical(name="item_id", side="item"),
    )
    schema = Schema(time="at", valid_from="since", features=features)
    data = build_dataset(check(users, None, actions, schema), schema, SplitConfig(kind="time", test=0.3, validation=0))
    assert data.encoders.by_side["user"]["city"].stored_vocabulary().to_list() == ["a", "b"]  # type: ignore[union-attr]
    seen = versions_of(data, "user").columns["city"]
    assert isinstance(seen, np.ndarray)
    assert seen[data.input_rows("user", data.pairs.user, np.arange(6))].tolist() == [1, 1, 2, 2, 0, 0]
    standard = data.encoders.by_side["user"]["age"].transform(pl.Series("age", [30.0]))
    assert np.asarray(standard).ravel()[0] == pytest.approx(0, abs=1e-6), "30 is the mean of what training sees"


def test_statistics_are_those_of_all_versions_of_a_row(data: Dataset) -> None:
    versions = versions_of(data, "item")
    source = next(s.source for s in data.schema.statistics("item"))
    assert versions.frame[source].to_list() == data.items.frame[source].gather(versions.owners).to_list()


def test_tables_without_versions_of_either_side_may_stand_beside_those_with() -> None:
    users, _, actions = changing()
    one = check(users, everything()[1], actions, CHANGING_SCHEMA)
    assert set(one.versions) == {"user"}
    assert [n for n in one.notes if "since" in n] == [
        f"users: {users.height:,} versions of 60 ids, by 'since'",
        "items: no column 'since'; each row always holds",
    ]
    features = (Categorical(name="city", side="user"), Categorical(name="iid", side="item"))
    schema = Schema(user_id="uid", item_id="iid", time="when", valid_from="since", features=features)
    built = build_dataset(check(users, None, actions, schema), schema, Config().split)
    assert built.items.versions is None
    assert built.users.versions is not None


def test_times_are_read_as_those_of_the_interactions(tmp_path: Path) -> None:
    """Seconds, datetimes and text of one moment are one version, from frames and from CSV."""
    users, items, actions = changing()
    expected = check(users, items, actions, CHANGING_SCHEMA).versions["user"]["__time"]
    dated = users.with_columns(pl.from_epoch("since", time_unit="s"))
    text = users.with_columns(pl.from_epoch("since", time_unit="s").dt.strftime("%Y-%m-%d %H:%M:%S"))
    text.write_csv(tmp_path / "users.csv")
    for given in (dated, text, tmp_path / "users.csv"):
        assert check(given, items, actions, CHANGING_SCHEMA).versions["user"]["__time"].equals(expected)


def test_an_id_that_the_table_lacks_has_one_version_without_features() -> None:
    users, items, actions = changing()
    data = build_dataset(
        check(users.filter(pl.col("uid") != "u7"), items, actions, CHANGING_SCHEMA), CHANGING_SCHEMA, Config().split
    )
    row = data.users.ids.to_list().index("u7")
    of_row = versions_of(data, "user").frame.filter(pl.col(ROW) == row)
    assert of_row.select("uid", SINCE, "city").rows() == [("u7", BEGINNING, None)]


def users_of(*rows: tuple[Any, ...]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["user_id", "city", "since"], orient="row")


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (
            users_of((1, "a", datetime(2020, 1, 1)), (1, "b", datetime(2020, 1, 1)), (2, "a", datetime(2020, 1, 1))),
            "users: 1 rows repeat an id of 'user_id' and its 'since' (the first: 1, 2020-01-01 00:00:00), so that two "
            "versions hold at once; drop one of them",
        ),
        (
            users_of((1, "a", None), (1, "b", None), (2, "b", datetime(2020, 1, 1))),
            "users: 1 rows repeat an id of 'user_id' and its 'since' (the first: 1, None), so that two versions hold "
            "at once; drop one of them",
        ),
        (
            users_of((1, "a", datetime(1900, 1, 1)), (2, "b", datetime(2020, 1, 1))),
            "users: time 'since': 1 of 2 times are not between 1990 and tomorrow (the first, in row 1: 1900-01-01 "
            "00:00:00); 50 % look like dates since 1990, 50 % like times before 1990: give 'since' as "
            "schema.time (unit 's') or as dates, and leave it empty in rows that always held",
        ),
        (
            users_of((1, "a", 1_600_000_000_000), (2, "b", 1_600_000_000_000)),
            "users: time 'since': 2 of 2 times are not between 1990 and tomorrow in unit 's' (the first, in row 1: "
            "1600000000000); all look like milliseconds: give 'since' as schema.time (unit 's') or as dates, and "
            "leave it empty in rows that always held",
        ),
        (
            users_of((1, "a", 5), (2, "b", 6)),
            "users: time 'since': 2 of 2 times are not between 1990 and tomorrow in unit 's' (the first, in row 1: "
            "5); all look like no unit of time: give 'since' as schema.time (unit 's') or as dates, and leave it "
            "empty in rows that always held",
        ),
        (
            users_of((1, "a", 5), (2, "b", 6)).drop("since"),
            "schema.valid_from names column 'since', and neither users nor items have it; name their time column, or "
            "leave it out",
        ),
    ],
)  # fmt: skip
def test_fault_C17_versions_that_cannot_be_used_are_one_line(users: pl.DataFrame, message: str) -> None:
    _, items, actions = leaking_city(3)
    with pytest.raises(DataError) as e:
        check(users, items, actions, CITY_SCHEMA.model_copy(update={"unknown_users": "add"}))
    assert str(e.value) == message


def test_fault_C17_overlapping_versions_are_refused_whatever_is_done_with_repeated_ids() -> None:
    users, items, actions = leaking_city(5)
    for duplicates in ("last", "keep", "error"):
        with pytest.raises(DataError, match="two versions hold at once"):
            check(pl.concat([users, users]), items, actions, CITY_SCHEMA.model_copy(update={"duplicates": duplicates}))


def test_a_feature_that_refuses_missing_values_refuses_interactions_before_the_first_version() -> None:
    users, items, actions = leaking_city(8)
    city = Categorical(name="city", side="user", missing="error")
    schema = CITY_SCHEMA.model_copy(update={"features": (city, *CITY_SCHEMA.features[1:])})
    build_dataset(check(users, items, actions, schema), schema, Config().split)
    late = users.filter((pl.col("user_id") != 2) | (pl.col("since") > datetime(2021, 1, 1)))
    with pytest.raises(DataError) as e:
        build_dataset(check(late, items, actions, schema), schema, Config().split)
    assert str(e.value) == (
        "interactions: 4 rows are older than the first version of their user (the first: 2), so that 'city' is "
        "missing, and feature 'city' has missing = 'error'; set missing = 'impute', or give earlier versions"
    )


def test_a_row_without_a_time_always_held(tmp_path: Path) -> None:
    """From frames and from CSV, as dates and as numbers; also where no row has a time."""
    _, items, actions = leaking_city(3)
    users = users_of(
        (0, "late", datetime(2020, 6, 1)), (0, "always", None), (1, "b", datetime(2020, 1, 1)), (2, "c", None)
    )
    expected = [
        (0, BEGINNING, "always"),
        (0, 1_590_969_600_000_000, "late"),
        (1, BEGINNING, None),
        (1, 1_577_836_800_000_000, "b"),
        (2, BEGINNING, "c"),
    ]
    seconds = users.with_columns(pl.col("since").dt.epoch("s"))
    users.write_csv(tmp_path / "users.csv")
    city = Categorical(name="city", side="user", missing="error")
    for given in (
        users,
        seconds,
        seconds.with_columns(pl.col("since").cast(pl.Float64).fill_null(np.nan)),
        tmp_path / "users.csv",
    ):
        tables = check(given, items, actions, CITY_SCHEMA)
        data = build_dataset(tables, CITY_SCHEMA, Config().split)
        assert versions_of(data, "user").frame.select(ROW, SINCE, "city").rows() == expected
        assert data.users.frame["city"].to_list() == ["late", "b", "c"]
    save_tables(data, tmp_path)
    assert load_tables(tmp_path, CITY_SCHEMA, Config().split).digest == data.digest
    schema = CITY_SCHEMA.model_copy(update={"features": (city, *CITY_SCHEMA.features[1:])})
    always = users_of(*((u, f"c{u}", None) for u in range(3)))
    for empty in (always, always.with_columns(pl.lit(None).alias("since"))):
        data = build_dataset(check(empty, items, actions, schema), schema, Config().split)
        assert versions_of(data, "user").frame.select(ROW, SINCE, "city").rows() == [
            (u, BEGINNING, f"c{u}") for u in range(3)
        ]
    late = check(users_of((0, "a", None), (1, "b", datetime(2022, 1, 1)), (2, "c", None)), items, actions, schema)
    with pytest.raises(DataError, match=r"4 rows are older than the first version of their user \(the first: 1\)"):
        build_dataset(late, schema, Config().split)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": ""}, "valid_from needs time; name the time column in schema.time"),
        ({"time_unit": "order"}, "valid_from and time_unit = 'order' exclude each other"),
        ({"valid_from": "user_id"}, "user_id and valid_from are both 'user_id'"),
        ({"valid_from": "__since"}, "names that begin with '__' are the package's own"),
    ],
)
def test_a_schema_without_comparable_times_has_no_versions(options: dict[str, str], message: str) -> None:
    given = CITY_SCHEMA.model_dump()
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Schema.model_validate(given | options)


def test_versions_are_written_and_read_with_the_tables_of_a_run(data: Dataset, tmp_path: Path) -> None:
    users, items, actions = changing()
    more = build_dataset(
        check(users.with_columns(shoes=pl.int_range(pl.len())), items, actions, CHANGING_SCHEMA),
        CHANGING_SCHEMA,
        Config().split,
    )
    save_tables(more, tmp_path)
    again = load_tables(tmp_path, CHANGING_SCHEMA, Config().split)
    assert users_during(again, TEST)["shoes"].equals(users_during(more, TEST)["shoes"]), (
        "a column that no feature reads"
    )
    assert not users_during(again, TEST)["shoes"].equals(again.users.frame["shoes"])
    save_tables(data, tmp_path)
    again = load_tables(tmp_path, CHANGING_SCHEMA, Config().split)
    assert again.digest == data.digest
    for side in SIDES:
        assert np.array_equal(versions_of(again, side).since, versions_of(data, side).since)
    for side in SIDES:
        (tmp_path / layout.versions(side)).unlink()
    with pytest.raises(RunError, match="user_versions"):
        load_tables(tmp_path, CHANGING_SCHEMA, Config().split)
    newest = load_tables(tmp_path, CHANGING_SCHEMA, Config().split, newest=True)
    assert not newest.has_versions
    assert newest.digest != data.digest
    save_tables(data, tmp_path)
    save_tables(build_dataset(check(*everything(), EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, Config().split), tmp_path)
    assert not [p.name for p in tmp_path.iterdir() if "versions" in p.name], "those of an earlier training are gone"


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.drop(SINCE),
        lambda t: t.drop("city"),
        lambda t: t.with_columns(pl.col(SINCE).cast(pl.Float64)),
        lambda t: t.reverse(),
        lambda t: t.filter(pl.col(ROW) < 59),
        lambda t: t.filter(pl.col(SINCE) > BEGINNING),
        lambda t: pl.concat([t, t.tail(1).with_columns(pl.col(ROW) + 1)]),
    ],
)
def test_fault_C17_a_damaged_table_of_versions_is_one_line(data: Dataset, tmp_path: Path, damage: Any) -> None:
    save_tables(data, tmp_path)
    path = tmp_path / layout.versions("user")
    damage(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(RunError, match="user_versions.parquet"):
        load_tables(tmp_path, CHANGING_SCHEMA, Config().split)


def test_the_digest_depends_on_the_versions() -> None:
    users, items, actions = leaking_city(20)
    other = users.with_columns(pl.col("since").dt.offset_by("1d"))
    digests = {
        build_dataset(check(u, items, actions, CITY_SCHEMA), CITY_SCHEMA, Config().split).digest
        for u in (users, users.reverse(), other)
    }
    assert len(digests) == 3, "rows are numbered by the order of the ids"
