"""Values of Python, numpy and pandas as columns, of which no value is changed or lost."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import polars as pl
import pytest
from worlds import CHECKERBOARD_SCHEMA, checkerboard

from twotower.data.reading.readers import as_frame
from twotower.data.tables import check
from twotower.errors import DataError

NAN = float("nan")
COLUMNS: dict[str, tuple[list[Any], list[Any]]] = {
    "a fraction after a whole number": ([np.int64(1), 2.5], [1.0, 2.5]),
    "a fraction of numpy": ([None, np.int64(1), np.float64(2.5)], [None, 1.0, 2.5]),
    "a text after a number": ([np.int64(1), "a"], ["1", "a"]),
    "whole numbers beside a text": ([7.0, "8", np.float32(9), Decimal("10.00"), 2.5, NAN], ["7", "8", "9", "10", "2.5",
     None]),
    "large numbers beside a text": ([1e39, Decimal("9007199254740993.5"), Decimal("9007199254740993.0"), 2.0**53, "a"],
     ["1e+39", "9007199254740993.5", "9007199254740993", "9007199254740992.0", "a"]),
    "UUIDs": ([UUID(int=5), None], ["00000000-0000-0000-0000-000000000005", None]),
    "more than a byte": ([np.uint8(7), 300], [7, 300]),
    "more than 32 bits": ([np.int32(7), 2**40], [7, 2**40]),
    "a number after a truth value": ([np.bool_(True), 2], [1, 2]),
    "NaN among texts": (["a", NAN, np.nan], ["a", None, None]),
    "NaN among truth values": ([True, NAN], [True, None]),
    "NA": (["a", pd.NA], ["a", None]),
    "NaT": ([pd.Timestamp("2024-01-01"), pd.NaT], [pd.Timestamp("2024-01-01"), None]),
    "NaT of numpy": ([np.datetime64("2024-01-01"), np.datetime64("NaT"), np.datetime64("2024-01-01T01", "ns")],
     [datetime(2024, 1, 1), None, datetime(2024, 1, 1, 1)]),
    "NaT of numpy among durations": ([np.timedelta64(5 * 10**9, "ns"), np.timedelta64("NaT")], [timedelta(seconds=5),
     None]),
    "NaT of numpy among texts": (["a", np.datetime64("NaT")], ["a", None]),
    "a decimal NaN": ([Decimal("1.25"), Decimal("NaN"), Decimal("sNaN"), None], [Decimal("1.25"), None, None, None]),
    "a decimal NaN alone": ([Decimal("NaN")], [None]),
    "an infinite decimal": ([Decimal("1.25"), Decimal("-Infinity")], [1.25, -math.inf]),
    "lists of decimals": ([[Decimal("1.25"), Decimal("NaN")], []], [[Decimal("1.25"), None], []]),
    "lists of numpy": ([[np.int64(1)], [np.float64(2.5)], []], [[1.0], [2.5], []]),
    "arrays of two types": ([np.array([1, 2]), np.array([2.5])], [[1.0, 2.0], [2.5]]),
    "tuples": ([("a", "b"), ()], [["a", "b"], []]),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_any_values_keeps_them(name: str) -> None:
    given, expected = COLUMNS[name]
    objects = np.empty(len(given), object)
    objects[:] = given
    for table in ({"c": given}, {"c": objects}, pd.DataFrame({"c": pd.Series(given, dtype=object)})):
        assert as_frame(table, "t")["c"].to_list() == expected


@pytest.mark.parametrize("value", [np.datetime64("20200-01-01"), np.timedelta64(10**10, "D")])
def test_a_time_that_python_has_not_is_no_other_time(value: Any) -> None:
    objects = pd.DataFrame({"c": pd.Series([value], dtype=object)})
    with pytest.raises(DataError, match="is no time or duration of Python"):
        as_frame(objects, "t")


def test_arrays_of_one_type_keep_it() -> None:
    vectors = [np.array([0.5, 1.5], np.float32), np.array([2.5, 3.5], np.float32)]
    found = as_frame({"v": vectors, "n": range(2)}, "t")
    assert found.to_dict(as_series=False) == {"v": [[0.5, 1.5], [2.5, 3.5]], "n": [0, 1]}
    assert found["v"].explode().dtype == pl.Float32


def test_a_missing_id_in_a_mapping_is_no_user_called_nan() -> None:
    actions = checkerboard()[2].to_dict(as_series=False)
    actions["user_id"] = [f"u{user}" for user in actions["user_id"]]
    actions["user_id"][3] = NAN
    with pytest.raises(DataError, match="interactions: column 'user_id' has 1 missing ids"):
        check(None, None, actions, CHECKERBOARD_SCHEMA)
