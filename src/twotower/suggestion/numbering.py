"""Numbers of the rows of each user: places in histories."""

from __future__ import annotations

import polars as pl

MIN_NUMBERED = 20
"""Rows beyond the first of their users from which numbers that fit are no chance."""


def numbers_rows(frame: pl.DataFrame, user_id: str, column: str) -> bool:
    """Return True for a column of whole numbers that counts the rows of each user, without gap or repeat, from one first number
    for all."""
    if not {user_id, column} <= {*frame.columns} or user_id == column:
        return False
    values = frame[column]
    if not values.dtype.is_integer() or values.null_count() or not len(values):
        return False
    first = values.min()
    assert isinstance(first, int)
    value = pl.col(column)
    of_users = frame.group_by(user_id).agg(n=pl.len(), distinct=value.n_unique(), low=value.min(), high=value.max())
    if len(frame) - len(of_users) < MIN_NUMBERED:
        return False
    n, distinct, low, high = (pl.col(name) for name in ("n", "distinct", "low", "high"))
    fits = (distinct == n) & (low == first) & (high.cast(pl.Int128) - first + 1 == n)
    return bool(of_users.select(fits.all()).item())
