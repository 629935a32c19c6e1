"""Text files with one user a line: the user, then the user's items, oldest first."""

from __future__ import annotations

import re

import polars as pl

from twotower.data.table_path import TablePath

_NO_SEPARATOR = "\x1f"
"""A character that no line is expected to hold, so that polars reads whole lines."""


def scan_user_lines(path: TablePath, user: str, item: str, separator: str) -> pl.LazyFrame:
    """Return the interactions of a file, in its order, as text in the columns `user` and `item`. A line of a user alone
    has none; a separator at the end of a line, and repeated ones, count as one. With a space as separator a tab is one
    too. Double quotes around a value are not part of it, and a separator between them is."""
    values = pl.col("line").str.extract_all(_value(separator))
    return (
        _scan_lines(path)
        .select(values.alias("values"))
        .select(pl.col("values").list.first().alias(user), pl.col("values").list.slice(1).alias(item))
        .explode(item)
        .with_columns(_unquoted(user), _unquoted(item))
        .filter(pl.col(item) != "")
    )


def read_first_values(path: TablePath, separator: str) -> list[str]:
    """Return the values of the first line of a file that is not empty, with their quotes; none without a line."""
    found = _scan_lines(path).select(pl.col("line").str.extract_all(_value(separator))).head(1).collect().to_series()
    return [str(value) for value in found[0]] if len(found) else []


def _scan_lines(path: TablePath) -> pl.LazyFrame:
    """Return the lines of a file that are not empty, in the column "line"."""
    lines = path.scan_csv(
        separator=_NO_SEPARATOR, has_header=False, new_columns=["line"], quote_char=None, infer_schema=False
    )
    return lines.select(pl.col("line").str.strip_chars("\r")).filter(pl.col("line") != "")


def _value(separator: str) -> str:
    """Return the pattern of a value of a line, with its quotes."""
    ends = re.escape(separator) + ("\t" if separator == " " else "")
    return f'"(?:[^"]|"")*"|[^{ends}]+'


def _unquoted(column: str) -> pl.Expr:
    """Return a column of text without double quotes around its values; two of them within are one."""
    text = pl.col(column)
    inner = text.str.slice(1, text.str.len_chars().cast(pl.Int64) - 2).str.replace_all('""', '"', literal=True)
    return pl.when(text.str.contains('^".*"$')).then(inner).otherwise(text).alias(column)


def with_places(table: pl.LazyFrame, column: str, first: int = 0) -> pl.LazyFrame:
    """Add a column with the place of each row, from `first`, as Int64."""
    return table.with_row_index(column).with_columns(pl.col(column).cast(pl.Int64) + first)
