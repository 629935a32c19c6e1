"""Context of a request: its values, defaults and times, encoded as the columns of the interactions are."""

from __future__ import annotations

import time as clock
from datetime import date

import numpy as np
import polars as pl

from twotower.arrays.ragged import Values
from twotower.arrays.types import UserRow
from twotower.data.dataset import Dataset
from twotower.data.given_values import GivenValues
from twotower.data.times import MICROSECONDS, TIME, Times
from twotower.errors import DataError, did_you_mean
from twotower.features.values import is_unknown
from twotower.retrieval.request import Json, Request


class ContextValues:
    """Reads the context of requests."""

    def __init__(self, dataset: Dataset) -> None:
        """Read the types of the columns, and encode the defaults."""
        self._dataset, self._schema = dataset, dataset.schema
        self._features = dataset.schema.side("context")
        self._values = GivenValues(dataset.encoders, self._features, dataset.context_frame)
        self._time = self._schema.time if any(f.reads_time for f in self._features) else ""
        self.columns = self._schema.request_context()
        """Columns that a request may give."""
        self._defaults: dict[str, Values] = {}
        for f in self._features:
            if not f.reads_time and f.defaults is not None:
                column = self._values.column(f.source, f.defaults)
                assert column is not None
                self._defaults[f.name] = self._values.encode(f, column)

    @property
    def required(self) -> list[str]:
        """Columns that a request must give."""
        return [*self._schema.required_context()]

    def examples(self) -> dict[str, Json]:
        """Return a value for each column: the default, else that of an interaction; None for the time, which a clock tells."""
        found = dict[str, Json](dict.fromkeys(self.columns))
        for f in self._features:
            if not f.reads_time:
                known = self._dataset.context_frame[f.source].drop_nulls().tail(1).to_list()
                found[f.source] = f.defaults if f.defaults is not None else (known or [None])[0]
        return found

    def read(self, request: Request, user: UserRow | None) -> tuple[dict[str, Values], list[str]]:
        """Return the encoded features of the context by name, and those whose given values are unknown. Raises DataError for a
        column that the request lacks, or that there is not, or a value of another type."""
        for name in request.context:
            if name not in self.columns:
                allowed = ", ".join(sorted(self.columns)) or "none; the model reads no context"
                raise DataError(f"request: no context '{name}'{did_you_mean(name, self.columns)} (allowed: {allowed})")
        values, unknown = dict[str, Values](), list[str]()
        moment = self._moment(request, user) if self._time else None
        for f in self._features:
            if f.reads_time:
                assert moment is not None
                told = f.of_times(*moment)
                values[f.name] = self._values.encode(f, told)
                if is_unknown(values[f.name]) and not told.null_count():
                    unknown.append(f.name)
            elif f.source in request.context:
                if f.refuses_missing and request.context[f.source] is None:
                    raise DataError(
                        f"request: context '{f.source}' is null, and its feature has missing = 'error'; give a value"
                    )
                values[f.name] = self._values.encode(f, self._column(f.source, request.context[f.source]))
                if is_unknown(values[f.name]):
                    unknown.append(f.name)
            elif f.name in self._defaults:
                values[f.name] = self._defaults[f.name]
            else:
                raise DataError(
                    f"request: context lacks '{f.source}' (needed: {', '.join(self.required)}); give it, or declare a default "
                    "for the feature and train again"
                )
        return values, unknown

    def _column(self, name: str, value: Json) -> pl.Series:
        column = self._values.column(name, value)
        if column is None:
            raise DataError(f"request: context '{name}' is {value!r}, expected {self._values.expected(name)}")
        return column

    def _moment(self, request: Request, user: UserRow | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the time (1,) of the request, by default that of the clock, and the time (1,) of the user's last interaction
        before it, stored or told with its time, -1 for none, in microseconds since 1970."""
        if self._time in request.context:
            now = self._parsed(request.context[self._time])
        else:
            now = int(clock.time() * MICROSECONDS)
        last = -1
        if user is not None:
            data = self._dataset
            taken = data.interacted_items
            assert taken.source is not None
            assert data.times is not None
            times = data.times[taken.source[taken.offsets[user] : taken.offsets[user + 1]]]
            last = int(times[times < now].max(initial=-1))
        told = [round(event.time * MICROSECONDS) for event in request.told if event.time is not None]
        last = max([last, *(time for time in told if time < now)])
        return np.array([now]), np.array([last])

    def _parsed(self, value: Json) -> int:
        """Return a time as the log has it, or a date or datetime, as a table of users may have, in microseconds."""
        if isinstance(value, bool) or not isinstance(value, str | int | float | date):
            raise DataError(f"request: context '{self._time}' is {value!r}, expected a time as in the log")
        times, frame = Times(self._schema, drops=False), pl.DataFrame({self._time: [value]})
        try:
            times.look(frame[self._time])
            times.settle()
            return int(times.add(frame)[TIME][0])
        except (DataError, pl.exceptions.PolarsError):
            expected = "expected a time as in the log, from 1990 to tomorrow"
            if times.is_ambiguous:
                expected = "a day and a month in either order; give year, month and day, such as 2024-04-03 10:00"
            raise DataError(f"request: context '{self._time}' is {value!r}, {expected}") from None
