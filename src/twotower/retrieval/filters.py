"""Item rows that a request allows and excludes: by id, by the value of a column, and by the items its user has seen."""

from __future__ import annotations

import math
import re
import threading
from collections import abc
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import reduce

import numpy as np
import polars as pl

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import is_in_sorted
from twotower.arrays.types import Ints, ItemId
from twotower.data.given_values import TRUTHS, UNREADABLE
from twotower.data.ids import ItemIds
from twotower.errors import DataError, did_you_mean
from twotower.features.schema import Schema
from twotower.retrieval.query import Query

Condition = tuple[str, str]
"""Column of the items, and the value that it equals or, for a column of lists, contains."""
_FINER = re.compile(r"[.,]\d{6}(\d{1,3})0*(?!\d)")


class RowCache:
    """The rows of the latest conditions, up to `max_rows` rows of `max_entries` entries. Thread-safe."""

    def __init__(self, max_rows: int = 2**24, max_entries: int = 256) -> None:
        self._max_rows, self._max_entries = max_rows, max_entries  # 128 MiB
        self._rows: dict[tuple[Condition, ...], Ints] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: tuple[Condition, ...], find: Callable[[tuple[Condition, ...]], Ints]) -> Ints:
        """Return the read-only rows of a key: the cached ones, or `find(key)`."""
        with self._lock:
            if (rows := self._rows.pop(key, None)) is not None:
                self._rows[key] = rows  # now the most recent
                return rows
        rows = find(key)
        rows.setflags(write=False)
        with self._lock:
            self._rows[key] = rows
            while sum(map(len, self._rows.values())) > self._max_rows or len(self._rows) > self._max_entries:
                del self._rows[next(iter(self._rows))]
        return rows


class CatalogueFilters:
    """Finds the item rows that requests allow and exclude."""

    def __init__(self, items: pl.DataFrame, ids: ItemIds, schema: Schema, seen: Ragged) -> None:
        """Take `items` with a row for each of `ids`; `seen` has the item rows of each user's interactions."""
        self._items, self._ids, self._seen = items, ids, seen
        self._names = [c for c in items.columns if not c.startswith("__")]  # without computed statistics
        self._features = schema.columns("item")
        self._cache = RowCache()

    @property
    def columns(self) -> list[str]:
        """Columns allowed in `where`."""
        dtypes = self._items.schema
        return [c for c in self._names if isinstance(dtypes[c], pl.List) or not dtypes[c].is_nested()]

    def allowed(self, allow: abc.Sequence[str] | None, where: Mapping[str, str] | None) -> Ints | None:
        """Return the rows of the items that pass the filters, ascending; None without filters. Raises DataError."""
        if isinstance(allow, str):
            raise DataError(_NOT_A_LIST)
        allowed = None if allow is None else np.unique(self._known(allow))
        if not where:
            return allowed
        rows = self._matching(tuple((column, str(value)) for column, value in where.items()))
        return rows if allowed is None else _intersection(rows, allowed)

    def banned(self, ban: abc.Sequence[str]) -> Ints:
        """Return the rows of banned items. Raises DataError for a text."""
        if isinstance(ban, str):
            raise DataError(_NOT_A_LIST)
        return self._known(ban) if len(ban) else _NO_ROWS

    def excluded(self, banned: Ints, query: Query, keep_seen: bool) -> Ints:
        """Return the banned rows and, unless `keep_seen`, the rows of the items of a query and its user's history."""
        if keep_seen:
            return banned
        found = [banned] if len(banned) else []
        if query.events:
            found.append(query.known_items)
        if query.user is not None:
            found.append(self._seen.row(query.user).astype(np.int64))
        return found[0] if len(found) == 1 else np.concatenate([_NO_ROWS, *found])

    def _known(self, ids: abc.Sequence[str]) -> Ints:
        """Return the rows of the item ids that are in the bundle."""
        return np.array([r for r in self._ids.rows([ItemId(str(i)) for i in ids]) if r >= 0], np.int64)

    def _matching(self, conditions: tuple[Condition, ...]) -> Ints:
        """Return the item rows, ascending, that meet all conditions."""
        return self._cache.get(conditions, self._find)

    def _find(self, conditions: tuple[Condition, ...]) -> Ints:
        if len(conditions) == 1:
            return self._rows_with_value(*conditions[0])
        return reduce(_intersection, (self._matching((one,)) for one in conditions))

    def _rows_with_value(self, column: str, value: str) -> Ints:
        """Return the item rows whose column equals the value or, for a column of lists, contains it."""
        if column not in self._names:
            raise DataError(
                f"filter: items have no column '{column}'{did_you_mean(column, self._names)} "
                f"(allowed: {', '.join(self._names)})"
            )
        series = self._items[column]
        value = value.encode(errors="backslashreplace").decode()  # a lone surrogate, which no column holds
        for f in self._features:
            series = f.values(series) if f.source == column else series
        if not isinstance(series.dtype, pl.List):
            return _rows_that_equal(series, value, column)
        held = pl.DataFrame({"value": series}).with_row_index("row").explode("value")
        return np.unique(held["row"].to_numpy()[_rows_that_equal(held["value"], value, column)]).astype(np.int64)


