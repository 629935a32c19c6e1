"""Tables of every make are read alike, and what cannot be used is refused in one line that says what to do."""

from __future__ import annotations

import gzip
import math
import time as clock
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from messages import refused
from worlds import EVERYTHING_SCHEMA, ID_FEATURES, everything

from twotower.cli.app import run_command
from twotower.cli.summary import describe
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.reading.readers import as_frame, read_file
from twotower.data.reading.text_files import Reading
from twotower.data.split import SplitConfig
from twotower.data.tables import Tables, check
from twotower.errors import DataError
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.text import Text
from twotower.features.values import canonical_ids

PLAIN = Schema(features=ID_FEATURES)
RATED = Schema(label="stars", positive_above=3, time="at", time_unit="order", features=ID_FEATURES)
TIMED = RATED.model_copy(update={"time_unit": "s"})


def actions(**columns: Any) -> dict[str, Any]:
    """Five interactions of three users and three items; columns replace or add."""
    base = {
        "user_id": [1, 1, 2, 2, 3],
        "item_id": [10, 11, 10, 12, 11],
        "stars": [5, 1, 4, 2, 5],
        "at": [5, 3, 4, 1, 2],
    }
    return {name: values for name, values in (base | columns).items() if values is not None}


def users(**columns: Any) -> dict[str, Any]:
    return {"user_id": [1, 2, 3]} | columns


def items(**columns: Any) -> dict[str, Any]:
    return {"item_id": [10, 11, 12]} | columns


def featured(feature: Any) -> Schema:
    return Schema(features=(*ID_FEATURES, feature))


def load(*tables: Any, schema: Schema = PLAIN) -> Dataset:
    """What `twotower.fit` does with tables before it trains or writes anything."""
    users, items, interactions = tables
    return build_dataset(check(users, items, interactions, schema), schema, SplitConfig(test=0.2, validation=0.2))


# --- tables of every make ---------------------------------------------------------------------------------------


def as_arrow(frame: pl.DataFrame) -> pa.Table:
    big = {c: pa.uint64() for c in frame.columns if frame[c].dtype == pl.UInt64}
    return pa.table({c: pa.array(frame[c].to_list(), big.get(c)) for c in frame.columns})


def as_pandas(frame: pl.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({c: frame[c].to_list() for c in frame.columns})


def as_pandas_with_arrays(frame: pl.DataFrame) -> pd.DataFrame:
    lists = {c for c in frame.columns if frame[c].dtype == pl.List}
    return pd.DataFrame(
        {c: [np.array(v) if c in lists and v is not None else v for v in frame[c].to_list()] for c in frame.columns}
    )


def as_dict(frame: pl.DataFrame) -> dict[str, Any]:
    return frame.to_dict(as_series=False)


MAKES = [as_arrow, as_pandas, as_pandas_with_arrays, as_dict, lambda f: f.lazy(), lambda f: f]


@pytest.mark.parametrize("make", MAKES)
def test_tables_of_every_make_are_the_same_tables(make: Callable[[pl.DataFrame], Any]) -> None:
    # A list column with a gap, beside what `everything` has; pandas knows no NaN beside null.
    made = everything()
    pictures = [None if i == 3 else [float(i), 1.0, 2.0] for i in range(40)]
    frames = (made[0].with_columns(pl.col("income").fill_nan(None)), made[1].with_columns(picture=pl.Series(pictures)))
    tables = (*frames, made[2])
    expected = check(*tables, EVERYTHING_SCHEMA)
    found = check(make(tables[0]), make(tables[1]), make(tables[2]), EVERYTHING_SCHEMA)
    for name in ("users", "items", "interactions"):
        assert getattr(found, name).equals(getattr(expected, name)), name
        assert getattr(found, name).schema == getattr(expected, name).schema
    assert found.notes == expected.notes


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "PQ"])
def test_files_are_read_by_their_ending(tmp_path: Path, ending: str) -> None:
    frame, path = pl.DataFrame(actions()), tmp_path / f"table.{ending}"
    if ending in ("csv", "tsv"):
        frame.write_csv(path, separator="," if ending == "csv" else "\t")
    else:
        frame.write_parquet(path)
    assert read_file(path).equals(frame)
    assert as_frame(str(path), "interactions").equals(frame)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (pd.Series([pd.NA, "a"], dtype=object), [None, "a"]),
        (pd.Series([1, None], dtype="Int64"), [1, None]),
        (pd.Series([2**63 + 1, None], dtype="UInt64"), [2**63 + 1, None]),
        (pd.Series([True, None], dtype="boolean"), [True, None]),
        (pd.Series(["a", None], dtype="category"), ["a", None]),
        (pd.Series([1, "a"], dtype=object), ["1", "a"]),
        (pd.Series([1.0, math.nan]), [1.0, None]),
        (pd.Series([(1, 2), None]), [[1, 2], None]),
        (pd.Series(np.array(["2020-01-02", "NaT"], "M8[s]")), [datetime(2020, 1, 2), None]),
        (pd.Series(pd.to_datetime(["2020-01-02T00:00Z", None])), [datetime(2020, 1, 2, tzinfo=UTC), None]),
    ],
)
def test_pandas_cells_keep_their_values_and_gaps_become_null(column: pd.Series, values: list[Any]) -> None:
    assert as_frame(pd.DataFrame({"a": column}), "x")["a"].to_list() == values


