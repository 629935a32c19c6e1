"""Items are allowed and excluded by id, by the value of a column, and by what a user has seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal

import numpy as np
import polars as pl
import pytest
from model_worlds import not_none

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import ItemRow
from twotower.data.ids import ItemIds
from twotower.errors import DataError
from twotower.features.schema import Schema
from twotower.retrieval.filters import CatalogueFilters, Condition, RowCache
from twotower.retrieval.request import Answer, Request
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run


def ids(answer: Answer) -> list[str]:
    return [i.id for i in answer.items]


def of_column(values: pl.Series) -> CatalogueFilters:
    """Filters of items that have one column, `held`."""
    none = np.zeros(0, np.int64)
    ids = pl.Series([f"i{i}" for i in range(len(values))])
    return CatalogueFilters(
        pl.DataFrame({"held": values}),
        ItemIds(ids, ItemRow),
        Schema(),
        Ragged.from_pairs(none, none.astype(np.int32), 1),
    )


def test_filters_and_bans(retriever: Retriever, run: Run) -> None:
    everything_left = ids(retriever.recommend(Request("u5"), 40))
    seen = {str(run.dataset.items.ids[int(i)]) for i in run.dataset.pairs.item[run.dataset.pairs.user == 5]}
    assert set(everything_left) == {f"i{i}" for i in range(40)} - seen
    assert retriever.recommend(Request("u5"), 40).truncated
    assert ids(retriever.recommend(Request("u5"), 5, ban=everything_left[:3])) == everything_left[3:8]
    assert set(ids(retriever.recommend(Request("u5"), 40, keep_seen=True))) == {f"i{i}" for i in range(40)}
    brand = ids(retriever.recommend(Request("u5"), 40, where={"brand": "brand2"}))
    assert brand == [i for i in everything_left if int(i[1:]) % 5 == 2]
    tagged = ids(retriever.recommend(Request("u5"), 40, where={"tags": "t2"}))
    assert tagged == [i for i in everything_left if int(i[1:]) % 4 == 3]
    # A whole number is one value however a table holds it.
    for year, is_there in (("1993", True), ("1993.0", True), ("-1", False)):
        found = ids(retriever.recommend(Request("u5"), 40, where={"year": year}))
        assert found == [i for i in everything_left if int(i[1:]) % 8 == 3] * is_there
    assert ids(retriever.recommend(Request("u5"), 3, where={"brand": "\udcff"})) == []
    assert ids(
        retriever.recommend(Request("u5"), 3, allow=["i1", "i2", "zz"], keep_seen=True, where={"brand": "brand1"})
    ) == ["i1"]
    assert ids(retriever.recommend(Request("nobody"), 40, where={"brand": "brand2"}, ban=["i2"])) == [
        i for i in ids(retriever.recommend(Request("nobody"), 40)) if int(i[1:]) % 5 == 2 and i != "i2"
    ]


@pytest.mark.parametrize("sequence", [np.array, pl.Series, tuple], ids=["numpy", "polars", "tuple"])
@pytest.mark.parametrize("banned", [["i3", "i9", "zz"], ["i3"], []], ids=len)
def test_bans_may_be_any_sequence(
    retriever: Retriever, sequence: Callable[[list[str]], list[str]], banned: list[str]
) -> None:
    for who in ("u5", "nobody"):
        wanted = ids(retriever.recommend(Request(who), 40, ban=banned, keep_seen=True))
        assert len(wanted) == 40 - len({"i3", "i9"} & set(banned))
        assert ids(retriever.recommend(Request(who), 40, ban=sequence(banned), keep_seen=True)) == wanted


def test_a_filter_gives_the_same_rows_when_it_is_cached(retriever: Retriever) -> None:
    filters: list[dict[str, str]] = [
        {"brand": "brand2"},
        {"tags": "t1"},
        {"brand": "brand2", "tags": "t1"},
        {"year": "-1"},
    ]
    for _ in range(2):
        for where in filters:
            rows = set(range(40))
            for column, value in where.items():
                rows &= {
                    r
                    for r in range(40)
                    if value in (f"brand{r % 5}", *(f"t{t}" for t in range(r % 4))) and column != "year"
                }
            assert set(ids(retriever.recommend(Request("u5"), 40, keep_seen=True, where=where))) == {
                f"i{r}" for r in rows
            }
            assert not_none(retriever.filters.allowed(["i2", "i7", "zz"], where)).tolist() == sorted(rows & {2, 7})
    with pytest.raises(DataError, match="no column 'brnd'"):
        retriever.filters.allowed(None, {"brand": "brand2", "brnd": "x"})


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (pl.Series([[0.0, 1.0, 1.0], [1.5], None, [], [10.0, None, float("nan")], [1.0]]),
         {"1": [0, 5], "1.0": [0, 5], "1.50": [1], "10": [4], "1.": [0, 5]}),
        (pl.Series([[0.5], None, [2.5], [2.0, 0.5], [], [1.0]], dtype=pl.List(pl.Float32)),
         {"0.5": [0, 3], "2": [3], "2.0": [3], "1": [5]}),
        (pl.Series([[Decimal("1.0")], [Decimal("1.5"), Decimal(1)], None, [], [Decimal(10)], []],
                   dtype=pl.List(pl.Decimal(6, 2))),
         {"1": [0, 1], "1.00": [0, 1], "1.5": [1], "10": [4]}),
        (pl.Series([[1, 2], None, [2], [], [None], [1]]), {"1": [0, 5], "1.0": [0, 5], "2": [0, 2], "5": []}),
        (pl.Series([["1.0", "x"], None, ["1"], [], [""], ["x", "x"]]), {"1": [2], "1.0": [0], "x": [0, 5], "": [4]}),
        (pl.Series([[True], [False], None, [True, True], [], []]), {"true": [0, 3], "false": [1]}),
        (pl.Series([1.0, 1.5, None, 2.0, 10.0, 1.0]), {"1": [0, 5], "1.0": [0, 5], "1.50": [1], "10": [4]}),
    ],
)  # fmt: skip
def test_a_value_of_a_list_is_spelled_as_one_of_a_column(values: pl.Series, found: dict[str, list[int]]) -> None:
    filters = of_column(values)
    for value, rows in found.items():
        assert not_none(filters.allowed(None, {"held": value})).tolist() == rows, value


NOON = datetime(2024, 1, 31, 12, 30)
NUMBERS = [1, 2**53, 2**53 + 1, None]
UTC_COLUMN = pl.Series([NOON, NOON.replace(hour=0, minute=0), None]).dt.replace_time_zone("UTC")
NANOSECONDS = pl.Series([1_706_704_200_000_000_000 + n for n in (0, 1, 500_000)]).cast(pl.Datetime("ns"))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (pl.Series(NUMBERS), {"1": 0, " +1 ": 0, "1e0": 0, "9007199254740993": 2}),
        (pl.Series([1e20, 0.1, float("nan")]), {"1e20": 0, "1E+20": 0, "100000000000000000000": 0, ".1": 1}),
        (pl.Series([0.1], dtype=pl.Float32), {"0.1": 0}),
        (pl.Series([True, False, None]), {"True": 0, "TRUE": 0, "1": 0, "False": 1, "0": 1}),
        (pl.Series([NOON.date(), None]), {"2024-01-31": 0, "20240131": 0, "2024-01-31T00:00:00": 0}),
        (pl.Series([NOON.time(), None]), {"12:30": 0, "12:30:00.000": 0}),
        (NANOSECONDS, {"2024-01-31T12:30:00.000000001": 1, "2024-01-31 12:30:00.0005": 2}),
        *(
            (column, {"2024-01-31T12:30:00": 0, "2024-01-31 12:30": 0, "2024-01-31T12:30:00.000Z": 0,
                      "2024-01-31 13:30:00+01:00": 0, "2024-01-31": 1})
            for column in (UTC_COLUMN, UTC_COLUMN.dt.replace_time_zone(None), UTC_COLUMN.dt.cast_time_unit("ms"))
        ),
        (UTC_COLUMN.dt.convert_time_zone("Europe/Berlin"), {"2024-01-31 13:30:00+01:00": 0, "2024-01-31T12:30:00Z": 0}),
    ],
    ids=lambda given: str(getattr(given, "dtype", "")),
)  # fmt: skip
def test_usual_spellings_of_a_value_find_it(values: pl.Series, found: dict[str, int]) -> None:
    filters = of_column(values)
    for value, row in found.items():
        assert not_none(filters.allowed(None, {"held": value})).tolist() == [row], value


@pytest.mark.parametrize(
    ("values", "refused", "such"),
    [
        (pl.Series(NUMBERS), ["many", "", "1.5", "1e20", "1_0", "nan", "1e999999999", str(2**63)], "1"),
        (pl.Series([float("nan"), 0.5]), ["nan", "-inf", "1e400", "0,5", "true"], "0.5"),
        (pl.Series([Decimal("1.50")]), ["1.505", "1e40", "1e-100", "nan", "x"], "1.50"),
        (pl.Series([[True], [False]]), ["yes", "2"], "true"),
        (pl.Series([NOON.date()]), ["31.01.2024", "2024-01-31T12:30", "1706704200"], "2024-01-31"),
        (pl.Series([NOON.time()]), ["T12:30", "12:30Z", "25:00"], "12:30:00"),
        (pl.Series([NOON]), ["1706704200", "2024-01-31 12:30:00.000000001", "noon"], "2024-01-31 12:30:00.000000"),
        (UTC_COLUMN.dt.convert_time_zone("Europe/Berlin"), ["2024-01-31 12:30"], "2024-01-31 13:30:00.000000+01:00"),
    ],
    ids=lambda given: str(getattr(given, "dtype", "")),
)
def test_a_value_that_the_type_cannot_hold_is_refused_with_one_that_it_holds(
    values: pl.Series, refused: list[str], such: str
) -> None:
    filters = of_column(values)
    for value in refused:
        with pytest.raises(DataError, match=re.escape(f"not '{value}'; expected a value such as '{such}'")):
            filters.allowed(None, {"held": value})
    assert not_none(filters.allowed(None, {"held": such})).tolist() == [values.len() - 1 if "0,5" in refused else 0]


@pytest.mark.parametrize("values", [pl.Series([[[1]], [[2]]]), pl.Series([timedelta(hours=1)]), pl.Series([b"1"])])
def test_a_type_without_comparable_values_is_refused(values: pl.Series) -> None:
    with pytest.raises(DataError, match="column 'held' holds .*which cannot be compared"):
        of_column(values).allowed(None, {"held": "1"})


def test_the_cache_keeps_the_latest_rows_within_its_limits() -> None:
    found: list[tuple[Condition, ...]] = []

    def find(key: tuple[Condition, ...]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        found.append(key)
        return np.arange(int(key[0][1]))

    cache = RowCache(max_rows=10, max_entries=3)
    for size in ("1", "2", "3", "1", "4"):  # 2 is the least recent when 4 needs its place
        assert len(cache.get((("n", size),), find)) == int(size)
    for size in ("3", "1", "4"):
        cache.get((("n", size),), find)
    assert [key[0][1] for key in found] == ["1", "2", "3", "4"]
    cache.get((("n", "9"),), find)
    assert len(cache) == 1
