"""Inputs of the user tower for a request: its features, histories and context, or the stored ones of its user."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

import numpy as np
import polars as pl

from twotower.arrays.ragged import Column, Ragged, Values, row_of
from twotower.arrays.types import Bools, Codes, Ints
from twotower.data.dataset import Dataset
from twotower.data.given_values import GivenValues
from twotower.data.reading.times import MICROSECONDS, TIME, Times
from twotower.errors import DataError, did_you_mean
from twotower.features.feature import HistoryFacts, HistorySpec
from twotower.features.values import is_unknown
from twotower.model.inputs.gather import Feed, FeedFields, OneRow
from twotower.retrieval.event import NO_TIME, ReadEvent
from twotower.retrieval.query import Query
from twotower.retrieval.request import Json


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
        pairs, frame, last_only = dataset.pairs, dataset.items.frame, schema.duplicates == "last"
        none = np.zeros(frame.height, np.int32)
        times = dataset.times if schema.has_moments else np.broadcast_to(np.int64(NO_TIME), len(pairs))
        self._histories = {
            h.name: HistoryCodes(
                h, column, pairs.item, none if h.codes else encoders.history_codes(h, frame), last_only,
                pairs.event, times,
            )
            for h in schema.histories("user")
            if isinstance(column := columns[h.name], Ragged)
        }  # fmt: skip

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
        unknown += self.context.read(query, values)
        if self._histories:
            unknown += query.unknown_items
        return UserInput(self._feed(OneRow(values)), list(dict.fromkeys(unknown)))

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


class _Past(NamedTuple):
    """Interactions (n,), oldest first."""

    items: Codes | Ints
    """Item rows."""
    codes: Codes
    """Codes of the items."""
    types: Codes
    """Codes of the types."""
    times: Ints
    """Microseconds since 1970, or NO_TIME."""

    def where(self, kept: Bools | Ints) -> _Past:
        return _Past(*(column[kept] for column in self))

    def followed_by(self, more: _Past) -> _Past:
        return _Past(*map(np.concatenate, zip(self, more, strict=True)))

    def mixed_with(self, more: _Past) -> _Past:
        """Return these interactions and `more`, sorted by time; at equal times these are first."""
        if not len(more.items):
            return self
        both = self.followed_by(more)
        return both.where(np.argsort(both.times, kind="stable"))


@dataclass
class HistoryCodes:
    """Reads the codes of a user history for a request: the stored or given history, extended by events."""

    history: HistorySpec
    stored: Ragged
    """Codes of each user row, with the interactions as sources."""
    interaction_items: Codes
    """(n,) item row of each interaction."""
    item_codes: Codes
    """(items,) code of each item row; zeros if a rule makes the codes."""
    last_only: bool
    """True if only the last interaction of a user with an item counts, as in training."""
    interaction_types: Codes
    """(n,) code of the type of each interaction; zeros if no history reads it."""
    interaction_times: Ints
    """(n,) microseconds since 1970 of each interaction; NO_TIME if the log has no times, or only an order."""

    def __post_init__(self) -> None:
        self._holds = self.history.holds(False), self.history.holds(True)

    def read(self, query: Query) -> Codes:
        """Return the codes (n,), oldest first."""
        past = self._stored(query.user) if query.history is None else self._of(query.history)
        if query.added:
            added, last = query.added, NO_TIME
            if query.history is None and len(past.times):
                last = int(past.times[-1])
            if self.last_only:
                past = past.where(~np.isin(past.items, [event.row for event in added if event.row >= 0]))
            # Recent events before the last stored interaction are sorted into the history.
            among = [event.is_recent and NO_TIME < event.time < last for event in added]
            if any(among):
                past = past.mixed_with(self._of([event for event, early in zip(added, among, strict=True) if early]))
                added = [event for event, early in zip(added, among, strict=True) if not early]
            past = past.followed_by(self._of(added))
        latest = -self.history.max_length  # 0: all
        if self.history.codes is None:
            return past.codes[latest:]
        first = np.arange(len(past.items[latest:])) == 0
        return self.history.codes(HistoryFacts(first, past.types[latest:], past.times[latest:]))

    def _stored(self, user: int | None) -> _Past:
        """Return the interactions of a user's stored history."""
        if user is None:
            none = np.zeros(0, np.int32)
            return _Past(none, none, none, np.zeros(0, np.int64))
        part = slice(*self.stored.offsets[user : user + 2])
        assert self.stored.source is not None, "a stored history names its interactions"
        source = self.stored.source[part]
        types, times = self.interaction_types[source], self.interaction_times[source]
        return _Past(self.interaction_items[source], self.stored.values[part], types, times)

    def _of(self, events: Sequence[ReadEvent]) -> _Past:
        """Return the events of known items that belong to the history."""
        kept = [event for event in events if event.row >= 0 and self._holds[event.liked]]
        items = np.array([event.row for event in kept], np.int64)
        types, times = [event.code for event in kept], [event.time for event in kept]
        return _Past(items, self.item_codes[items], np.array(types, np.int32), np.array(times, np.int64))
