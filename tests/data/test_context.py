"""The context of interactions in a dataset, in memory and prepared, against plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from context_worlds import HOUR, IDS, flat, hourly, hourly_schema
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from version_worlds import CHANGING_SCHEMA, changing

from twotower.arrays.ragged import Column, Ragged, Values
from twotower.arrays.types import UserRow
from twotower.data import memmap
from twotower.data.config import DataConfig
from twotower.data.context import default_context, distinct_contexts, times_before
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.prepare import write_prepared
from twotower.data.prepare.options import PrepareOptions
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import ConfigError, DataError, RunError
from twotower.features.categorical import Categorical
from twotower.features.day_of_week import DayOfWeek
from twotower.features.days_since_previous import DaysSincePrevious
from twotower.features.feature import Feature
from twotower.features.hour_of_day import HourOfDay
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.text import Text
from twotower.features.vector import Vector
from twotower.retrieval.query import Query
from twotower.retrieval.request import Request
from twotower.retrieval.user_inputs import ContextValues

MOMENTS = (
    HourOfDay(name="local_hour", time_zone="Europe/Zurich"),
    DayOfWeek(name="day"),
    DaysSincePrevious(name="since", edges=(0.001, 0.01)),
)
COLUMNS = (
    HOUR,
    MultiHot(name="tags", side="context"),
    Text(name="query", side="context"),
    Numeric(name="price", side="context"),
    Vector(name="place", side="context"),
)


def rich(n: int = 300) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """The hourly world with columns of every kind."""
    users, items, actions = hourly(n)
    rng = np.random.default_rng(1)
    price, some = rng.integers(1, 50, n), rng.integers(0, 4, n)
    return (
        users,
        items,
        actions.with_columns(
            tags=pl.Series([[f"t{x}" for x in range(k)] for k in some]),
            query=pl.Series([("red shoe", "blue sky", None, "x")[k] for k in some]),
            price=pl.Series(price.astype(float)),
            place=pl.Series([[1.0, float(k)] for k in some]),
        ),
    )


def rows_of(column: Column) -> list[Any]:
    if isinstance(column, Ragged):
        return [column.row(r).tolist() for r in range(len(column))]
    return [np.round(v, 5).tolist() for v in column]


def by_interaction(data: Dataset) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Part and encoded context of each interaction, by user, item and time."""
    context = [rows_of(data.context[f.name]) for f in data.schema.side("context")]
    users, items = data.users.ids.to_list(), data.items.ids.to_list()
    keys = zip(data.pairs.user.tolist(), data.pairs.item.tolist(), data.times.tolist(), strict=True)
    values = zip(data.parts.tolist(), *context, strict=True)
    return {(users[u], items[i], t): v for (u, i, t), v in zip(keys, values, strict=True)}


def prepare(
    folder: Path,
    tables: tuple[pl.DataFrame, ...],
    schema: Any,
    split: SplitConfig,
    options: PrepareOptions | None = None,
) -> Dataset:
    names = ("users", "items", "interactions")
    for name, frame in zip(names, tables, strict=True):
        frame.write_parquet(folder / f"{name}.parquet")
    paths = {name: str(folder / f"{name}.parquet") for name in names}
    return write_prepared(DataConfig(**paths), schema, split, folder / "prepared", options)


@pytest.mark.parametrize("features", [(*COLUMNS, *MOMENTS), MOMENTS], ids=["all", "times"])
@pytest.mark.parametrize("split", [{"kind": "time", "gap": 600}, {"kind": "last"}], ids=["gap", "last"])
def test_prepared_context_is_that_of_memory(features: Any, split: Any, tmp_path: Path) -> None:
    schema, config = hourly_schema(*features), SplitConfig(**split)
    memory = build_dataset(check(*rich(), schema), schema, config)
    disk = prepare(tmp_path, rich(), schema, config, PrepareOptions(bucket_rows=60, piece_rows=70))
    assert by_interaction(disk) == by_interaction(memory)
    words = [{n: v.to_list() for n, v in d.encoders._vocabularies().items()} for d in (disk, memory)]
    assert words[0] == words[1]
    for part in range(3):
        kept = memory.part_indices(part)
        assert (memory.parts[kept] == part).all()
        assert (disk.parts[disk.part_indices(part)] == part).all()
        assert len(disk.part_indices(part)) == len(kept)


