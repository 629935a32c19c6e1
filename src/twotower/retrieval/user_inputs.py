"""Inputs of the user tower for a request: its features, histories and context, or the stored ones of its user."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from datetime import date
from typing import NamedTuple

import numpy as np
import polars as pl

from twotower.arrays.ragged import Column, Ragged, Values, row_of
from twotower.arrays.types import Codes, Ints
from twotower.data.dataset import Dataset
from twotower.data.given_values import GivenValues
from twotower.data.reading.times import MICROSECONDS, TIME, Times
from twotower.errors import DataError, did_you_mean
from twotower.features.feature import HistoryFacts, HistorySpec
from twotower.features.values import is_unknown
from twotower.model.inputs.gather import Feed, FeedFields, OneRow
from twotower.retrieval.event import NO_TIME, ReadEvent
from twotower.retrieval.query import Query
from twotower.retrieval.request_body import Json


class UserInput(NamedTuple):
    """Input of the user tower for one request."""

    feed: Feed
    unknown: list[str]
    """As in `Answer`."""


class UserInputs:
    """Makes the inputs of the user tower for queries."""

    def __init__(self, dataset: Dataset, columns: dict[str, Column]) -> None:
        """Take a dataset, and the encoded features of its users, `columns`, with the histories that the tower reads."""
        schema, encoders = dataset.schema, dataset.encoders
        self._key, self._features, self._columns = schema.user_id, schema.side("user"), columns
        self._feed = FeedFields(encoders.fields("user"))
        self._values = GivenValues(encoders, schema.columns("user"), dataset.users.frame)
        self.context = ContextValues(dataset)
        self._histories = {
            h.name: HistoryCodes(dataset, h, column)
            for h in schema.histories("user")
            if isinstance(column := columns[h.name], Ragged)
        }

    @property
    def columns(self) -> list[str]:
        """Columns allowed in the `features` of a request."""
        return [name for name in self._values.types if name != self._key]

    def history(self, name: str, query: Query) -> Codes:
        """Return the codes (n,) of a history for a query, oldest first."""
        return self._histories[name].read(query)

    def read(self, query: Query) -> UserInput:
        """Return the input for a query. Raises DataError for features or a context that do not fit."""
        request = query.request
        features: dict[str, Json] = {**request.features}
        if request.user_id is not None and query.user is None:
            features.setdefault(self._key, request.user_id)
        given = {name: column for name in features if (column := self._column(name, features[name])) is not None}
        values, unknown = dict[str, Values](), list[str]()
        for f in self._features:
            if f.history:
                values[f.name] = self._histories[f.name].read(query)
                continue
            if f.source in given:
                values[f.name] = self._values.encode(f, given[f.source])
            elif query.user is not None:
                values[f.name] = row_of(self._columns[f.name], query.user)
            else:
                values[f.name] = self._values.missing(f)
            if f.source in request.features and is_unknown(values[f.name]):
                unknown.append(f.name)
        unknown += [*self.context.read(query, values), *self.unknown_items(query)]
        return UserInput(self._feed(OneRow(values)), list(dict.fromkeys(unknown)))

    def unknown_items(self, query: Query) -> list[str]:
        """Return the ids of a query's items outside the bundle that the tower would read."""
        return query.unknown_items if self._histories else []

    def _column(self, name: str, value: Json) -> pl.Series | None:
        """Return a value as a column of one row; None for a user id that no feature reads, or of another type."""
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


