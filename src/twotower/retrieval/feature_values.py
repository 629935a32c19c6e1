"""Values of the features of a request, encoded as the columns of the users' table are."""

from __future__ import annotations

import polars as pl

from twotower.arrays.ragged import Values
from twotower.data.dataset import Dataset
from twotower.data.given_values import GivenValues
from twotower.errors import DataError, did_you_mean
from twotower.features.feature import Feature
from twotower.retrieval.request import Json, Request


class FeatureValues:
    """Reads the features of a request that are no sequences; a value is encoded as a column of one row."""

    def __init__(self, dataset: Dataset) -> None:
        self._key = dataset.schema.user_id
        self._values = GivenValues(dataset.encoders, dataset.schema.columns("user"), dataset.users.frame)

    @property
    def columns(self) -> list[str]:
        """Columns that a request may give."""
        return [name for name in self._values.types if name != self._key]

    def given(self, request: Request, known_user: bool) -> dict[str, pl.Series]:
        """Return one value of the column's type for each column that the request names. Raises DataError."""
        values: dict[str, Json] = dict(request.features)
        if request.user_id is not None and not known_user:
            values.setdefault(self._key, request.user_id)
        return {name: column for name, value in values.items() if (column := self._column(name, value)) is not None}

    def encode(self, feature: Feature, column: pl.Series) -> Values:
        """Return a given value, encoded."""
        return self._values.encode(feature, column)

    def missing(self, feature: Feature) -> Values:
        """Return a missing value, encoded. Raises DataError if the feature requires a value."""
        return self._values.missing(feature)

    def _column(self, name: str, value: Json) -> pl.Series | None:
        """Return a value as a column of one row, None for a user's id that no feature reads or that is of another kind."""
        if name not in self._values.types:
            if name == self._key:
                return None
            allowed = sorted(self.columns)
            hint = did_you_mean(name, allowed)
            raise DataError(f"request: no feature '{name}'{hint} (allowed: {', '.join(allowed) or 'none'})")
        column = self._values.column(name, value)
        if column is None and name != self._key:
            raise DataError(f"request: feature '{name}' is {value!r}, expected {self._values.expected(name)}")
        return column
