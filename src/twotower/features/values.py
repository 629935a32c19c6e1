"""Values of columns: ids in one form, numbers, lists."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import polars as pl

from twotower.arrays.ragged import Ragged, Values
from twotower.arrays.types import Codes, Doubles, Ints
from twotower.errors import DataError

TEXT_TYPES = (pl.String, pl.Categorical, pl.Enum)
"""Types of a text column; the categories of pandas are dictionaries of texts."""

UNKNOWN = 0
"""Embedding row of values below the frequency cut and values never seen in training."""

SINGLE_ROW_MAX_VALUES = 400
"""Most values of a list or characters of a text that a single row encodes without data frames, which is faster."""

_NUMBER = r"^[-+]?(0|[1-9]\d*)(\.\d+)?$"
"""Printed numbers, without leading zeros."""


def canonical_ids(series: pl.Series) -> pl.Series:
    """Return a scalar column as Int64, UInt64 or String. 7, 7.0 and '7' are one value in any column."""
    dtype = series.dtype
    if dtype.is_float():
        series = series.fill_nan(None)
        whole = series.is_finite() & (series == series.floor()) & (series.abs() < 2**53)
        integers = series.cast(pl.Int64, strict=False)
        if whole.all():
            return integers
        return integers.cast(pl.String).zip_with(whole.fill_null(False), series.cast(pl.String))
    if isinstance(dtype, pl.Decimal):
        text = series.cast(pl.String)
        if dtype.scale:
            text = text.str.strip_chars_end("0").str.strip_chars_end(".")
        integers = text.cast(pl.Int64, strict=False)
        return integers if integers.null_count() == text.null_count() else text
    if dtype.is_integer():
        for width in (pl.Int64, pl.UInt64):
            integers = series.cast(width, strict=False)
            if integers.null_count() == series.null_count():
                return integers
    try:
        if not dtype.is_nested():
            return series.cast(pl.String)
    except pl.exceptions.PolarsError:
        pass
    raise DataError(
        f"column '{series.name}': found {dtype}, expected one value a row (text, integers or booleans); "
        "cast it, or choose another kind of feature"
    )


def with_texts(frame: pl.DataFrame) -> pl.DataFrame:
    """Return a table with dictionaries of texts, and lists of them, as texts."""
    nested = [s.cast(pl.List(pl.String)) for s in frame if isinstance(s.dtype, pl.List) and s.dtype.inner in TEXT_TYPES]
    return frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String), *nested)


def numbers(series: pl.Series) -> Doubles:
    """Return a numeric column as float64, NaN for nulls and non-finite values. Raises DataError for another type."""
    if not (series.dtype.is_numeric() or series.dtype in (pl.Boolean, pl.Null)):
        raise DataError(
            f"column '{series.name}': found {series.dtype}, expected numbers; "
            f"{advice_on_text(series, may_be_empty=True)}; or make it categorical"
        )
    x = np.array(series.cast(pl.Float64).to_numpy())  # a null is nan
    x[~np.isfinite(x)] = np.nan
    return x


def bucket_codes(x: Doubles, edges: Sequence[float]) -> Codes:
    """Return the codes of the buckets between rising `edges`, from 1 on; `UNKNOWN` for numbers that are not finite."""
    codes = np.searchsorted(np.asarray(edges), x, side="right").astype(np.int32) + 1
    codes[~np.isfinite(x)] = UNKNOWN
    return codes


def are_numbers(series: pl.Series) -> bool:
    """Return True for a text column of numbers, without codes such as 0042."""
    present = series.drop_nulls() if series.dtype == pl.String else series.head(0)
    return bool(len(present)) and bool(present.str.contains(_NUMBER).all())


def advice_on_text(series: pl.Series, may_be_empty: bool = False) -> str:
    """Return advice for a column that should hold numbers. `may_be_empty`: values may be missing."""
    texts = series.str.strip_chars() if series.dtype == pl.String else pl.Series([], dtype=pl.String)
    if not len(odd := texts.filter(texts.cast(pl.Float64, strict=False).is_null() & (texts != ""))):
        return "cast it"
    first = f"the first that is none is '{odd[0]:.40}'"
    if re.fullmatch(r"[-+\d.,]+", odd[0]):
        return (
            f"{first}: write a decimal point, and no separators of thousands (data.format.decimal = ',' reads decimal "
            "commas of text files whose values no comma separates)"
        )
    number = "give a number in its place"
    return f"{first}: {f'leave it empty, or {number}' if may_be_empty else f'{number}, or drop the rows'}"


def cast_value(given: pl.Series, dtype: pl.DataType, category: bool) -> pl.Series:
    """Return a given value as the type of its column; among categories "007" is not 7. Raises PolarsError."""
    column = given.cast(dtype, strict=True) if given.dtype != dtype else given
    given_type, kept = (t.inner if isinstance(t, pl.List | pl.Array) else t for t in (given.dtype, dtype))
    return given if category and kept.is_integer() and (given_type == pl.String or given_type.is_float()) else column


def present(values: pl.Series) -> pl.Series:
    """Return the values without nulls and empty texts."""
    values = values.drop_nulls()
    return values.filter(values != "") if values.dtype in TEXT_TYPES else values


def is_long(texts: pl.Series) -> bool:
    return texts.dtype == pl.String and bool((texts.str.len_chars() > SINGLE_ROW_MAX_VALUES).any())


def one_row(codes: list[int]) -> Ragged:
    return Ragged(np.array(codes, np.int32), np.array([0, len(codes)]))


def lists(series: pl.Series, separator: str) -> pl.Series:
    """Return a list column, or a text column split at the separator. Raises DataError for another type."""
    if separator and series.dtype in TEXT_TYPES:
        series = series.cast(pl.String).str.split(separator)
    elif isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if series.dtype == pl.Null:
        series = series.cast(pl.List(pl.String))
    if not isinstance(series.dtype, pl.List):
        raise DataError(
            f"column '{series.name}': found {series.dtype}, expected lists, or text and the feature's separator; "
            "set separator, or make it categorical"
        )
    return series


def explode(series: pl.Series, separator: str) -> tuple[Ints, pl.Series]:
    """Return the flat row indices and values of a list column, without nulls and empty texts."""
    series = lists(series, separator)
    flat = series.to_frame("value").with_row_index("row").explode("value").filter(pl.col("value").is_not_null())
    if flat["value"].dtype in TEXT_TYPES:
        flat = flat.filter(pl.col("value") != "")
    return flat["row"].to_numpy().astype(np.int64), flat["value"].rename(series.name)


def missing_count(series: pl.Series) -> int:
    """Return the number of nulls, NaN and infinities."""
    n = series.null_count()
    if series.dtype.is_float():
        n += int((~series.drop_nulls().is_finite()).sum())
    return n


def is_unknown(encoded: Values) -> bool:
    """Return True if an encoded row holds only the code of unknown values."""
    return encoded.dtype == np.int32 and not encoded.any()