def test_columns_of_a_dict_may_mix_integers_fractions_and_arrays() -> None:
    frame = as_frame({"a": [1, 2.5], "b": np.arange(2), "c": np.ones((2, 3))}, "x")
    assert frame["a"].to_list() == [1.0, 2.5]
    assert frame["c"].to_list() == [[1, 1, 1], [1, 1, 1]]


NO_TABLES = {
    "list": [1],
    "pandas series": pd.Series([1]),
    "uneven columns": {"a": [1, 2], "b": [1]},
    "one name twice": pd.DataFrame([[1, 2]], columns=["a", "a"]),
    "failing query": pl.LazyFrame({"a": [1]}).select("b"),
}


@pytest.mark.parametrize("table", NO_TABLES.values(), ids=NO_TABLES)
def test_what_is_not_a_table_is_refused(table: Any) -> None:
    message = refused(lambda: as_frame(table, "users"), "users:")
    assert "expected a polars or pandas frame" in message or "equal length with one name each" in message


# --- C1: columns --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "misspelt": (
        lambda: check(None, None, {"user_id": [1, 2], "itme_id": [1, 2]}, PLAIN),
        ["interactions: no column 'item_id'; did you mean 'itme_id'?"],
    ),
    "misspelt feature": (
        lambda: check(users(agee=[1, 2, 3]), None, actions(), featured(Numeric(name="age", side="user"))),
        ["users: no column 'age'; did you mean 'agee'?", "name it in [schema]"],
    ),
    "missing label": (lambda: check(None, None, actions(stars=None), RATED), ["interactions: no column 'stars'"]),
    "missing title": (
        lambda: check(None, items(), actions(), PLAIN.model_copy(update={"title": "name"})),
        ["items: no column 'name'"],
    ),
    "text mean": (
        lambda: check(
            None, None, actions(price=list("abcde")),
            featured(Numeric(name="m", side="item", statistic="mean", statistic_column="price")),
        ),
        ["interactions: column 'price' holds String, expected numbers", "'m'", "cast it"],
    ),
    **{
        f"label {odd}": (
            partial(check, None, None, actions(stars=["1", odd, "2", " -0,25 ", "5"]), RATED),
            [f"the first that is none is '{odd}': write a decimal point, and no separators of thousands (data.format."],
        )
        for odd in ("3,5", "1.234,5", "1,234")
    },
    "label of words": (
        lambda: check(None, None, actions(stars=["1", "", "no", "yes", "5"]), RATED),
        ["the first that is none is 'no': give a number in its place, or drop the rows; a column of words",
         "schema.event"],
    ),
    "words among numbers": (
        lambda: load(users(age=["1", "n/a", None]), None, actions(), schema=featured(Numeric(name="age", side="user"))),
        ["column 'age': found String, expected numbers; the first that is none is 'n/a': leave it empty, or give a "
         "number in its place; or make it categorical"],
    ),
    "text time": (
        lambda: check(None, None, actions(at=["yesterday"] * 5), RATED),
        ["time 'at': row 1 holds 'yesterday', expected a number or a date such as 2023-01-31", "schema.time_format"],
    ),
    "list id": (
        lambda: check(None, None, actions(item_id=[[1]] * 5), PLAIN),
        ["column 'item_id' holds List(Int64), expected one id a row", "[schema]"],
    ),
    "list categorical": (
        lambda: load(users(c=[[1], [2], []]), None, actions(), schema=featured(Categorical(name="c", side="user"))),
        ["column 'c': found List(Int64), expected one value a row", "cast it"],
    ),
    "number multi-hot": (
        lambda: load(None, items(g=[1, 2, 3]), actions(), schema=featured(MultiHot(name="g", side="item"))),
        ["column 'g': found Int64, expected lists", "set separator"],
    ),
    "id types": (
        lambda: check({"user_id": ["1", "2", "3"]}, None, actions(), PLAIN),
        ["column 'user_id'", "users has String ('1') and interactions Int64 (1)", "the same type"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_fault_C1_missing_column_or_wrong_type_names_what_was_found_and_expected(case: str) -> None:
    call, words = WRONG[case]
    refused(call, *words)


# --- C2: nulls, NaN, infinities -----------------------------------------------------------------------------------

GAPS = [1.0, math.nan, math.inf]


@pytest.mark.parametrize("gaps", [GAPS, [1.0, None, -math.inf]])
@pytest.mark.parametrize("buckets", [0, 3])
def test_fault_C2_gaps_in_a_numeric_column_are_imputed_and_counted(gaps: list[float | None], buckets: int) -> None:
    schema = featured(Numeric(name="age", side="user", buckets=buckets))
    tables = check(users(age=pl.Series(gaps, dtype=pl.Float64)), None, actions(), schema)
    n = sum(g is None or not math.isfinite(g) for g in gaps)
    assert tables.notes == [f"users: {n} of 3 values of 'age' are missing or not finite; imputed"]
    column = build_dataset(tables, schema, SplitConfig(test=0.2, validation=0.2)).users.columns["age"]
    assert isinstance(column, np.ndarray)
    assert np.isfinite(column).all()
    refused(
        lambda: check(users(age=gaps), None, actions(), featured(Numeric(name="age", side="user", missing="error"))),
        f"users: column 'age' has {n} missing values", "feature 'age' has missing = 'error'", "set missing = 'impute'",
    )  # fmt: skip


@pytest.mark.parametrize("gap", [None, math.nan])
@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("stars", "label 'stars' has 1 missing values; fill them or drop"),
        ("at", "time 'at' has 1 missing values in 5 rows; fill them, or set schema.bad_times = 'drop'"),
        ("item_id", "column 'item_id' has 1 missing ids in 5 rows; fill them, or set schema.missing = 'drop'"),
    ],
)
def test_fault_C2_gaps_in_labels_times_and_ids_are_refused(gap: float | None, column: str, words: str) -> None:
    refused(lambda: check(None, None, actions(**{column: [5.0, 4.0, 3.0, 10.0, gap]}), RATED), words)


