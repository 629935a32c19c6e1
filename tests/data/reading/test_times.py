"""Times order interactions to the microsecond, and what cannot be a time is refused, in memory and on a disk alike."""

from __future__ import annotations

import json
import time as clock
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from messages import one_line
from worlds import ID_FEATURES, settings

import twotower
from twotower import api
from twotower.cli.app import run_command
from twotower.config.experiment import Config
from twotower.config.toml import dump_config, parse_config
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.memmap import MemmapDataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import BundleError, ConfigError, DataError, RunError
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.retrieval.retriever import stored_history
from twotower.store.bundle import Bundle

LAST, TIME = SplitConfig(kind="last"), SplitConfig(kind="time", test=0.25, validation=0.34)
BASE = 1_700_000_000
"""A second of 2023."""


def schema(**settings: Any) -> Schema:
    return Schema(**({"time": "at", "label": "liked", "features": ID_FEATURES} | settings))


def log(times: Any, **columns: Any) -> pl.DataFrame:
    """As many interactions as times, of two users in turn with items of their own."""
    n = len(times)
    given = pl.DataFrame(
        {"user_id": [i % 2 for i in range(n)], "item_id": [i // 2 for i in range(n)], "liked": [1] * n}
    )
    return given.with_columns(pl.Series("at", times), *(pl.Series(k, v) for k, v in columns.items()))


def in_memory(actions: Any, schema: Schema, split: SplitConfig, folder: Path) -> Dataset:
    return build_dataset(check(None, None, actions, schema), schema, split)


def of_a_csv(actions: pl.DataFrame, schema: Schema, split: SplitConfig, folder: Path) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    actions.write_csv(folder / "log.csv")
    return build_dataset(check(None, None, folder / "log.csv", schema), schema, split)


def on_a_disk(actions: pl.DataFrame, schema: Schema, split: SplitConfig, folder: Path) -> Dataset:
    """Prepared out of two shards."""
    (folder / "in").mkdir(parents=True, exist_ok=True)
    half = actions.height // 2
    for n, part in enumerate((actions[:half], actions[half:])):
        part.write_parquet(folder / "in" / f"{n}.parquet")
    prepare.write_prepared(DataConfig(interactions=str(folder / "in")), schema, split, folder / "out")
    return MemmapDataset.open(folder / "out")


WAYS = {"in memory": in_memory, "a CSV": of_a_csv, "on a disk": on_a_disk}


def trained(**sections: Any) -> Config:
    """Settings for a log where every event is liked."""
    train: dict[str, Any] = {"epochs": 1, "monitor": "validation.recall@5"}
    base: dict[str, dict[str, object]] = {
        "split": {"kind": "last"}, "loss": {"kind": "softmax"}, "negatives": {"uniform": 5}, "train": train,
    }  # fmt: skip
    return settings(**(base | sections))


def facts(data: Dataset) -> list[tuple[Any, ...]]:
    """Every interaction by external ids, with its label, part and time."""
    users, items = data.users.ids[data.pairs.user].to_list(), data.items.ids[data.pairs.item].to_list()
    return sorted(
        zip(users, items, data.pairs.positive.tolist(), data.parts.tolist(), data.times.tolist(), strict=True)
    )


def held_out(data: Dataset) -> list[int]:
    found: list[int] = data.items.ids[data.test.item].to_list()
    return sorted(found)


# ---- G9: order within a second

MAKES: dict[str, tuple[Callable[[list[int]], Any], str]] = {
    "milliseconds": (lambda ms: ms, "ms"),
    "seconds with fractions": (lambda ms: [m / 1_000 for m in ms], "s"),
    "ISO text": (lambda ms: [datetime.fromtimestamp(m / 1_000, UTC).isoformat() for m in ms], "s"),
    "datetimes of nanoseconds": (lambda ms: (pl.Series(ms) * 1_000_000).cast(pl.Datetime("ns")), "s"),
    "datetimes that only order": (lambda ms: pl.Series(ms).cast(pl.Datetime("ms")), "order"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", MAKES)
def test_fault_G9_a_log_of_milliseconds_newest_first_tests_on_its_newest_events(
    tmp_path: Path, make: str, way: str
) -> None:
    times, unit = MAKES[make]
    newest_first = [BASE * 1_000 + 900 - 100 * n for n in range(10)]  # all of one second, five of each user
    actions = log(times(newest_first))
    data = WAYS[way](actions, schema(time_unit=unit), LAST, tmp_path)
    assert held_out(data) == [0, 0], "each user's newest event stands first in the log"
    assert data.items.ids[data.validation.item].to_list() == [1, 1]
    assert sorted(data.times.tolist()) == sorted(m * 1_000 for m in newest_first)
    for row in (0, 1):
        mine = data.timeline.values[data.timeline.offsets[row] : data.timeline.offsets[row + 1]]
        assert data.items.ids[data.pairs.item[mine]].to_list() == [4, 3, 2], "a history runs from old to new"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("later", [0, 1])
def test_fault_G9_of_a_repeated_pair_the_row_that_is_300_ms_later_wins(tmp_path: Path, later: int, way: str) -> None:
    times = [BASE * 1_000 + 500 + n for n in range(12)]
    actions = log([*times, *((BASE * 1_000 + 100, BASE * 1_000 + 400)[:: 1 if later else -1])])
    pair = pl.int_range(pl.len()) >= 12  # liked, and 300 ms later not: in either order of rows
    actions = actions.with_columns(
        user_id=pl.when(pair).then(0).otherwise("user_id"),
        item_id=pl.when(pair).then(19).otherwise("item_id"),
        liked=pl.when(pl.col("at") == BASE * 1_000 + 400).then(0).otherwise("liked"),
    )
    data = WAYS[way](actions, schema(time_unit="ms"), LAST, tmp_path)
    assert [(liked, at) for _, item, liked, _, at in facts(data) if item == 19] == [
        (False, (BASE * 1_000 + 400) * 1_000)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_fault_G9_a_split_by_time_cuts_within_a_second(tmp_path: Path, way: str) -> None:
    milliseconds = [BASE * 1_000 + m for m in np.random.default_rng(0).permutation(40).tolist()]
    data = WAYS[way](log(milliseconds), schema(time_unit="ms"), TIME, tmp_path)
    parts = [part for _, _, _, part, at in sorted(facts(data), key=lambda f: f[-1])]
    assert parts == sorted(parts)
    assert parts.count(2) == 10


def test_fault_G9_a_history_of_earlier_events_ends_within_the_second(tmp_path: Path) -> None:
    actions = log([BASE * 1_000 + 990 - 10 * n for n in range(60)]).with_columns(user_id=pl.int_range(60) % 3)
    given = schema(time_unit="ms", features=(*ID_FEATURES, Sequence(name="met", side="user", pooling="decay")))
    config = trained(train={"history_scope": "causal", "epochs": 1, "monitor": "validation.recall@5"})
    run = api.fit((None, None, actions), given, config, folder=tmp_path / "run")
    api.publish(run, tmp_path / "store", config.index)
    met = stored_history(api.retriever(tmp_path / "store"), "0", 30)
    rows = list(actions.filter(pl.col("user_id") == 0).sort("at").iter_rows(named=True))
    assert [int(item) for item, _, _ in met] == [row["item_id"] for row in rows][:-1], "oldest first, the test left out"


def test_times_of_one_microsecond_keep_the_order_of_the_rows() -> None:
    nanoseconds = pl.Series([BASE * 10**9 + n for n in (900, 100, 1_100, 300)]).cast(pl.Datetime("ns"))
    tables = check(None, None, log(nanoseconds), schema())
    assert tables.interactions["__time"].to_list() == [BASE * 10**6 + n for n in (0, 0, 1, 0)]


@examples(max_examples=25, deadline=None)
@given(st.lists(st.integers(631_152_000_000_000, int(clock.time()) * 10**6), min_size=2, max_size=9))
def test_every_make_of_a_moment_is_the_same_microsecond(moments: list[int]) -> None:
    whole = pl.Series(moments)
    dates = whole.cast(pl.Datetime("us"))
    makes: list[tuple[Any, str]] = [
        (whole, "us"),
        (whole.cast(pl.UInt64), "us"),
        (whole / 1e6, "s"),
        (pl.Series([f"{m // 10**6}.{m % 10**6:06}" for m in moments]), "s"),
        (whole.cast(pl.String), "us"),
        (whole.cast(pl.Decimal(20, 0)), "us"),
        (dates, "s"),
        (dates.cast(pl.Datetime("ns")), "s"),
        (dates.dt.to_string("%Y-%m-%dT%H:%M:%S%.6fZ"), "s"),
        (dates.dt.to_string("%Y-%m-%dT%H:%M:%S%.6fZ").cast(pl.Categorical), "s"),
        (dates.dt.to_string("%d/%m/%Y %H:%M:%S%.6f"), "order"),
        (pd.Series(dates.to_numpy()), "s"),
    ]
    for given_, unit in makes:
        form = "%d/%m/%Y %H:%M:%S.%f" if unit == "order" else ""
        found = check(None, None, {"user_id": range(len(moments)), "item_id": range(len(moments)), "at": given_},
                      Schema(time="at", time_unit=unit, time_format=form, features=ID_FEATURES))  # fmt: skip
        assert found.interactions["__time"].to_list() == moments, unit


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([date(2020, 1, d) for d in (1, 2, 3, 4)], [1_577_836_800_000_000 + d * 86_400_000_000 for d in range(4)]),
        ([datetime(1969, 12, 31, 23, 59, 59, 999_999 - n) for n in range(4)], [-1, -2, -3, -4]),
        (pl.Series([-1, -1_000, -1_001, 0]).cast(pl.Datetime("ns")), [-1, -1, -2, 0]),
        (["2020-01-01T02:00:00.5+02:00", "2020-01-01T00:00:00Z", "2019-12-31T19:00:00-0500", "2020-01-01T00:00:01Z"],
         [1_577_836_800_000_000 + n for n in (500_000, 0, 0, 1_000_000)]),
    ],
)  # fmt: skip
def test_dates_before_1970_and_of_other_zones_are_exact(times: Any, expected: list[int]) -> None:
    found = check(None, None, log(times), schema(time_unit="order")).interactions
    assert found["__time"].to_list() == expected


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        (["2020-01-01 00:00:00", "0000-01-01 00:00:00"], "in row 2: 0000-01-01 00:00:00.;"),
        (
            pl.Series([BASE * 10**6, BASE * 10**6]).cast(pl.Datetime("ms")),
            r"in row 1: \+55840-.* look like times in the future",
        ),
    ],
)
def test_years_that_python_lacks_are_refused_as_others(times: Any, shown: str) -> None:
    with pytest.raises(DataError, match=f"are not between 1990 and tomorrow .*{shown}"):
        check(None, None, {"user_id": [1, 2], "item_id": [1, 2], "at": times}, Schema(time="at", features=ID_FEATURES))


@pytest.mark.parametrize("way", ["in memory", "a CSV"])
def test_fault_G9_an_order_in_text_of_more_than_64_bits_is_exact(tmp_path: Path, way: str) -> None:
    times = [f"202311051230152{n:05d}" for n in range(9, -1, -1)]  # newest first, and one and the same as floats
    assert len({float(t) for t in times}) == 1
    assert int(times[0]) > 2**63
    found = WAYS[way](log(times), schema(time_unit="order"), LAST, tmp_path)
    assert found.times.tolist() == list(range(10, 0, -1))
    assert held_out(found) == [0, 0]


def test_a_float_that_cannot_hold_seconds_is_refused() -> None:
    times = pl.Series([BASE + 1.0, BASE + 2, BASE + 3, BASE + 4], dtype=pl.Float32)
    with pytest.raises(DataError, match="Float32, which keeps 7 digits.*give Float64 or integers"):
        check(None, None, log(times), schema())


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file, which may be another name of a file that stays."""
    body = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(body | changes))


@pytest.mark.parametrize("prepared", [False, True])
def test_fault_G9_runs_and_bundles_of_a_former_format_are_refused_by_name(tmp_path: Path, prepared: bool) -> None:
    tables = log([BASE + n for n in range(60)]).with_columns(user_id=pl.int_range(60) % 3)
    given: Any = (None, None, tables)
    config = trained()
    if prepared:
        given = on_a_disk(tables, schema(), LAST, tmp_path)
        config = trained(data={"prepared": str(tmp_path / "out")})
    folder = tmp_path / "run"
    run = api.fit(given, schema(), config, folder=folder)
    api.publish(run, tmp_path / "store", config.index)
    bundle = tmp_path / "store" / "bundles" / (tmp_path / "store" / "CURRENT").read_text().strip()
    rewrite(bundle / "MANIFEST.json", schema_version=2)
    with pytest.raises(BundleError, match=r"schema_version is 2, this version reads 7"):
        Bundle.open(bundle)
    text = (folder / "config.toml").read_text()
    for form in (None, 99):
        changed = text.replace("format = 4\n", "" if form is None else f"format = {form}\n")
        (folder / "config.toml").write_text(changed)
        with pytest.raises(RunError, match=rf"config\.toml: format {form}, this version reads 4; train the run again"):
            twotower.load(folder)
    (folder / "config.toml").write_text(text)
    formats = {"model": (7, "this version reads 7; train the run again")}
    if prepared:
        words = r"made by twotower 0\.1\.0, this version reads 7; prepare the tables again"
        formats["prepared/prepared"] = 7, words
    for name, (form, words) in formats.items():
        path = folder / f"{name}.json"
        rewrite(path, format=5, **({} if name == "model" else {"twotower": "0.1.0"}))
        with pytest.raises(RunError, match=rf"{path.name}: format 5, {words}"):
            twotower.load(folder)
        rewrite(path, format=form)
    assert facts(twotower.load(folder).dataset) == facts(run.dataset)


# ---- G11: what cannot be a time

N = 200
SECONDS = [BASE + n for n in range(N)]
MOMENTS = [datetime(2023, 1, 1) + timedelta(hours=n) for n in range(N)]
IMPOSSIBLE: dict[str, tuple[Any, str, list[str]]] = {
    "mixed": (
        [s * 1_000 if n % 4 else s for n, s in enumerate(SECONDS)], "ms",
        ["50 of 200 times are not between 1990 and tomorrow in unit 'ms' (the first, in row 1: 1700000000)",
         "75 % look like milliseconds, 25 % like seconds: correct them, or set schema.bad_times = 'drop'"],
    ),
    "milliseconds": ([s * 1_000 for s in SECONDS], "s", ["all look like milliseconds: set schema.time_unit = 'ms'"]),
    "a few zeros": (
        [0 if n in (120, 130) else s for n, s in enumerate(SECONDS)], "s",
        ["2 of 200", "(the first, in row 121: 0)",
         "99 % look like seconds, 1 % like zeros: ", "set schema.bad_times = 'drop' to leave those rows out"],
    ),
    "years": ([2020 + n % 4 for n in range(N)], "s",
              ["all look like no unit of time", "set schema.time_unit = 'order'"]),
    "digits": ([int(f"{m:%Y%m%d}") for m in MOMENTS], "s",
               ["(the first, in row 1: 20230101)",
                "all look like dates as YYYYMMDD: set schema.time_format = '%Y%m%d'"]),
    "counts": (list(range(N)), "s",
     ["99.5 % look like no unit of time, 0.5 % like zeros", "set schema.time_unit = 'order'"]),
    "dates of 1970": (
        [datetime(1970, 1, 1) if n == 9 else m for n, m in enumerate(MOMENTS)], "s",
        ["1 of 200 times are not between 1990 and tomorrow (the first, in row 10: 1970-01-01 00:00:00)",
         "99.5 % look like dates since 1990, 0.5 % like zeros: correct them, or set schema.bad_times = 'drop'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_fault_G11_times_that_cannot_be_are_refused_with_a_guess(tmp_path: Path, case: str, way: str) -> None:
    times, unit, words = IMPOSSIBLE[case]
    with one_line(DataError, "interactions: time 'at'") as caught:
        WAYS[way](log(times), schema(time_unit=unit), LAST, tmp_path)
    message = str(caught.value).replace(".000000", "")
    assert not [word for word in words if word not in message], message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["train", "prepare"])
def test_fault_G11_the_command_ends_with_code_2_and_one_line(
    tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log(IMPOSSIBLE["mixed"][0]).write_parquet(tmp_path / "log.parquet")
    config = trained()
    config = config.model_copy(update={"data": DataConfig(interactions="log.parquet")})
    (tmp_path / "config.toml").write_text(dump_config(schema(time_unit="ms"), config), encoding="utf-8")
    option = "--run" if verb == "train" else "--out"
    code = run_command([verb, str(tmp_path / "config.toml"), option, str(tmp_path / "made")])
    shown = capsys.readouterr().err
    assert code == 2
    assert "75 % look like milliseconds, 25 % like seconds: correct them, or set schema.bad_times = 'drop'" in shown
    assert not (tmp_path / "made").exists()


ODD = {6: 1, 41: 2, 120: 0, 150: 3, 199: 0}
"""Rows of bad times, and the number of each among the bad values of a case."""
BAD: dict[str, tuple[list[Any], list[Any], dict[str, Any]]] = {
    "seconds": (SECONDS, [0, 4_102_444_800, -1, None], {}),
    "milliseconds": ([1_000 * s for s in SECONDS], [0, 1_700_000_000, -1, None], {"time_unit": "ms"}),
    "datetimes": (MOMENTS, [datetime(1970, 1, 1), datetime(2100, 1, 1), datetime(1, 1, 1), None], {}),
    "days first": ([f"{m + timedelta(days=12):%d/%m/%Y %H:%M}" for m in MOMENTS],
     ["00/00/0000 00:00", "n/a", "01/01/1970 00:00", None], {}),
    "an order": ([1.0 * n for n in range(N)], [None] * 4, {"time_unit": "order"}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", BAD)
def test_fault_G11_rows_of_bad_times_are_left_out_on_purpose(
    tmp_path: Path, case: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    times, bad, more = BAD[case]
    given = log([bad[ODD[n]] if n in ODD else t for n, t in enumerate(times)])
    good = given.filter(pl.Series([n not in ODD for n in range(N)]))
    with pytest.raises(DataError, match=r"set schema\.bad_times = 'drop'"):
        WAYS[way](given, schema(**more), LAST, tmp_path / "refused")
    with caplog.at_level("INFO"):
        left = WAYS[way](given, schema(bad_times="drop", **more), LAST, tmp_path / "left")
    expected = WAYS[way](good, schema(**more), LAST, tmp_path / "good")
    assert facts(left) == facts(expected)
    assert left.users.ids.equals(expected.users.ids)
    notes = caplog.text if way == "on a disk" else str(check(None, None, given, schema(bad_times="drop", **more)).notes)
    assert (
        f"'at': 5 of 200 times are {'missing or ' if None in bad else ''}not between 1990 and tomorrow" in notes
        or case == "an order"
    )
    assert "these rows are left out" in notes


@pytest.mark.parametrize("way", WAYS)
def test_bad_times_that_leave_no_row_are_refused(tmp_path: Path, way: str) -> None:
    with one_line(DataError, "200 of 200 times are missing (the first in row 1): no row would be left"):
        WAYS[way](log([None] * N), schema(bad_times="drop"), LAST, tmp_path)


@pytest.mark.parametrize("first", [["n/a"] * 20, [*["01/20/2023 10:00"] * 19, "01/02/2023 10:00"]],
 ids=["no times", "another format"])  # fmt: skip
def test_bad_times_of_a_first_file_do_not_hide_the_format_of_the_others(tmp_path: Path, first: list[str]) -> None:
    given = log([*first, *(f"20/01/2023 {m:%H:%M}" for m in MOMENTS[20:])])
    (tmp_path / "log").mkdir()
    for name, some in (("a", given[:20]), ("b", given[20:])):
        some.write_csv(tmp_path / "log" / f"{name}.csv")
    data, drops = DataConfig(interactions=str(tmp_path / "log")), schema(bad_times="drop")
    found = prepare.write_prepared(data, drops, LAST, tmp_path / "out")
    assert facts(found) == facts(WAYS["in memory"](given, drops, LAST, tmp_path))
    assert len(found.parts) >= N - 20


# ---- G25: days and months

BOTH = ["01/02/2023 10:00", "03/02/2023 10:00", "02/03/2023 10:00", "11/12/2022 09:00", "05/06/2022 10:00",
        "06/05/2022 10:00", "07/07/2022 10:00", "08/01/2022 10:00"]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_fault_G25_days_and_months_that_fit_both_ways_need_a_format(tmp_path: Path, way: str) -> None:
    make = WAYS[way]
    with pytest.raises(DataError, match="all rows fit both; set schema.time_format = '%d/%m/%Y %H:%M' or '%m/%d/%Y"):
        make(log(BOTH), schema(), LAST, tmp_path / "asked")
    assert not (tmp_path / "asked" / "out").exists()
    for form in ("%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M"):
        data = make(log(BOTH), schema(time_format=form), LAST, tmp_path / form.replace("/", ""))
        expected = [int(datetime.strptime(t, form).replace(tzinfo=UTC).timestamp()) * 10**6 for t in BOTH]
        assert sorted(data.times) == sorted(expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("telling", "form"), [("13/02/2023 10:00", "%d/%m"), ("02/13/2023 10:00", "%m/%d")])
def test_fault_G25_one_row_that_fits_one_way_only_says_how_all_are_read(
    tmp_path: Path, telling: str, form: str, way: str
) -> None:
    times = [*BOTH, telling]
    data = WAYS[way](log(times), schema(), LAST, tmp_path)
    expected = [int(datetime.strptime(t, f"{form}/%Y %H:%M").replace(tzinfo=UTC).timestamp()) * 10**6 for t in times]
    assert sorted(data.times) == sorted(expected)


@pytest.mark.parametrize("way", WAYS)
def test_fault_G25_rows_that_fit_no_one_format_are_named(tmp_path: Path, way: str) -> None:
    mixed = [*BOTH, "13/02/2023 10:00", "05/05/2023 10:00", "02/13/2023 10:00", "02/14/2023 10:00"]
    for times, row, value in (
        (mixed, 11, "02/13/2023 10:00"),
        ([*BOTH[:5], "", *BOTH[6:]], 6, "") if way != "a CSV" else (mixed, 11, "02/13/2023 10:00"),
        (["2023-01-02T10:00:00Z", "2023-01-02T11:00:00", "2023-01-03T11:00:00Z", "2023-01-03T11:00:00Z"], 2,
         "2023-01-02T11:00:00"),
    ):  # fmt: skip
        with pytest.raises(
            DataError, match=f"row {row} holds '{value}', which is not of the format of the rows before"
        ):
            WAYS[way](log(times), schema(), LAST, tmp_path)
    with pytest.raises(
        DataError, match="row 9 holds '13/02/2023 10:00', which is not of schema.time_format = '%m/%d/%Y"
    ):
        WAYS[way](log(mixed), schema(time_format="%m/%d/%Y %H:%M"), LAST, tmp_path)


@pytest.mark.parametrize("first", ["01/02/23", "2023/01-02"])
def test_text_without_a_year_of_four_digits_needs_a_format(first: str) -> None:
    with pytest.raises(DataError, match=f"row 1 holds '{first}', expected a number or a date .* schema.time_format"):
        check(None, None, log([first] * 6), schema())
    if first == "01/02/23":
        times = check(None, None, log([first] * 6), schema(time_format="%m/%d/%y")).interactions["__time"]
        assert times.to_list() == [1_672_617_600 * 10**6] * 6


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("%Y-%m", "{0.year}-{0.month}"), ("%b-%y", "{0:%b-%y}"), ("%Y%m", "{0:%Y%m}"),
    ],
)  # fmt: skip
def test_a_month_is_its_first_day(form: str, text: str) -> None:
    firsts = [datetime(2019 + n // 12, 1 + n % 12, 1, tzinfo=UTC) for n in range(24)]
    found = check(None, None, log([text.format(first) for first in firsts]), schema(time_format=form)).interactions
    assert sorted(found["__time"].to_list()) == [int(first.timestamp()) * 10**6 for first in firsts]


@pytest.mark.parametrize("way", WAYS)
def test_offsets_are_read_and_letters_of_a_zone_are_as_they_are_written(tmp_path: Path, way: str) -> None:
    moments = [datetime(2024, 3, 30 + n % 2, 2, 30, n, tzinfo=UTC) for n in range(8)]
    for zone, form, hours in (("UTC", "UTC", 0), ("+0100", "%z", 1)):
        texts = [f"{moment:%Y-%m-%d %H:%M:%S} {zone}" for moment in moments]
        data = WAYS[way](log(texts), schema(time_format=f"%Y-%m-%d %H:%M:%S {form}"), LAST, tmp_path / zone)
        assert sorted(data.times) == sorted((int(m.timestamp()) - 3_600 * hours) * 10**6 for m in moments)


@pytest.mark.parametrize("way", WAYS)
def test_a_format_that_is_of_no_clock_is_refused_by_name(tmp_path: Path, way: str) -> None:
    form = "%Y-%m-%d %H:%M %p"
    texts = [datetime(2024, 3, 1 + n, 2, 30, tzinfo=UTC).strftime(form) for n in range(8)]
    with pytest.raises(
        DataError, match=f"time 'at': schema.time_format = '{form}' is not read; give hours with minutes"
    ):
        WAYS[way](log(texts), schema(time_format=form), LAST, tmp_path / "text")
    if way != "a CSV":
        dates = WAYS[way](
            log([datetime(2024, 3, 1 + n) for n in range(8)]), schema(time_format=form), LAST, tmp_path / "dates"
        )
        assert len(dates.pairs) == 8, "a column of dates needs no format"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"time_format": "%d/%m/%Y", "time": ""}, "time_format needs time; name the time column"),
        ({"time_format": "day/month"}, "expected a format such as"),
        ({"time_format": "%Y-%m-%d %H:%M %Z"}, "the letters of a zone, %Z, say no offset; write them"),
    ],
)
def test_a_time_format_that_can_be_of_no_column_is_refused(more: dict[str, str], words: str) -> None:
    schema: dict[str, Any] = {"features": [f.model_dump() for f in ID_FEATURES], "time": "at", "label": "liked"}
    with pytest.raises(ConfigError, match=words):
        parse_config({"schema": schema | more})
