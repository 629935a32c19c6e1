"""Files of one table with other types, or without a column, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from worlds import CHECKERBOARD_SCHEMA, checkerboard

from twotower.data import prepare
from twotower.data.buckets import in_user_order
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.prepare.options import PrepareOptions
from twotower.data.reading.readers import read_file
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.errors import DataError
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric

LATE = datetime(2026, 11, 1, 12, 0, 0, 123_456)


def written(folder: Path, *columns: pl.Series) -> Path:
    folder.mkdir(parents=True)
    for n, column in enumerate(columns):
        column.alias("v").to_frame().with_columns(n=pl.lit(n)).write_parquet(folder / f"part-{n}.parquet")
    return folder


def series(values: list[Any], dtype: Any) -> pl.Series:
    return pl.Series(values, dtype=dtype)


@pytest.mark.parametrize(
    ("one", "other", "dtype"),
    [
        (series([1], pl.Int32), series([2**40], pl.Int64), pl.Int64()),
        (series([200], pl.UInt8), series([-1], pl.Int16), pl.Int64()),
        (series([2**63], pl.UInt64), series([1], pl.UInt8), pl.UInt64()),
        (series([2**53], pl.Int64), series([0.5], pl.Float64), pl.Float64()),
        (series([0.5], pl.Float32), series([0.1], pl.Float64), pl.Float64()),
        (series([None], pl.Null), series([None], pl.Null), pl.Null()),
        (series([None], pl.Null), series(["a"], pl.String), pl.String()),
        (series(["a"], pl.String), series([None], pl.Null), pl.String()),
        (series(["a"], pl.Categorical), series(["b"], pl.String), pl.String()),
        (series([["a"]], pl.List(pl.Categorical)), series([["b"], []], pl.List(pl.String)), pl.List(pl.String())),
        (series([Decimal("1.5")], pl.Decimal(5, 1)), series([Decimal("0.25")], pl.Decimal(9, 2)), pl.Decimal(38, 2)),
        (series([Decimal("1.5")], pl.Decimal(5, 1)), series([7], pl.Int64), pl.Decimal(38, 1)),
        (series([LATE], pl.Datetime("ms")), series([LATE], pl.Datetime("us")), pl.Datetime("us")),
        (series([LATE], pl.Datetime("us")), series([LATE], pl.Datetime("ns")), pl.Datetime("us")),
    ],
)
def test_types_of_two_files_become_one_that_holds_both(
    tmp_path: Path, one: pl.Series, other: pl.Series, dtype: pl.DataType
) -> None:
    for name, columns in {"a": (one, other), "b": (other, one)}.items():
        found = read_file(written(tmp_path / name, *columns))["v"]
        assert found.dtype == dtype
        assert found.to_list() == [v for column in columns for v in column.to_list()]


@pytest.mark.parametrize("nested", [False, True])
def test_a_fraction_of_32_and_of_64_bits_is_one_category(tmp_path: Path, nested: bool) -> None:
    values = [0.1, -3.3, 1e-30, None, float("nan"), float("inf"), 1_234_567_936.0]  # the last is 1.234568e9 as a text
    one, other = (series([values] if nested else values, pl.List(t) if nested else t) for t in (pl.Float32, pl.Float64))
    found = read_file(written(tmp_path / "a", one, other))["v"]
    assert found.dtype == (pl.List(pl.Float64) if nested else pl.Float64)
    assert found.explode().equals(series(values * 2, pl.Float64))


def test_a_time_without_a_zone_is_one_of_utc_in_every_file(tmp_path: Path) -> None:
    plain = series([LATE], pl.Datetime("us"))
    zurich = plain.dt.replace_time_zone("UTC").dt.convert_time_zone("Europe/Zurich")
    found = read_file(written(tmp_path / "a", plain, zurich, plain.dt.replace_time_zone("UTC")))["v"]
    assert found.dt.epoch("us").n_unique() == 1
    assert found[0].replace(tzinfo=None) == LATE


def test_a_column_that_older_files_lack_has_no_values_there(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "0.parquet")
    pl.DataFrame({"b": [["x"]], "a": [2]}).write_parquet(tmp_path / "1.parquet")
    assert read_file(tmp_path).to_dict(as_series=False) == {"a": [1, 2], "b": [None, ["x"]]}


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (series([1], pl.Int64), series(["a"], pl.String), "part-1.parquet: column 'v' holds String, and Int64 in "),
        (series([LATE], pl.Datetime("us")), series([1], pl.Int64), "column 'v' holds Int64, and Datetime"),
        (series([0.5], pl.Float64), series([2**53 + 1], pl.Int64), "'v' holds 9007199254740993, which is no Float64"),
        (series([2**63], pl.UInt64), series([-1], pl.Int64), "part-0.parquet: column 'v' cannot be read as Int64"),
    ],
)
def test_types_that_no_type_holds_are_refused_with_both(
    tmp_path: Path, one: pl.Series, other: pl.Series, words: str
) -> None:
    with pytest.raises(DataError) as e:
        read_file(written(tmp_path / "a", one, other))
    assert words in str(e.value)


def test_a_file_of_nulls_is_not_said_to_hold_numbers(tmp_path: Path) -> None:
    nulls, number, text = series([None], pl.Null), series([1], pl.Int64), series(["a"], pl.String)
    with pytest.raises(DataError, match=r"part-2\.parquet: column 'v' holds String, and Int64 in .*part-1\.parquet"):
        read_file(written(tmp_path / "a", nulls, number, text))


PRICED = CHECKERBOARD_SCHEMA.model_copy(
    update={
        "time_unit": "s",
        "features": (*CHECKERBOARD_SCHEMA.features, Numeric(name="price", side="context", default=1.0)),
    }
)
SECONDS = pl.col("at") + 1_700_000_000
MISSING = pl.lit(None, pl.Float64)


@pytest.mark.parametrize(
    ("at", "older", "price"),
    [
        (SECONDS, {"user_id": pl.col("user_id").cast(pl.Int32), "price": pl.col("price").cast(pl.Int8)},
         pl.col("price")),
        (SECONDS, {"user_id": pl.col("user_id").cast(pl.Decimal(20, 2)), "price": pl.lit(None)}, MISSING),
        (SECONDS, {"price": None, "extra": pl.lit("x")}, MISSING),
        (pl.from_epoch(SECONDS).cast(pl.Datetime("us")),
         {"at": pl.col("at").cast(pl.Datetime("ms")).dt.replace_time_zone("UTC")}, pl.col("price")),
    ],
)  # fmt: skip
def test_a_lake_of_several_years_is_read_and_prepared_as_one_of_today(
    tmp_path: Path, at: pl.Expr, older: Mapping[str, pl.Expr | None], price: pl.Expr
) -> None:
    """`older` are the columns of the first file as they were (None: no column), `price` its column of today."""
    actions = checkerboard()[2].with_columns(at=at, price=pl.int_range(pl.len()).cast(pl.Float64) % 7)
    first, second = actions[:600], actions[600:]
    old = first.with_columns(**{name: value for name, value in older.items() if value is not None})
    old = old.drop(name for name, value in older.items() if value is None)
    found = []
    for name, begin in {"years": old, "today": first.with_columns(price=price)}.items():
        (tmp_path / name).mkdir()
        begin.write_parquet(tmp_path / name / "0.parquet")
        second.write_parquet(tmp_path / name / "1.parquet")
        data, split = DataConfig(interactions=str(tmp_path / name)), SplitConfig(kind="last")
        tables = check(None, None, data.interactions, PRICED)
        small = PrepareOptions(piece_rows=101, bucket_rows=150)
        made = prepare.write_prepared(data, PRICED, split, tmp_path / f"{name}.out", small)
        ordered = replace(tables, users=in_user_order(tables.users, PRICED.user_id))
        found += [build_dataset(ordered, PRICED, split), made]
    assert len({dataset.encoders.digest for dataset in found}) == 1
    assert len({str(rows(dataset)) for dataset in found}) == 1


@pytest.mark.parametrize("nulls", [(True,), (True, True), (True, False), (False, True)])
def test_a_column_of_nulls_is_read_and_prepared_as_one_of_missing_values(
    tmp_path: Path, nulls: tuple[bool, ...]
) -> None:
    """`nulls` says of each file of a table if its column has no type; it has no values either way."""
    context = Categorical(name="device", side="context"), Numeric(name="price", side="context")
    schema = PRICED.model_copy(update={"features": (*CHECKERBOARD_SCHEMA.features, *context)})
    actions = checkerboard()[2].with_columns(at=SECONDS, price=MISSING, device=pl.lit(None, pl.String))
    found = []
    for name, untyped in {"nulls": nulls, "typed": [False] * len(nulls)}.items():
        (tmp_path / name).mkdir()
        for n, is_null in enumerate(untyped):
            part = actions[n * 600 : None if n + 1 == len(nulls) else 600]
            lost = {"price": pl.lit(None), "device": pl.lit(None)} if is_null else {}
            part.with_columns(**lost).write_parquet(tmp_path / name / f"{n}.parquet")
        data, split = DataConfig(interactions=str(tmp_path / name)), SplitConfig(kind="last")
        tables = check(None, None, data.interactions, schema)
        ordered = replace(tables, users=in_user_order(tables.users, schema.user_id))
        made = prepare.write_prepared(data, schema, split, tmp_path / f"{name}.out", PrepareOptions(piece_rows=101))
        found += [build_dataset(ordered, schema, split), made]
    assert len({dataset.encoders.digest for dataset in found}) == 1
    assert len({str((rows(dataset), dataset.context["device"])) for dataset in found}) == 1


def test_missing_values_of_the_context_are_counted_alike(tmp_path: Path, messages: list[str]) -> None:
    actions = checkerboard()[2].with_columns(at=SECONDS, price=pl.int_range(pl.len()).cast(pl.Float64))
    actions[:600].drop("price").write_parquet(tmp_path / "0.parquet")
    actions[600:].with_columns(pl.when(pl.col("price") > 700).then("price")).write_parquet(tmp_path / "1.parquet")
    told = "interactions: 701 of 1200 values of 'price' are missing or not finite; imputed"
    assert told in check(None, None, str(tmp_path / "*.parquet"), PRICED).notes
    data = DataConfig(interactions=str(tmp_path / "*.parquet"))
    prepare.write_prepared(data, PRICED, SplitConfig(kind="last"), tmp_path / "out", PrepareOptions(piece_rows=101))
    assert told in messages


def rows(data: Dataset) -> list[tuple[Any, ...]]:
    """Return the interactions, with their part, time and price."""
    price = data.context["price"]
    return sorted(
        zip(
            data.pairs.user.tolist(),
            data.pairs.item.tolist(),
            data.parts.tolist(),
            data.times.tolist(),
            np.asarray(price).tolist(),
            strict=True,
        )
    )