class ContextValues:
    """Reads the context of requests."""

    def __init__(self, dataset: Dataset) -> None:
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
        """Return a value for each column: the default, else the last one of the log; None for the time."""
        found = dict[str, Json](dict.fromkeys(self.columns))
        for f in self._features:
            if not f.reads_time:
                known = self._dataset.context_frame[f.source].drop_nulls().tail(1).to_list()
                found[f.source] = f.defaults if f.defaults is not None else (known or [None])[0]
        return found

    def read(self, query: Query, values: dict[str, Values]) -> list[str]:
        """Add the encoded context features of a query by name, and return the names of those with unknown values.

        Raises DataError for a missing or unknown column, or a value of another type."""
        context = query.request.context
        for name in context:
            if name not in self.columns:
                allowed = ", ".join(sorted(self.columns)) or "none; the model reads no context"
                raise DataError(f"request: no context '{name}'{did_you_mean(name, self.columns)} (allowed: {allowed})")
        unknown = list[str]()
        moment = self._moment(query) if self._time else None
        for f in self._features:
            if f.reads_time:
                assert moment is not None
                column = f.of_times(*moment)
                values[f.name] = self._values.encode(f, column)
                if is_unknown(values[f.name]) and not column.null_count():
                    unknown.append(f.name)
            elif f.source in context:
                if f.refuses_missing and context[f.source] is None:
                    raise DataError(
                        f"request: context '{f.source}' is null, and its feature has missing = 'error'; give a value"
                    )
                values[f.name] = self._values.encode(f, self._column(f.source, context[f.source]))
                if is_unknown(values[f.name]):
                    unknown.append(f.name)
            elif f.name in self._defaults:
                values[f.name] = self._defaults[f.name]
            else:
                raise DataError(
                    f"request: context lacks '{f.source}' (needed: {', '.join(self.required)}); give it, or declare a "
                    "default for the feature and train again"
                )
        return unknown

    def _column(self, name: str, value: Json) -> pl.Series:
        column = self._values.column(name, value)
        if column is None:
            raise DataError(f"request: context '{name}' is {value!r}, expected {self._values.expected(name)}")
        return column

    def _moment(self, query: Query) -> tuple[np.ndarray, np.ndarray]:
        """Return the time (1,) of the query (default: now), and the time (1,) of the user's last interaction before it,
        -1 for none, in microseconds since 1970. Stored interactions and events with a time count."""
        context = query.request.context
        now = self._parsed(context[self._time]) if self._time in context else int(clock.time() * MICROSECONDS)
        last = max((event.time for event in query.events if event.time < now), default=NO_TIME)
        if query.user is not None:
            data, seen = self._dataset, self._dataset.interacted_items
            assert seen.source is not None
            times = data.times[seen.source[seen.offsets[query.user] : seen.offsets[query.user + 1]]]
            last = int(times[times < now].max(initial=last))
        return np.array([now]), np.array([last])

    def _parsed(self, value: Json) -> int:
        """Return a time, in the format of the log or as a date or datetime, in microseconds. Raises DataError."""
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


ITEM, CODE, TYPE, AT = range(4)
"""Columns of the interactions of a history, (n, 4) integers, oldest first: item row, code of the item, code of the
type, and microseconds since 1970."""


class HistoryCodes:
    """Reads the codes of a user history for a query: the stored or given history, extended by events."""

    def __init__(self, dataset: Dataset, history: HistorySpec, stored: Ragged) -> None:
        """Take a history, and its codes of each user row, with the interactions as sources."""
        self._history, self._stored, self._pairs = history, stored, dataset.pairs
        self._holds = history.holds(False), history.holds(True)
        self._last_only = dataset.schema.duplicates == "last"
        """True if only the last interaction of a user with an item counts, as in training."""
        none = np.broadcast_to(np.int64(NO_TIME), len(dataset.pairs))
        self._times = dataset.times if dataset.schema.has_moments else none
        frame = dataset.items.frame
        zeros = np.zeros(frame.height, np.int32)  # a rule makes the codes
        self._item_codes = zeros if history.codes else dataset.encoders.history_codes(history, frame)

    def read(self, query: Query) -> Codes:
        """Return the codes (n,), oldest first."""
        past = self._before(query.user) if query.history is None else self._of(query.history)
        if query.added:
            added, last = query.added, NO_TIME
            if query.history is None and len(past):
                last = int(past[-1, AT])
            if self._last_only:
                past = past[~np.isin(past[:, ITEM], [event.row for event in added if event.row >= 0])]
            # Recent events before the last stored interaction are sorted into the history.
            early = [event for event in added if event.is_recent and NO_TIME < event.time < last]
            if early:
                past = np.concatenate([past, self._of(early)])
                past = past[np.argsort(past[:, AT], kind="stable")]
                added = [event for event in added if not (event.is_recent and NO_TIME < event.time < last)]
            past = np.concatenate([past, self._of(added)])
        past = past[-self._history.max_length :]  # 0: all
        if self._history.codes is None:
            return past[:, CODE].astype(np.int32)
        first, types = np.arange(len(past)) == 0, past[:, TYPE].astype(np.int32)
        return self._history.codes(HistoryFacts(first, types, past[:, AT]))

    def _before(self, user: int | None) -> Ints:
        """Return the interactions of a user's stored history."""
        if user is None:
            return np.zeros((0, 4), np.int64)
        part = slice(*self._stored.offsets[user : user + 2])
        assert self._stored.source is not None, "a stored history names its interactions"
        source, past = self._stored.source[part], np.zeros((part.stop - part.start, 4), np.int64)
        past[:, ITEM], past[:, CODE] = self._pairs.item[source], self._stored.values[part]
        past[:, TYPE], past[:, AT] = self._pairs.event[source], self._times[source]
        return past

    def _of(self, events: Sequence[ReadEvent]) -> Ints:
        """Return the events of known items that belong to the history."""
        kept = [(e.row, 0, e.code, e.time) for e in events if e.row >= 0 and self._holds[e.liked]]
        past = np.array(kept, np.int64).reshape(-1, 4)
        past[:, CODE] = self._item_codes[past[:, ITEM]]
        return past