@pytest.mark.parametrize("gap", [None, math.nan])
def test_a_training_mean_leaves_gaps_out_and_counts_them(gap: float | None) -> None:
    schema = featured(Numeric(name="m", side="item", statistic="mean", statistic_column="price"))
    tables = check(None, None, actions(price=[2.0, 1.0, gap, 3.0, 1.0]), schema)
    assert tables.notes == ["interactions: 1 of 5 values of 'price' are missing; left out"]
    frame = build_dataset(tables, schema, SplitConfig(test=0.2, validation=0.2, seed=1)).items.frame
    assert frame["__mean:m"].to_list()[0] == 2.0


# --- C4: duplicates -----------------------------------------------------------------------------------------------

TWICE = {"user_id": [1, 1, 1, 2], "item_id": [10, 10, 11, 12], "stars": [5, 2, 5, 5], "n": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("times", "kept"),
    [([2, 1, 3, 4], [0, 2, 3]), ([1, 1, 3, 4], [1, 2, 3]), ([], [1, 2, 3])],
)
def test_fault_C4_of_a_repeated_pair_the_latest_row_is_kept_and_reported(times: list[int], kept: list[int]) -> None:
    tables = check(None, None, TWICE | ({"at": times} if times else {}), RATED if times else PLAIN)
    assert tables.interactions["n"].to_list() == kept
    assert tables.notes == ["interactions: 1 rows repeated a pair of user and item; the last of each was kept"]


@pytest.mark.parametrize("side", ["user", "item"])
def test_fault_C4_of_a_repeated_id_the_last_row_is_kept_and_reported(side: str) -> None:
    key = f"{side}_id"
    ids = actions()[key]
    table = {key: [*ids, ids[0]], "n": range(6)}
    tables = check(table if side == "user" else None, table if side == "item" else None, actions(), PLAIN)
    frame = tables.users if side == "user" else tables.items
    assert frame[key].is_unique().all()
    assert dict(zip(frame[key], frame["n"], strict=True)) == {i: n for n, i in enumerate(table[key])}
    n = 6 - len(set(ids))
    assert tables.notes == [f"{side}s: {n} rows repeated an id; the last of each was kept"]