def test_prepared_context_goes_with_versions(tmp_path: Path) -> None:
    features = (*CHANGING_SCHEMA.features, HourOfDay(name="hour"))
    schema = CHANGING_SCHEMA.model_copy(
        update={"features": tuple(f for f in features if f.history is None or f.side == "user")}
    )
    memory = build_dataset(check(*changing(), schema), schema, SplitConfig())
    disk = prepare(tmp_path, changing(), schema, SplitConfig())
    assert disk.has_versions
    assert by_interaction(disk) == by_interaction(memory)


def test_the_files_of_a_run_hold_the_context(tmp_path: Path) -> None:
    schema = hourly_schema(*COLUMNS, *MOMENTS)
    data = build_dataset(check(*rich(), schema), schema, SplitConfig(kind="time"))
    memmap.save(data, tmp_path)
    again = memmap.load(tmp_path, schema, SplitConfig(kind="time"))
    assert again.digest == data.digest
    assert by_interaction(again) == by_interaction(data)
    frame = pl.read_parquet(tmp_path / "interactions.parquet")
    frame.drop("context.hour").write_parquet(tmp_path / "interactions.parquet")
    with pytest.raises(RunError, match=r"context\.hour"):
        memmap.load(tmp_path, schema, SplitConfig(kind="time"))


def test_the_gap_is_that_to_an_interaction_whose_pair_comes_again(tmp_path: Path) -> None:
    """Every user takes item 0 on day 0, item 1 on day 1, and item 0 on day 10."""
    n, days = 30, [0, 1, 10]
    users, items = pl.DataFrame({"user_id": range(n)}), pl.DataFrame({"item_id": [0, 1]})
    actions = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(n), 3),
            "item_id": [0, 1, 0] * n,
            "at": [1_700_000_000 + 86_400 * d for d in days] * n,
        }
    )
    gap, ids = DaysSincePrevious(name="gap", edges=(1.0, 5.0)), (IDS[0], IDS[2])
    schema = Schema(time="at", duplicates="keep", features=(*ids, gap))
    memory = build_dataset(check(users, items, actions, schema), schema, SplitConfig())
    for data in (memory, prepare(tmp_path, (users, items, actions), schema, SplitConfig())):
        order = np.lexsort((data.times, data.pairs.user))
        assert flat(data, "gap")[order].tolist() == [0, 2, 3] * n, "none, a day, nine days"


