"""Columns of a table of many Parquet files, whose types differ or which older files lack, as in a lake that grows for
years."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from twotower.data.reading.table_path import TablePath
from twotower.errors import DataError, first_line
from twotower.features.values import TEXT_TYPES


def common_types(paths: Sequence[TablePath], schemas: Sequence[pl.Schema]) -> dict[str, pl.DataType]:
    """Return the columns of all files, in the order in which they come, each with a type that holds the values of every
    file.

    Raises DataError for a column whose types have none, such as text and numbers, with the files that hold them."""
    found, first = dict[str, pl.DataType](), dict[str, TablePath]()
    for path, schema in zip(paths, schemas, strict=True):
        for name, dtype in schema.items():
            common = _common(found[name], dtype) if name in found else dtype
            if common is None:
                raise DataError(
                    f"{path}: column '{name}' holds {dtype}, and {found[name]} in {first[name]}; give all files one "
                    "type"
                )
            if found.get(name, pl.Null()) == pl.Null:
                first[name] = path  # a column of nulls says nothing about the type
            found[name] = common
    return found


def _common(one: pl.DataType, other: pl.DataType) -> pl.DataType | None:
    """Return a type for the values of both, None if there is none."""
    if one == other or other == pl.Null:
        return one
    if one == pl.Null:
        return other
    if one.is_integer() and other.is_integer():
        return pl.Int64() if one.is_signed_integer() or other.is_signed_integer() else pl.UInt64()
    if isinstance(one, pl.Decimal) or isinstance(other, pl.Decimal):
        scales = [t.scale if isinstance(t, pl.Decimal) else 0 for t in (one, other)]
        is_exact = all(isinstance(t, pl.Decimal) or t.is_integer() for t in (one, other))
        return pl.Decimal(38, max(scales)) if is_exact else None
    if one.is_numeric() and other.is_numeric():
        return pl.Float64()
    if isinstance(one, pl.Datetime) and isinstance(other, pl.Datetime):
        zone = one.time_zone if one.time_zone == other.time_zone else "UTC"  # a time without a zone is one of UTC
        return pl.Datetime("ms" if {one.time_unit, other.time_unit} == {"ms"} else "us", zone)
    if isinstance(one, pl.List) and isinstance(other, pl.List):
        inner = _common(pl.Series(dtype=one.inner).dtype, pl.Series(dtype=other.inner).dtype)
        return None if inner is None else pl.List(inner)
    return pl.String() if one in TEXT_TYPES and other in TEXT_TYPES else None


def with_types(path: TablePath, frame: pl.DataFrame, types: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Return the columns `types` of a file as these types, without values where it lacks them. Raises DataError for a
    number that another type does not hold, such as 2**53 + 1 among fractions."""
    return pl.DataFrame([_as_type(path, frame, name, dtype) for name, dtype in types.items()])


def _as_type(path: TablePath, frame: pl.DataFrame, name: str, dtype: pl.DataType) -> pl.Series:
    if name not in frame.columns:
        return pl.Series(name, [None], dtype).new_from_index(0, frame.height)
    given = frame[name]
    if given.dtype == dtype:
        return given
    if given.dtype == pl.Float32 and dtype == pl.Float64:
        return frame.select(_widened(pl.col(name))).to_series()
    if given.dtype == pl.List(pl.Float32) and dtype == pl.List(pl.Float64):
        return given.list.eval(_widened(pl.element()))
    if isinstance(dtype, pl.Datetime) and isinstance(given.dtype, pl.Datetime):
        if dtype.time_zone and not given.dtype.time_zone:
            given = given.dt.replace_time_zone("UTC")
        return given.cast(dtype)
    try:
        cast = given.cast(dtype)
    except pl.exceptions.PolarsError as e:
        raise DataError(
            f"{path}: column '{name}' cannot be read as {dtype}, as other files have it ({first_line(e)})"
        ) from None
    if given.dtype.is_integer() and dtype.is_float():
        lost = given.filter(~cast.cast(given.dtype, strict=False).eq_missing(given))
        if lost.len():
            raise DataError(
                f"{path}: column '{name}' holds {lost[0]}, which is no {dtype}, as other files have it; give all files "
                "one type"
            )
    return cast


def _widened(number: pl.Expr) -> pl.Expr:
    """Return numbers of 32 bits as the numbers of 64 bits that are spelled alike, so that 0.1 of both is one category.
    Whole numbers, such as ids, keep their value."""
    wide = number.cast(pl.Float64)
    return pl.when(wide == wide.floor()).then(wide).otherwise(number.cast(pl.String).cast(pl.Float64))