def test_fault_C4_all_rows_of_a_pair_may_be_kept_but_of_an_id_the_last() -> None:
    kept = RATED.model_copy(update={"duplicates": "keep"})
    tables = check({"user_id": [1, 2, 1], "n": [0, 1, 2]}, None, TWICE | {"at": [4, 1, 3, 2]}, kept)
    assert tables.interactions["n"].to_list() == [0, 1, 2, 3]
    assert tables.users["n"].to_list() == [1, 2]
    assert tables.notes == ["users: 1 rows repeated an id; the last of each was kept"]
    dataset = build_dataset(tables, kept, SplitConfig(test=0.25, validation=0.25, seed=1))
    train = dataset.train
    assert [list(dataset.seen_items.row(u)) for u in range(2)] == [
        sorted({*train.item[train.user == u]}) for u in range(2)
    ]


STRICT = PLAIN.model_copy(update={"duplicates": "error"})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: check(None, None, TWICE, STRICT), ["interactions: 1 rows repeat a pair", "(the first: 1, 10)"]),
        (
            lambda: check({"user_id": [3, 2, 3, 1]}, None, actions(), STRICT),
            ["users: 1 rows repeat an id of 'user_id' (the first: 3)"],
        ),
    ],
)
def test_fault_C4_duplicates_are_refused_where_the_schema_says_so(call: Any, words: list[str]) -> None:
    refused(call, *words, "drop them or set schema.duplicates = 'last'")


# --- C5: too little -----------------------------------------------------------------------------------------------

EMPTY: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no interactions": (lambda: check(None, None, {"user_id": [], "item_id": []}, PLAIN),
     ["interactions: the table has no rows", "expected at least one", "fill it"]),
    "no columns": (lambda: check(None, None, pd.DataFrame(), PLAIN), ["interactions: no column 'user_id'"]),
    "one user": (lambda: check(None, None, {"user_id": [7, 7], "item_id": [1, 2]}, PLAIN),
     ["users: found only one id of 'user_id' (7), expected at least two", "add rows"]),
    "no positives": (lambda: check(None, None, actions(stars=[1, 2, 3, 1, 2]), RATED),
     ["no row has 'stars' above 3 (the largest is 3)", "set schema.positive_above"]),
    "too few to split": (lambda: load(None, None, {"user_id": [1, 2], "item_id": [1, 2]}),
     ["leaves no train rows out of 2 interactions", "give more data or other shares"]),
    "no positive to train on": (
        # With the seed 2022, row 2 of 5 is the one to test.
        lambda: load(None, None, actions(stars=[1, 1, 5, 1, 1]), schema=RATED),
        ["no positive interaction in the train part"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EMPTY)
def test_fault_C5_too_little_data_is_refused(case: str) -> None:
    call, words = EMPTY[case]
    refused(call, *words)


@pytest.mark.parametrize(("text", "words"), [("", "the file is empty; it needs a header line and at least one row")])
def test_fault_C5_an_empty_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "users.csv"
    path.write_text(text)
    refused(lambda: read_file(path), str(path), words)
    path.write_text("user_id\n")
    refused(lambda: check(path, None, actions(), PLAIN), "users: the table has no rows")


# --- C6: times ----------------------------------------------------------------------------------------------------

NOW = int(clock.time())
FUTURE = datetime.fromtimestamp(NOW + 10**7, UTC)


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6)])
@pytest.mark.parametrize(("read_as", "read_factor"), [("s", 1), ("ms", 10**3), ("us", 10**6)])
def test_fault_C6_timestamps_of_another_unit_are_refused_and_the_right_one_is_named(
    unit: str, factor: int, read_as: str, read_factor: int
) -> None:
    seconds = [1_600_000_000, 1_500_000_000, 1_400_000_000, 1_300_000_000, 978_300_760]
    given, schema = actions(at=[s * factor for s in seconds]), TIMED.model_copy(update={"time_unit": read_as})
    if unit == read_as:
        assert check(None, None, given, schema).interactions["__time"].to_list() == [s * 10**6 for s in seconds]
    else:
        refused(lambda: check(None, None, given, schema),
                f"time 'at': 5 of 5 times are not between 1990 and tomorrow in unit '{read_as}' (the first, in row 1: ",
                f"all look like {UNITS[unit]}: set schema.time_unit = '{unit}'")  # fmt: skip


UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds"}


@pytest.mark.parametrize(
    ("latest", "unit", "what"),
    [
        (1e30, "s", "no unit of time: correct them, or set schema.bad_times = 'drop'"),
        (10**18, "s", "nanoseconds: correct them"),
        (FUTURE, "s", "times in the future: correct them, or set schema.bad_times = 'drop'"),
    ],
    ids=["beyond any time", "nanoseconds", "dates"],
)
def test_fault_C6_times_in_the_future_are_refused(latest: Any, unit: str, what: str) -> None:
    past = 1_577_836_800 * (1_000 if unit == "ms" else 1)
    earlier = datetime(2020, 1, 1, tzinfo=UTC) if latest is FUTURE else type(latest)(past)
    schema = TIMED.model_copy(update={"time_unit": unit})
    times = [earlier, latest, earlier, earlier, earlier]
    refused(
        lambda: check(None, None, actions(at=times), schema),
        "time 'at': 1 of 5 times are not between 1990 and tomorrow", "(the first, in row 2: ", f"20 % like {what}"
    )  # fmt: skip


