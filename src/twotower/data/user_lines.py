"""Text files with one user a line: the user, then the user's items, oldest first."""

from __future__ import annotations

from pathlib import Path

import polars as pl

_NO_SEPARATOR = "\x1f"
"""A character that no line is expected to hold, so that polars reads whole lines."""


def scan_user_lines(path: Path, user: str, item: str, separator: str) -> pl.LazyFrame:
    """Return the interactions of a file, in its order, as text in the columns `user` and `item`. A line of a user alone has
    none; a separator at the end of a line, and repeated ones, count as one."""
    lines = pl.scan_csv(
        path, separator=_NO_SEPARATOR, has_header=False, new_columns=["line"], quote_char=None, infer_schema=False, glob=False
    )  # fmt: skip
    values = pl.col("line").str.strip_chars(f"{separator}\r").str.split(separator)
    return (
        lines.select(values.alias("values"))
        .select(pl.col("values").list.first().alias(user), pl.col("values").list.slice(1).alias(item))
        .explode(item)
        .filter(pl.col(item) != "")
    )


def read_first_line(path: Path) -> str:
    """Return the first line of a file that is not empty; "" without one."""
    lines = pl.scan_csv(
        path, separator=_NO_SEPARATOR, has_header=False, quote_char=None, infer_schema=False, glob=False
    )
    found = lines.head(1).collect().to_series()
    return str(found[0] or "") if len(found) else ""


def with_places(table: pl.LazyFrame, column: str, first: int = 0) -> pl.LazyFrame:
    """Add a column with the place of each row, from `first`, as Int64."""
    return table.with_row_index(column).with_columns(pl.col(column).cast(pl.Int64) + first)