@pytest.mark.parametrize("split", [{"kind": "time"}, {"kind": "last"}], ids=["time", "last"])
def test_interactions_of_one_time_have_the_days_that_a_request_has(split: Any, tmp_path: Path) -> None:
    """Visits of one second, of one to three items: none of them is the interaction before another."""
    n, rng = 30, np.random.default_rng(3)
    visits = [
        (user, item, 1_700_000_000 + 86_400 * day)
        for user in range(n)
        for day in rng.choice(30, 4, replace=False).tolist()
        for item in rng.choice(9, rng.integers(1, 4), replace=False).tolist()
    ]
    actions = pl.DataFrame(visits, ["user_id", "item_id", "at"], orient="row")
    users, items = pl.DataFrame({"user_id": range(n)}), pl.DataFrame({"item_id": range(9)})
    schema = Schema(time="at", duplicates="keep", features=(IDS[0], IDS[2], DaysSincePrevious(name="gap")))
    config = SplitConfig(**split)
    memory = build_dataset(check(users, items, actions, schema), schema, config)
    disk = prepare(tmp_path, (users, items, actions), schema, config, PrepareOptions(bucket_rows=20, piece_rows=30))
    values, known = ContextValues(memory), memory.users.ids.to_list()
    for (user, _, time), (_, code) in by_interaction(memory).items():
        asked = Request(str(user), context={"at": time // 1_000_000})
        assert read(values, asked, UserRow(known.index(user)))[0]["gap"].tolist() == [code]
    assert by_interaction(disk) == by_interaction(memory)


def test_a_log_whose_context_is_lost_with_its_repeats_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    users, items, actions = hourly(100)
    twice = pl.concat([actions, actions[:7].with_columns(hour=pl.lit(9, pl.Int64), at=pl.col("at") + 90_000)])
    schema = Schema(time="at", features=(*IDS, HOUR))
    (note,) = check(users, items, twice, schema).notes
    assert note.startswith("interactions: 7 rows repeated a pair")
    assert note.endswith("the last of each was kept; schema.duplicates = 'keep' keeps all, each in its context")
    with caplog.at_level("INFO"):
        prepare(tmp_path, (users, items, twice), schema, SplitConfig())
    assert (
        "7 rows repeated a pair of user and item, the last of each was kept; schema.duplicates = 'keep'" in caplog.text
    )


def test_another_context_is_another_dataset() -> None:
    schema, (users, items, actions) = hourly_schema(HOUR), hourly(200)
    other = actions.with_columns(hour=(pl.col("hour") + 1) % 8)
    digests = [build_dataset(check(users, items, a, schema), schema, SplitConfig()).digest for a in (actions, other)]
    assert digests[0] != digests[1]


def test_encoders_learn_from_the_train_part_alone() -> None:
    schema = hourly_schema(Categorical(name="device", side="context"))
    users, items, actions = hourly(200)
    late = pl.int_range(pl.len()) >= 150
    actions = actions.with_columns(device=pl.when(late).then(pl.lit("watch")).otherwise("device"))
    data = build_dataset(check(users, items, actions, schema), schema, SplitConfig(kind="time", test=0.2))
    codes = flat(data, "device")
    assert not codes[data.part_indices(2)].any()
    assert codes[data.part_indices(0)].all()


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=30)


@examples(deadline=None)
@given(pairs)
def test_the_time_before_is_that_of_the_users_last_earlier_interaction(events: list[tuple[int, int]]) -> None:
    user, times = (np.array(x) for x in zip(*events, strict=True))
    found = times_before(user.astype(np.int32), times, hourly_schema(*MOMENTS))
    assert found is not None
    for i, (u, t) in enumerate(events):
        assert found[i] == max((s for v, s in events if v == u and s < t), default=-1)


@examples(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 1), st.integers(0, 2)), max_size=25))
def test_contexts_are_grouped_by_user_and_by_equal_values(rows: list[tuple[int, int, int, int]]) -> None:
    users, codes, numbers, lengths = np.array(rows, np.int32).reshape(-1, 4).T
    bags = [list(range(n)) for n in lengths.tolist()]
    ragged = Ragged(
        np.array([x for bag in bags for x in bag], np.int32), np.r_[0, np.cumsum([*map(len, bags)])].astype(np.int64)
    )
    columns: dict[str, Column] = {"code": codes, "dense": numbers.astype(np.float32)[:, None], "bag": ragged}
    group, first = distinct_contexts(users, columns, np.arange(len(rows)))
    for a in range(len(rows)):
        assert [group[a] == group[b] for b in range(len(rows))] == [rows[a] == rows[b] for b in range(len(rows))]
        assert first[group[a]] == min(b for b in range(len(rows)) if rows[b] == rows[a])
    assert (np.diff(users[first]) >= 0).all()


def test_a_default_is_a_value_of_its_column() -> None:
    users, items, actions = hourly(200)
    schema = hourly_schema(Categorical(name="hour", side="context", default=3), HourOfDay(name="h", default=23))
    data = build_dataset(check(users, items, actions, schema), schema, SplitConfig())
    known = int(np.flatnonzero(actions["hour"].to_numpy() == 3)[0])
    found = default_context(data.encoders, data.context_frame)
    assert found["hour"].tolist() == [flat(data, "hour")[known]]  # type: ignore[union-attr]
    assert found["h"].tolist() == [24]  # type: ignore[union-attr]
    wrong = hourly_schema(Categorical(name="hour", side="context", default="noon"))
    with pytest.raises(DataError, match=r"feature 'hour': default is 'noon', expected Int64"):
        build_dataset(check(users, items, actions, wrong), wrong, SplitConfig())
    for unknown, told in (
        (
            Categorical(name="device", side="context", default="fone"),
            "default is 'fone', which no .*; did you mean 'phone'",
        ),
        (Categorical(name="hour", side="context", default=99), "default is 99, which no training .*; the nearest is 7"),
        (HourOfDay(name="h", default=5), "default is 5, which no training interaction has; the nearest is 1"),
        (DaysSincePrevious(name="since", default=3), "default is 3.0, which no .*; the nearest is 0.04"),
    ):
        wrong = hourly_schema(unknown)
        with pytest.raises(DataError, match=told):
            build_dataset(check(users, items, actions, wrong), wrong, SplitConfig())
    without = hourly_schema(HOUR, HourOfDay(name="h", default=23))
    data = build_dataset(check(users, items, actions, without), without, SplitConfig())
    with pytest.raises(ConfigError, match=r"feature 'hour' has no default: .*use method 2"):
        default_context(data.encoders, data.context_frame)