def test_fault_C6_unsorted_times_are_fine_and_keep_the_tables_order() -> None:
    tables = check(None, None, actions(), RATED)
    assert tables.interactions["__time"].to_list() == actions()["at"]
    assert tables.notes == []


@pytest.mark.parametrize("times", [[0.5, 0.1, 0.4, 0.4, 0.2], pl.Series([2**63 + v for v in (9, 1, 5, 5, 3)])])
def test_a_time_that_only_orders_may_be_any_number(times: Any) -> None:
    found = check(None, None, actions(at=times), RATED).interactions["__time"].to_list()
    assert found == [4, 1, 3, 3, 2]
    whole = check(None, None, actions(at=[9, 10**17, -4, 0, 9]), RATED).interactions["__time"].to_list()
    assert whole == [9, 10**17, -4, 0, 9]


# --- C8: ids ------------------------------------------------------------------------------------------------------

BIG = [2**63 + 1, 2**64 - 1, 2**53 + 1]
IDS = [
        BIG, ["漢字", "é", "🎬"], ["x" * 10_000, " ", "0"], [1.0, 2.0, 3.0], [True, False, True],
    ]  # fmt: skip


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("make", [as_pandas, as_arrow])
def test_fault_C8_ids_of_every_kind_come_through_unchanged(ids: list[Any], make: Callable[[pl.DataFrame], Any]) -> None:
    frame = pl.DataFrame({"user_id": ids, "item_id": [2, 1, 0]})
    tables = check(make(frame.select("user_id").unique()), None, make(frame), PLAIN)
    expected = [str(i).lower() if isinstance(i, bool) else i for i in ids]
    assert tables.interactions["user_id"].to_list() == expected
    assert sorted(tables.users["user_id"].to_list()) == sorted(set(expected))


def test_fault_C8_users_with_and_without_ids_above_the_signed_range_still_match() -> None:
    everyone = pl.DataFrame({"user_id": [1, 2, 2**64 - 1]}, schema={"user_id": pl.UInt64})
    few = pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2]}, schema={"user_id": pl.UInt64, "item_id": pl.Int64})
    assert check(everyone, None, few, PLAIN).users["user_id"].to_list() == [1, 2, 2**64 - 1]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1.0, 2.5, 3.0, 4.0, 5.0], ["'user_id' holds fractions", "the first: 2.5", "text or integers", "cast it"]),
        ([1.0, 2.0**60, 3.0, 4.0, 5.0], ["floats from 2**53 on", "text or integers"]),
        (["a", "", "", "b", None], ["column 'user_id' has 3 missing ids (2 of them empty text) in 5 rows; fill them"]),
        (pl.Series(["a", "", "c", "b", "d"], dtype=pl.Categorical), ["has 1 missing ids (1 of them empty text)"]),
    ],
)
def test_fault_C8_fractional_and_missing_ids_are_refused(ids: list[Any], words: list[str]) -> None:
    refused(lambda: check(None, None, actions(user_id=ids), PLAIN), "interactions:", *words)


@pytest.mark.parametrize("ids", [["a", None, "b", "", "c"], [1.0, float("nan"), 2.0, None, 3.0]])
def test_rows_without_an_id_are_left_out_on_purpose(ids: list[Any]) -> None:
    given = actions(user_id=ids, session_id=[1, 1, 2, 2, 3])
    shown = refused(
        lambda: check(None, None, given, PLAIN),
        "user_id' has 2 missing ids",
        "in 5 rows; fill them, or set schema.missing = 'drop' to leave",
    )
    assert shown.endswith("these rows out, or set schema.user_id = 'session_id' for visits in place of users")
    schema = PLAIN.model_copy(update={"missing": "drop"})
    found = check(None, None, given, schema)
    assert found.notes[0] == "interactions: 2 of 5 rows have no id in 'user_id' or 'item_id'; left out"
    kept = [i for i in ids if i and i == i]
    assert found.interactions["user_id"].to_list() == kept
    assert found.interactions["user_id"].dtype == (pl.String if "a" in kept else pl.Int64)
    refused(
        lambda: check(None, None, actions(user_id=[None] * 5), schema), "5 of 5 rows have no id", "no other row is left"
    )
    table = {"user_id": ids, "age": [1, 2, 3, 4, 5]}
    refused(
        lambda: check(table, None, actions(user_id=[kept[0]] * 5), PLAIN), "users: column 'user_id' has 2 missing ids"
    )
    assert check(table, None, actions(user_id=[kept[0]] * 5), schema).users["age"].to_list() == [1, 3, 5]


