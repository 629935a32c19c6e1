"""Values of the features of a request, encoded as the columns of the users' table are."""

from __future__ import annotations

import numpy as np
import polars as pl

from twotower.arrays.ragged import Values, row_of
from twotower.data.dataset import Dataset
from twotower.errors import DataError, did_you_mean
from twotower.features.feature import Feature
from twotower.retrieval.request import Json, Request


class FeatureValues:
    """Reads the features of a request that are no sequences; a value is encoded as a column of one row."""

    def __init__(self, dataset: Dataset) -> None:
        """Read the types of the users' columns, and encode a missing value of each feature."""
        self._encoders, self._key = dataset.encoders, dataset.schema.user_id
        frame = dataset.users.frame
        features = dataset.schema.columns("user")
        self._dtypes: dict[str, pl.DataType] = {}
        for f in features:
            if not f.computes:  # statistics are not given
                self._dtypes[f.source] = f.request_type(self._dtypes.get(f.source, frame.schema[f.source]))
        # Columns that are read as values of a vocabulary, not as numbers.
        self._categories = {f.source for f in features} - {f.source for f in features if f.column_type == "numbers"}
        self._missing: dict[str, Values] = {}
        self._required: dict[str, str] = {}
        """Error message for each feature that has no value for a missing one."""
        empty = frame.clear(1)
        for f in features:
            series = empty[f.source].cast(self._dtypes.get(f.source, empty.schema[f.source]))
            if f.computes and f.computes.unseen is not None:
                series = series.fill_null(f.computes.unseen)
            try:
                self._missing[f.name] = row_of(self._encoders.encode(f, series), 0)
            except DataError as e:
                self._required[f.name] = str(e)

    @property
    def columns(self) -> list[str]:
        """Columns that a request may give."""
        return [name for name in self._dtypes if name != self._key]

    def given(self, request: Request, known_user: bool) -> dict[str, pl.Series]:
        """Return one value of the column's type for each column that the request names. Raises DataError."""
        values: dict[str, Json] = dict(request.features)
        if request.user_id is not None and not known_user:
            values.setdefault(self._key, request.user_id)
        return {name: column for name, value in values.items() if (column := self._column(name, value)) is not None}

    def encode(self, feature: Feature, column: pl.Series) -> Values:
        """Return a given value, encoded."""
        return row_of(self._encoders.encode(feature, column), 0)

    def missing(self, feature: Feature) -> Values:
        """Return a missing value, encoded. Raises DataError if the feature requires a value."""
        found = self._missing.get(feature.name)
        if found is None:
            raise DataError(self._required[feature.name])
        return found

    def _column(self, name: str, value: Json) -> pl.Series | None:
        """Return a value as a column of one row, None for a user's id that no feature reads or that is of another kind."""
        if name not in self._dtypes:
            if name == self._key:
                return None
            allowed = sorted(self.columns)
            raise DataError(
                f"request: no feature '{name}'{did_you_mean(name, allowed)} (allowed: {', '.join(allowed) or 'none'})"
            )
        dtype = self._dtypes[name]
        try:
            if isinstance(value, dict):
                raise TypeError
            return _cast_value(pl.Series(name, [value], strict=False), dtype, name in self._categories)
        except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError):  # ValueError: a lone surrogate
            if name == self._key:
                return None
            raise DataError(f"request: feature '{name}' is {value!r}, expected {dtype}") from None


def is_unknown(encoded: Values) -> bool:
    """Return True if one row of an encoded column holds only the code of unknown values."""
    return encoded.dtype == np.int32 and not encoded.any()


def _cast_value(given: pl.Series, dtype: pl.DataType, category: bool) -> pl.Series:
    """Cast a value of a request to the column's type. Raises PolarsError.

    Categories of whole numbers keep their spelling: "007" is not 7, and 1.5 not 1.
    """
    column = given.cast(dtype, strict=True) if given.dtype != dtype else given
    given_type, kept = (t.inner if isinstance(t, pl.List | pl.Array) else t for t in (given.dtype, dtype))
    return given if category and kept.is_integer() and (given_type == pl.String or given_type.is_float()) else column
