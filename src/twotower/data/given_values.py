"""Values of features that are given one at a time, by a request or as a default, encoded as columns of one row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, time

import numpy as np
import polars as pl

from twotower.arrays.ragged import Values, row_of
from twotower.errors import DataError
from twotower.features.encoders import Encoders
from twotower.features.feature import Feature
from twotower.features.values import cast_value

TRUTHS = {"true": True, "false": False}
"""Truth values as text."""
UNREADABLE = pl.exceptions.PolarsError, LookupError, TypeError, ValueError, OverflowError
"""Errors of a value that is not of its column's type. ValueError: a lone surrogate, or text that is no date."""
_FINER = re.compile(r"[.,]\d{7}")
"""A fraction of a second in more digits than a time has here."""


class GivenValues:
    """Reads values of the features of one side, or of the context, that are no sequences."""

    def __init__(self, encoders: Encoders, features: Sequence[Feature], frame: pl.DataFrame) -> None:
        """Read the types of the columns of `frame`, and encode a missing value of each feature."""
        self._encoders = encoders
        nothing = np.zeros(0, np.int64)
        types = frame.schema | {f.source: f.of_times(nothing, nothing).dtype for f in features if f.reads_time}
        self.types: dict[str, pl.DataType] = {}
        """Type of each column that may be given."""
        for f in features:
            if not f.computes:  # statistics are not given
                self.types[f.source] = f.request_type(self.types.get(f.source, types[f.source]))
        # Columns that are read as values of a vocabulary, not as numbers.
        self._categories = {f.source for f in features} - {f.source for f in features if f.column_type == "numbers"}
        self._missing: dict[str, Values] = {}
        self._required: dict[str, str] = {}
        """Error message for each feature that has no value for a missing one."""
        for f in features:
            series = pl.Series(f.source, [None], self.types.get(f.source, types[f.source]))
            if f.computes and f.computes.unseen is not None:
                series = series.fill_null(f.computes.unseen)
            try:
                self._missing[f.name] = row_of(encoders.encode(f, series), 0)
            except DataError as e:
                self._required[f.name] = str(e)

    def column(self, name: str, value: object) -> pl.Series | None:
        """Return a value of a column in `types` as a column of one row, None if it is not of its type."""
        try:
            if isinstance(value, dict):
                return None
            if self.types[name] == pl.Boolean and isinstance(value, str):  # polars casts none
                value = TRUTHS[value.lower()]
            if (kind := _inner(self.types[name])).is_temporal() and kind != pl.Duration:
                if isinstance(value, list):
                    value = [_moment(each, kind) if isinstance(each, str) else each for each in value]
                elif isinstance(value, str):
                    value = _moment(value, kind)
            return cast_value(pl.Series(name, [value], strict=False), self.types[name], name in self._categories)
        except UNREADABLE:
            return None

    def expected(self, name: str) -> str:
        """Return what a value of a column in `types` is, as words: its type, and the text of one of time."""
        kind = _inner(self.types[name])
        if not kind.is_temporal() or kind == pl.Duration:
            return str(self.types[name])
        text = "12:30:00" if kind == pl.Time else "2024-01-31" + (" 12:30:00" if isinstance(kind, pl.Datetime) else "")
        zone = "+01:00" if isinstance(kind, pl.Datetime) and kind.time_zone else ""
        return f"{self.types[name]}, as text such as '{text}{zone}'"

    def encode(self, feature: Feature, column: pl.Series) -> Values:
        """Return a given value, encoded. Raises DataError for one that the feature cannot read."""
        return row_of(self._encoders.encode(feature, column), 0)

    def missing(self, feature: Feature) -> Values:
        """Return a missing value, encoded. Raises DataError if the feature requires a value."""
        found = self._missing.get(feature.name)
        if found is None:
            raise DataError(self._required[feature.name])
        return found


def _inner(dtype: pl.DataType) -> pl.DataType:
    """Return the type of the values of a list, or of a single value."""
    found = dtype.inner if isinstance(dtype, pl.List | pl.Array) else dtype
    return found if isinstance(found, pl.DataType) else found()


def _moment(value: str, dtype: pl.DataType) -> date | time:
    """Return a date, a time or both of ISO text as a value of a column's type. Raises ValueError for text that
    is none, that lacks the zone that a column has or has one that it lacks, or that is finer than the column."""
    if dtype == pl.Date:
        return date.fromisoformat(value)
    if _FINER.search(value):
        raise ValueError("finer than a microsecond")
    if dtype == pl.Time:
        if (read := time.fromisoformat(value)).tzinfo is not None:
            raise ValueError("a zone of a time without a date")
        return read
    assert isinstance(dtype, pl.Datetime)
    moment = datetime.fromisoformat(value)
    if (moment.tzinfo is None) != (dtype.time_zone is None):
        raise ValueError("a zone that the column lacks, or none where it has one")
    if dtype.time_unit == "ms" and moment.microsecond % 1_000:
        raise ValueError("finer than a millisecond")
    return moment if moment.tzinfo is None else moment.astimezone(UTC)