@pytest.mark.parametrize("side", ["user", "item"])
def test_ids_that_the_users_or_items_lack_are_refused(side: str) -> None:
    key, option = f"{side}_id", f"unknown_{side}s"
    ids = actions()[key]
    known = {key: sorted(set(ids) - {ids[0]})}
    schema = PLAIN.model_copy(update={option: "error"})
    refused(
        lambda: check(known if side == "user" else None, known if side == "item" else None, actions(), schema),
        f"interactions: 1 of 3 ids of '{key}' are not in {side}s (the first: {ids[0]}; 2 of 5 interactions)",
        f"add them to {side}s, or set schema.{option} = 'add' or 'drop'",
    )


# --- C9: damaged files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("far.csv", b"id,n\n" + b"1,a\n" * 12_000 + "2,é\n".encode("latin-1"), "line 12002 is not UTF-8"),
        ("wide.tsv", "id\tn\n1\té\n".encode("utf-16"), "line 1 is not UTF-8"),
        (
            "ragged.csv",
            b"a,b\n1,2,3\n",
            "a line has more values than the first line; put a value that holds the separator",
        ),
        ("mac.csv", b"id,n\r1,1\r2,1\r", "its lines end with a carriage return alone"),
        ("book.csv", b"PK\x03\x04\xd2\n", "is no text but a workbook"),
        ("no.parquet", b"", "cannot be read as parquet"),
        ("text.parquet", b"a,b\n1,2\n" * 9, "is the file complete?"),
        ("table.xlsx", b"PK", "found a '.xlsx' file, expected .csv, .tsv, .txt or .parquet; convert or rename"),
    ],
)
def test_fault_C9_a_file_that_cannot_be_read_is_named_with_the_reason(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    refused(lambda: read_file(path), f"{path}: ", words)


def test_fault_C9_a_damaged_gzip_is_refused_by_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An end of file within it is no end of standard input, which would be an interrupt."""
    numbers = np.random.default_rng(0).integers(0, 9999, 4000)
    whole = gzip.compress("\n".join(["user,item", *(f"{n},{n * 7919 % 9973}" for n in numbers)]).encode(), mtime=0)
    for name, data in {"cut": whole[:-99], "noise": whole[:400] + b"\xff" * 99 + whole[499:]}.items():
        (tmp_path / f"{name}.csv.gz").write_bytes(data)
        for verb in ("suggest", "data stats"):
            assert run_command([*verb.split(), str(tmp_path / f"{name}.csv.gz")]) == 2, verb
            error = capsys.readouterr().err.splitlines()[-1]  # after lines of progress on a slow machine
            assert error.startswith("error: ")
            assert f"{name}.csv.gz: cannot be read" in error
            assert "is the file complete?" in error


def test_fault_C9_parquet_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    everything()[1].write_parquet(path)
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 25).astype(int):
        path.write_bytes(whole[:length])
        refused(lambda: read_file(path), f"{path}: cannot be read as parquet", "is the file complete?")


@pytest.mark.parametrize(("name", "what"), [("none.csv", "no such file"), ("*.csv", "no file found")])
def test_fault_C9_a_missing_file_is_refused(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "folder").mkdir()
    refused(lambda: check(tmp_path / name, None, actions(), PLAIN), f"{tmp_path / name}: {what}")


def test_a_folder_or_a_pattern_is_one_table_in_the_order_of_names(tmp_path: Path) -> None:
    for n, ids in (("b", ["007", "x"]), ("a", ["1", "2"])):
        pl.DataFrame({"id": ids, "v": [1, 2]}).write_csv(tmp_path / f"{n}.csv")
    (tmp_path / "_SUCCESS").touch()
    for source in (tmp_path, tmp_path / "*.csv"):
        assert read_file(source, Reading(frozenset("v")))["id"].to_list() == ["1", "2", "007", "x"], (
            "one text makes all of them text"
        )
    pl.DataFrame({"id": ["3"], "w": [1]}).write_csv(tmp_path / "c.csv")
    refused(
        lambda: read_file(tmp_path, Reading(frozenset("v"))),
        "c.csv: column 'v' is not as in a.csv; give all files the same columns",
    )
    pl.DataFrame({"v": [0.5], "id": ["3"]}).write_csv(tmp_path / "c.csv")  # another order, and another type of number
    assert read_file(tmp_path, Reading(frozenset("v")))["v"].to_list() == [1, 2, 1, 2, 0.5]
    pl.DataFrame({"id": ["3"], "v": ["y"]}).write_csv(tmp_path / "c.csv")
    assert read_file(tmp_path, Reading(frozenset("v")))["v"].to_list() == ["1", "2", "1", "2", "y"]


# --- whole tables -------------------------------------------------------------------------------------------------


@examples(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 9), st.integers(0, 5)), min_size=1))
def test_checking_equals_a_loop_and_is_the_same_twice(rows: list[tuple[int, int, int, int]]) -> None:
    # Two pairs besides, so that there are two users, two items and a positive.
    rows = [*rows, (8, 8, 0, 5), (9, 9, 0, 5)]
    schema = RATED
    last: dict[tuple[int, int], int] = {}
    for n, (user, item, at, _) in enumerate(rows):
        if (user, item) not in last or rows[last[user, item]][2] <= at:
            last[user, item] = n
    names = ["user_id", "item_id", "at", "stars"]
    tables = check(None, None, pl.DataFrame(rows, schema=names, orient="row"), schema)
    kept = tables.interactions
    assert kept.select(names).rows() == [rows[n] for n in sorted(last.values())]
    assert kept["__positive"].to_list() == [rows[n][3] > 3 for n in sorted(last.values())]
    again: Tables = check(tables.users, tables.items, kept, schema)
    assert again.interactions.equals(kept)
    assert again.notes == []


def test_a_description_counts_missing_and_distinct_values() -> None:
    frame = pl.DataFrame({"a": [1.0, None, math.nan], "b": [[1], [2], None], "c": [None, "x", "x"]})
    assert describe(frame) == [
        ("a", "Float64", 2, "3", "1.0"),
        ("b", "List(Int64)", 1, "–", "[1]"),
        ("c", "String", 1, "2", "x"),
    ]


# ---- ids of a CSV, and names a user may take


def test_ids_of_a_csv_are_integers_where_that_loses_nothing_and_text_where_the_other_table_needs_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "clicks.csv").write_text("uid,iid\n" + "".join(f"{n},a{n % 2}\n" for n in range(12_000)))
    schema = Schema(user_id="uid", item_id="iid", features=_ids_of("uid", "iid"))
    assert check(None, None, tmp_path / "clicks.csv", schema).users["uid"].dtype == pl.Int64
    (tmp_path / "late.csv").write_text((tmp_path / "clicks.csv").read_text() + "guest,a0\n")
    assert check(None, None, tmp_path / "late.csv", schema).users["uid"].to_list().count("guest") == 1
    users = pl.DataFrame({"uid": [str(n) for n in range(12_000)]})
    assert check(users, None, tmp_path / "clicks.csv", schema).interactions["uid"].dtype == pl.String


def _ids_of(user: str, item: str) -> tuple[Categorical, Categorical]:
    return Categorical(name=user, side="user"), Categorical(name=item, side="item")


LOOKALIKES = Schema(
    user_id="uid",
    item_id="iid",
    label="stars",
    positive_above=3,
    features=(
        *_ids_of("uid", "iid"),
        Categorical(name="zip", side="user"),
        Categorical(name="floor", side="user"),
        Categorical(name="member", side="user"),
        Numeric(name="age", side="user"),
        Categorical(name="version", side="item"),
        MultiHot(name="tags", side="item", separator="|"),
        Text(name="words", side="item"),
    ),
)
"""Of tables whose categories look like numbers."""


def lookalikes(folder: Path, separator: str = ",", pieces: int = 1) -> tuple[Path, Path, Path]:
    """Three tables of text files: each a file, or a folder of several."""
    tables = {
        "users": "uid,zip,floor,member,age\n1,02139,3,True,30\n2,2139,-1,False,4.50\n3,1e5,3,,0100\n4,,12,True,",
        "items": "iid,version,tags,words,sku\na,1.10,7,007,01000\nb,1.1,07,7,1000\nc,2024-01-01,7|8,12,1000\nd,,,,NA",
        "clicks": "uid,iid,stars\n1,a,5\n2,b,4.5\n3,c,0001\n4,d,5",
    }
    ending, paths = "tsv" if separator == "\t" else "csv", []
    for name, text in tables.items():
        header, *rows = text.replace(",", separator).split("\n")
        (folder / name).mkdir()
        for n in range(pieces):
            part = rows[n * 4 // pieces : (n + 1) * 4 // pieces]
            paths.append(folder / name / f"{n}.{ending}")
            paths[-1].write_text("\n".join([header, *part]) + "\n")
    return tuple(folder / n if pieces > 1 else folder / n / f"0.{ending}" for n in tables)  # type: ignore[return-value]


@pytest.mark.parametrize(("separator", "pieces"), [(",", 1), ("\t", 1), (",", 2)])
def test_fault_G10_categories_of_a_csv_are_text_however_much_they_look_like_numbers(
    separator: str, pieces: int, tmp_path: Path
) -> None:
    tables = check(*lookalikes(tmp_path, separator, pieces), LOOKALIKES)
    users, items = (f.to_dict(as_series=False) for f in (tables.users, tables.items))
    assert users["zip"] == ["02139", "2139", "1e5", None]
    assert items["version"] == ["1.10", "1.1", "2024-01-01", None]
    assert items["tags"] == ["7", "07", "7|8", None]
    assert items["words"] == ["007", "7", "12", None]
    assert items["sku"] == ["01000", "1000", "1000", "NA"], "a column that no feature reads may still be a filter's"
    # What its spelling does not lose is as it was; so are numbers.
    assert users["uid"] == [1, 2, 3, 4]
    assert users["floor"] == [3, -1, 3, 12]
    assert users["member"] == [True, False, None, True]
    assert users["age"] == [30.0, 4.5, 100.0, None]
    assert tables.interactions["stars"].to_list() == [5.0, 4.5, 1.0, 5.0]


def test_fault_G10_parquet_and_frames_keep_their_types(tmp_path: Path) -> None:
    paths = lookalikes(tmp_path)
    users = pl.read_csv(paths[0]).with_columns(pl.Series("zip", [2139.0, 2139.5, 1e5, None]))
    users.write_parquet(tmp_path / "users.parquet")
    tables = check(tmp_path / "users.parquet", *paths[1:], LOOKALIKES)
    assert tables.users["zip"].to_list() == [2139.0, 2139.5, 100_000.0, None]
    assert canonical_ids(tables.users["zip"]).to_list() == ["2139", "2139.5", "100000", None], (
        "a whole float is its integer"
    )


def test_fault_G10_a_column_that_a_numeric_feature_reads_too_is_one_of_numbers(tmp_path: Path) -> None:
    features = (*LOOKALIKES.features, Numeric(name="height", column="floor", side="user"))
    paths = lookalikes(tmp_path)
    paths[0].write_text(paths[0].read_text().replace("3,True", "03,True"))
    found = check(*paths, LOOKALIKES.model_copy(update={"features": features})).users
    assert found["floor"].to_list() == [3, -1, 3, 12]


def test_fault_G10_a_look_at_a_table_shows_what_whole_numbers_would_lose(tmp_path: Path) -> None:
    users, items, _ = lookalikes(tmp_path)
    shown = {
        name: (kind, example)
        for name, kind, _, _, example in (*describe(read_file(users)), *describe(read_file(items)))
    }
    assert shown["sku"] == ("String", "01000")
    assert shown["floor"] == ("Int64", "3")
    assert shown["age"] == ("Float64", "30.0")
    users.write_text("uid,zip\n1,02139\n2,2139\n")
    assert read_file(users)["zip"].to_list() == ["02139", "2139"]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_fault_G22_a_header_that_names_a_column_twice_is_refused(ending: str, tmp_path: Path) -> None:
    paths = [p.rename(p.with_suffix(f".{ending}")) for p in lookalikes(tmp_path, "," if ending == "csv" else "\t")]
    for path, name in zip(paths, ("age", "sku", "stars"), strict=True):
        before = path.read_text()
        header, rest = before.split("\n", 1)
        path.write_text(header.replace("iid", name).replace("zip", name) + "\n" + rest)
        if name == "stars":
            path.write_text(header.replace("uid", "stars") + "\n" + rest)
        for look in (lambda: check(paths[0], paths[1], paths[2], LOOKALIKES), lambda: read_file(path)):  # noqa: B023
            refused(look, f"{path}: the header names column '{name}' twice; rename or remove one of them")
        path.write_text(before)
    check(paths[0], paths[1], paths[2], LOOKALIKES)


def test_fault_G19_columns_of_the_packages_names_are_not_taken_for_its_own() -> None:
    """Interactions of which the schema names no time have the order of their rows, whatever they hold."""
    n = 20
    given = {
        "user_id": [i % 4 for i in range(n)],
        "item_id": [i // 4 for i in range(n)],
        "__time": list(range(n, 0, -1)),
    }
    tables = check(None, None, given | {"__positive": [False] * n, "__row": [1] * n}, PLAIN)
    assert build_dataset(tables, PLAIN, SplitConfig()).times.tolist() == [*range(n)]
    with pytest.raises(DataError, match="'last' needs a time"):
        build_dataset(tables, PLAIN, SplitConfig(kind="last"))