def _rows_that_equal(series: pl.Series, value: str, column: str) -> Ints:
    """Return the places of a value in a series of an item column. Raises DataError for a type without comparison, and
    for a value that the type cannot represent."""
    dtype = series.dtype
    if dtype.is_nested() or dtype in (pl.Duration, pl.Binary, pl.Object):
        raise DataError(f"filter: items' column '{column}' holds {dtype}, which cannot be compared")
    try:
        wanted = _of_type(value, dtype)
    except (*UNREADABLE, ArithmeticError):
        held = (series.drop_nans() if dtype.is_float() else series).drop_nulls().head(1).cast(pl.String)
        such = f"; expected a value such as '{held[0]}'" if len(held) else ""
        raise DataError(f"filter: items' column '{column}' holds {dtype}, not '{value[:80]}'{such}") from None
    found = (series.to_physical() if dtype.is_temporal() else series) == wanted
    return np.flatnonzero(found.fill_null(False).to_numpy()).astype(np.int64)


def _of_type(text: str, dtype: pl.DataType) -> pl.Series:
    """Return a value of a column's type as a column of one row, a date or time as an integer. A time without a zone is
    in UTC, and refused if the column has another zone. Raises ArithmeticError or one of UNREADABLE."""
    if dtype == pl.Boolean:
        return pl.Series([(TRUTHS | {"1": True, "0": False})[text.lower()]])
    if dtype.is_numeric():
        number = Decimal(text.replace("_", "?"))
        if not number.is_finite() or abs(number.adjusted()) > 400:  # such an integer takes long
            raise OverflowError
        value = float(number) if dtype.is_float() else int(number) if dtype.is_integer() else f"{number:f}"
        held = pl.Series([value]).cast(dtype)
        if not (math.isfinite(held[0]) if dtype.is_float() else held[0] == number):
            raise ValueError
        return held
    if not dtype.is_temporal():
        return pl.Series([text])
    moment = datetime.fromisoformat(f"1970-01-01T{text}" if dtype == pl.Time else text)
    since = moment.replace(tzinfo=moment.tzinfo or UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    finer = _FINER.search(text)  # digits that a datetime of Python drops
    nanoseconds = since // timedelta(microseconds=1) * 1_000 + (int(f"{finer[1]:0<3}") if finer else 0)
    unit = {"us": 1_000, "ms": 1_000_000}.get(getattr(dtype, "time_unit", "ns"), 1)
    count, rest = divmod(nanoseconds, 86_400_000_000_000 if dtype == pl.Date else unit)
    zone = getattr(dtype, "time_zone", None)
    if rest or (moment.tzinfo if dtype == pl.Time else not moment.tzinfo and zone not in (None, "UTC")):
        raise ValueError
    return pl.Series([count])


_NO_ROWS: Ints = np.zeros(0, np.int64)
_NOT_A_LIST = "allow or ban is a text, expected a list of item ids"


def _intersection(rows: Ints, others: Ints) -> Ints:
    """Return the rows in both ascending arrays."""
    fewer, more = (rows, others) if len(rows) < len(others) else (others, rows)
    return fewer[is_in_sorted(more, fewer)]