def test_a_log_without_a_column_or_a_value_is_refused_in_one_line(tmp_path: Path) -> None:
    schema, (users, items, actions) = hourly_schema(HOUR), hourly(200)
    renamed = actions.rename({"hour": "hours"})
    with pytest.raises(DataError, match=r"interactions: no column 'hour'; did you mean 'hours'\?"):
        check(users, items, renamed, schema)
    with pytest.raises(DataError, match=r"interactions: no column 'hour'; did you mean 'hours'\?"):
        prepare(tmp_path, (users, items, renamed), schema, SplitConfig())
    strict = hourly_schema(Categorical(name="hour", side="context", missing="error"))
    gaps = actions.with_columns(hour=pl.when(pl.col("hour") > 0).then("hour"))
    for refused in (
        lambda: check(users, items, gaps, strict),
        lambda: prepare(tmp_path, (users, items, gaps), strict, SplitConfig()),
    ):
        with pytest.raises(
            DataError, match=r"interactions: column 'hour' has \d+ missing values and feature 'hour' has"
        ):
            refused()


def test_damaged_prepared_context_is_refused(tmp_path: Path) -> None:
    schema = hourly_schema(*COLUMNS)
    prepare(tmp_path, rich(200), schema, SplitConfig())
    folder = tmp_path / "prepared"
    array = folder / "arrays" / "context.0.npy"
    kept = np.load(array)
    np.save(array, kept[:-1])
    with pytest.raises(RunError, match="the context's arrays are not of 200 rows"):
        _ = memmap.MemmapDataset.open(folder).context
    pl.read_parquet(folder / "context.parquet").drop("hour").write_parquet(folder / "context.parquet")
    with pytest.raises(RunError, match=r"context\.parquet"):
        memmap.MemmapDataset.open(folder)


def read(values: ContextValues, request: Request, user: UserRow | None = None) -> tuple[dict[str, Values], list[str]]:
    """The values of a request by feature, and the unknown ones."""
    found = dict[str, Values]()
    return found, values.read(Query(request, user), found)


def values_of(actions: pl.DataFrame, *features: Feature) -> ContextValues:
    users, items, _ = hourly(actions.height)
    schema = hourly_schema(*features)
    return ContextValues(build_dataset(check(users, items, actions, schema), schema, SplitConfig()))


def test_a_time_of_a_request_with_the_day_and_the_month_in_either_order_is_refused() -> None:
    actions = hourly(200)[2].with_columns(at=pl.Series([f"{1 + n % 28:02}/03/2024 10:00" for n in range(200)]))
    values = values_of(actions, HourOfDay(name="clock"))
    for at in ("13/04/2024 10:00", "04/04/2024 10:00", "2024-04-03 10:00"):
        assert read(values, Request("1", context={"at": at}))[0]["clock"].tolist() == [11]
    with pytest.raises(
        DataError, match=r"'at' is '03/04/2024 10:00', a day and a month in either order; give year, mon"
    ):
        read(values, Request("1", context={"at": "03/04/2024 10:00"}))


def test_a_null_that_a_feature_refuses_is_one_of_the_request() -> None:
    values = values_of(hourly(200)[2], Categorical(name="device", side="context", missing="error"))
    with pytest.raises(
        DataError, match=r"^request: context 'device' is null, and its feature has missing = 'error'; give"
    ):
        read(values, Request("1", context={"device": None}))


def test_a_moment_that_training_lacks_is_unknown_and_told(tmp_path: Path) -> None:
    """The log is of 22:13 to 1:33 on a Tuesday and a Wednesday."""
    features = (HourOfDay(name="hour_of"), DayOfWeek(name="day"), DaysSincePrevious(name="since"))
    tables, schema = hourly(200), hourly_schema(*features)
    late = tables[2].with_columns(at=pl.when(pl.int_range(200) >= 180).then(pl.col("at") + 6 * 3600).otherwise("at"))
    split = SplitConfig(kind="time", test=0.1)
    memory = build_dataset(check(*tables[:2], late, schema), schema, split)
    for data in (memory, prepare(tmp_path, (*tables[:2], late), schema, split)):
        assert flat(data, "hour_of")[data.part_indices(0)].all()
        assert not flat(data, "hour_of")[data.part_indices(2)].any(), "the hours after 7 are those of no training row"
    values = ContextValues(memory)
    told, unknown = read(values, Request("1", context={"at": "2023-11-15 00:10"}))
    assert [told[f.name].tolist() for f in features] == [[1], [3], [0]]
    assert unknown == [], "no interaction before is no unknown value"
    told, unknown = read(values, Request("1", context={"at": "2023-12-16 12:00"}), UserRow(int(memory.pairs.user[0])))
    assert [told[f.name].tolist() for f in features] == [[0], [0], [0]]
    assert unknown == ["hour_of", "day", "since"]
