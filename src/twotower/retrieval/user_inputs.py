"""Inputs of the user tower for a request: its features, histories and context, or the stored ones of its user."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import compress
from typing import NamedTuple

import numpy as np
import polars as pl

from twotower.arrays.ragged import Column, Ragged, Values, row_of
from twotower.arrays.types import Bools, Codes, Ints, UserRow
from twotower.data.dataset import Dataset
from twotower.data.given_values import GivenValues
from twotower.data.times import MICROSECONDS, TIME, Times
from twotower.errors import DataError, did_you_mean
from twotower.features.feature import HistoryFacts, HistorySpec
from twotower.features.values import is_unknown
from twotower.model.inputs.gather import Feed, FeedFields, OneRow
from twotower.retrieval.event import Event, EventTypes, as_event, in_time_order, last_of_each
from twotower.retrieval.request import Json, Request, RequestRows


class UserInput(NamedTuple):
    """Input of the user tower for one request."""

    feed: Feed
    unknown: list[str]
    """As in `Answer`."""


class UserInputs:
    """Reads requests as inputs of the user tower."""

    def __init__(self, dataset: Dataset, columns: dict[str, Column]) -> None:
        """Take a dataset, and the encoded features of its users, `columns`, with the histories that the tower reads."""
        schema, encoders = dataset.schema, dataset.encoders
        self._key, self._features, self._columns = schema.user_id, schema.side("user"), columns
        self._feed = FeedFields(encoders.fields("user"))
        self._values = GivenValues(encoders, schema.columns("user"), dataset.users.frame)
        self.context = ContextValues(dataset)
        self.event_types = EventTypes(schema)
        pairs, frame, last_only = dataset.pairs, dataset.items.frame, schema.duplicates == "last"
        none = np.zeros(frame.height, np.int32)
        times = dataset.times if schema.has_moments else np.broadcast_to(np.int64(NO_TIME), len(pairs))
        self._histories = {
            h.name: HistoryCodes(
                h, column, pairs.item, none if h.codes else encoders.history_codes(h, frame), last_only,
                self.event_types, pairs.event, times,
            )
            for h in schema.histories("user")
            if isinstance(column := columns[h.name], Ragged)
        }  # fmt: skip

    @property
    def columns(self) -> list[str]:
        """Columns allowed in the `features` of a request."""
        return [name for name in self._values.types if name != self._key]

    def history(self, name: str, request: Request, rows: RequestRows) -> Codes:
        """Return the codes (n,) of a history for a request, oldest first. Raises DataError for unknown event types."""
        return self._histories[name].read(request, rows)[0]

    def read(self, request: Request, rows: RequestRows) -> UserInput:
        """Return the input for a request. Raises DataError for features or types of events that do not fit."""
        self.event_types.read(request.all_events)
        features = dict(request.features)
        if request.user_id is not None and rows.user is None:
            features.setdefault(self._key, request.user_id)
        given = {name: column for name in features if (column := self._column(name, features[name])) is not None}
        values, unknown = dict[str, Values](), dict[str, None]()
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

    def read(self, request: Request, user: UserRow | None) -> tuple[dict[str, Values], list[str]]:
        """Return the encoded context features by name, and the names of those with unknown values.

        Raises DataError for a missing or unknown column, or a value of another type."""
        for name in request.context:
            if name not in self.columns:
                allowed = ", ".join(sorted(self.columns)) or "none; the model reads no context"
                raise DataError(f"request: no context '{name}'{did_you_mean(name, self.columns)} (allowed: {allowed})")
        values, unknown = dict[str, Values](), list[str]()
        moment = self._moment(request, user) if self._time else None
        for f in self._features:
            if f.reads_time:
                assert moment is not None
                column = f.of_times(*moment)
                values[f.name] = self._values.encode(f, column)
                if is_unknown(values[f.name]) and not column.null_count():
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
                    f"request: context lacks '{f.source}' (needed: {', '.join(self.required)}); give it, or declare a "
                    "default for the feature and train again"
                )
        return values, unknown

    def _column(self, name: str, value: Json) -> pl.Series:
        column = self._values.column(name, value)
        if column is None:
            raise DataError(f"request: context '{name}' is {value!r}, expected {self._values.expected(name)}")
        return column

    def _moment(self, request: Request, user: UserRow | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the time (1,) of the request (default: now), and the time (1,) of the user's last interaction before
        it, -1 for none, in microseconds since 1970. Stored interactions and events with a time count."""
        given = self._time in request.context
        now = self._parsed(request.context[self._time]) if given else int(clock.time() * MICROSECONDS)
        last = -1
        if user is not None:
            data, seen = self._dataset, self._dataset.interacted_items
            assert seen.source is not None
            times = data.times[seen.source[seen.offsets[user] : seen.offsets[user + 1]]]
            last = int(times[times < now].max(initial=-1))
        last = max([last, *(time for event in request.all_events if (time := _microseconds(event)) < now)])
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


