"""Inputs of the user tower for one request: the stored columns of its user, replaced and extended by what it gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl

from twotower.arrays.ragged import Column, Ragged, Values, row_of
from twotower.arrays.types import Codes
from twotower.data.dataset import Dataset
from twotower.data.given_values import GivenValues
from twotower.errors import DataError, did_you_mean
from twotower.features.feature import Feature
from twotower.features.values import is_unknown
from twotower.model.inputs.gather import Feed, FeedFields, OneRow
from twotower.retrieval.context_values import ContextValues
from twotower.retrieval.event_types import EventTypes
from twotower.retrieval.history_codes import HistoryCodes
from twotower.retrieval.request import Json, Request, RequestRows


class UserInput(NamedTuple):
    """Input of the user tower for one request."""

    feed: Feed
    unknown: list[str]
    """Features with values outside the training data, and items of the history that are not in the bundle."""


class UserInputs:
    """Reads requests as inputs of the user tower."""

    def __init__(self, dataset: Dataset, columns: dict[str, Column]) -> None:
        """`columns` are the encoded features of the users in `dataset`, with the histories that the tower reads."""
        schema, encoders = dataset.schema, dataset.encoders
        self._features = schema.side("user")
        self._feed = FeedFields(encoders.fields("user"))
        self._columns = columns
        self._values = FeatureValues(dataset)
        self.context = ContextValues(dataset)
        self.event_types = EventTypes(schema)
        pairs, frame, last_only = dataset.pairs, dataset.items.frame, schema.duplicates == "last"
        none = np.zeros(frame.height, np.int32)
        self._histories = {
            h.name: HistoryCodes(
                h, column, pairs.item, none if h.codes else encoders.history_codes(h, frame), last_only,
                self.event_types, pairs.event, None if schema.time_unit == "order" else dataset.times,
            )
            for h in schema.histories("user")
            if isinstance(column := columns[h.name], Ragged)
        }  # fmt: skip

    @property
    def columns(self) -> list[str]:
        """Columns allowed in the `features` of a request."""
        return self._values.columns

    def history(self, name: str, request: Request, rows: RequestRows) -> Codes:
        """Return the codes (n,) of a history for a request, oldest first. Raises DataError for types of events that do not fit."""
        return self._histories[name].read(request, rows)[0]

    def read(self, request: Request, rows: RequestRows) -> UserInput:
        """Return the input for a request. Raises DataError for features and types of events that do not fit."""
        self.event_types.read(request.told)
        given = self._values.given(request, rows.user is not None)
        values: dict[str, Values] = {}
        unknown: dict[str, None] = {}
        for f in self._features:
            if f.history:
                values[f.name], items = self._histories[f.name].read(request, rows)
                unknown |= dict.fromkeys(items)
                continue
            if f.source in given:
                values[f.name] = self._values.encode(f, given[f.source])
            elif rows.user is not None:
                values[f.name] = row_of(self._columns[f.name], rows.user)
            else:
                values[f.name] = self._values.missing(f)
            if f.source in request.features and is_unknown(values[f.name]):
                unknown[f.name] = None
        of_context, unknown_context = self.context.read(request, rows.user)
        values |= of_context
        unknown |= dict.fromkeys(unknown_context)
        return UserInput(self._feed(OneRow(values)), list(unknown))


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