NO_TIME = -1
"""Time of an event without a time."""


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


@dataclass(frozen=True)
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
    event_types: EventTypes
    interaction_types: Codes
    """(n,) code of the type of each interaction; zeros if no history reads it."""
    interaction_times: Ints
    """(n,) microseconds since 1970 of each interaction; NO_TIME if the log has no times, or only an order."""

    def read(self, request: Request, rows: RequestRows) -> tuple[Codes, list[str]]:
        """Return the codes (n,), oldest first, and the ids of unknown items. Raises DataError for unknown types."""
        unknown: list[str] = []
        if request.history is not None:
            history = self.event_types.read(request.history)
            past, unknown = self._events(last_of_each(history) if self.last_only else history, rows)
        else:
            past = self._stored(rows.user)
        if request.recent or request.events:
            earlier, later = self._split(request, past)
            if self.last_only:
                again = {event.item for event in later}
                earlier, later = last_of_each([e for e in earlier if e.item not in again]), last_of_each(later)
                known = [row for event in (*earlier, *later) if (row := rows.items[event.item]) >= 0]
                past = past.where(~np.isin(past.items, known))
            among, unknown_among = self._events(earlier, rows)
            more, unknown_events = self._events(later, rows)
            past, unknown = past.mixed_with(among).followed_by(more), [*unknown, *unknown_among, *unknown_events]
        return self._coded(past), unknown

    def _split(self, request: Request, past: _Past) -> tuple[list[Event], list[Event]]:
        """Return the recent events before the last stored interaction, by time, and all other events of a request."""
        recent = self.event_types.read(request.recent)
        last = int(past.times[-1]) if request.history is None and len(past.times) else NO_TIME
        precedes = [NO_TIME != _microseconds(event) < last for event in recent]
        others = [event for event, before in zip(recent, precedes, strict=True) if not before]
        later = in_time_order([*others, *self.event_types.read(request.events)])
        return [*compress(recent, precedes)], [as_event(event) for event in later]

    def _coded(self, past: _Past) -> Codes:
        """Return the codes of the latest interactions, up to the length of the history."""
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

    def _events(self, events: Sequence[Event], rows: RequestRows) -> tuple[_Past, list[str]]:
        """Return the events that belong to the history, and the ids of unknown items."""
        kept, unknown, row_of_item = list[Event](), list[str](), rows.items
        for event in events:
            if row_of_item[event.item] < 0:
                unknown.append(event.item)
            elif self.history.holds(event.liked):
                kept.append(event)
        items = np.array([row_of_item[event.item] for event in kept], np.int64)
        types = np.array([self.event_types.code(event) for event in kept], np.int32)
        times = np.array([_microseconds(event) for event in kept], np.int64)
        return _Past(items, self.item_codes[items], types, times), unknown


def _microseconds(event: Event) -> int:
    return NO_TIME if event.time is None else round(event.time * MICROSECONDS)
