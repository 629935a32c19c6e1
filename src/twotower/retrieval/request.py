"""Request to a bundle, and its answer."""

from __future__ import annotations

import json
from collections import abc
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Literal
from uuid import UUID

import numpy as np
import polars as pl

from twotower.arrays.types import ItemId
from twotower.errors import DataError, did_you_mean
from twotower.escaping import representation
from twotower.features.schema import Schema
from twotower.features.text import words
from twotower.retrieval.event import Event, EventInput, as_event
from twotower.retrieval.request_body import Json, RequestBody, item_events, read_body

Method = Literal[1, 2]
Source = Literal["model", "cold_start", "popular", "fallback"]
MAX_K = 10_000


class UnknownId(DataError):
    """A user or an item is not in the bundle."""


@dataclass(frozen=True, init=False)
class Request:
    """The user of a recommendation: an id, which the bundle may not know, features, interactions, and the context.

    `features` replace the stored ones. `history` replaces the stored one; `events` extend it. `context` has the columns
    of the interactions that the model reads. Method 1 (precomputed user vectors) takes no `features` and no `context`,
    and uses `history` and `events` only to exclude items. Method 2 (online user tower) computes the vector from all
    fields.
    """

    user_id: str | None
    features: Mapping[str, Json]
    history: abc.Sequence[Event] | None
    """Interactions, oldest first, read in the order of their times if each has one."""
    events: abc.Sequence[Event]
    """Interactions since the history, oldest first, read in the order of their times if each has one."""
    context: Mapping[str, Json]
    """Values at the time of the request, by column."""

    def __init__(
        self, user_id: str | int | np.integer | UUID | None = None, features: Mapping[str, Json] | None = None,
        history: abc.Sequence[EventInput] | None = None, events: abc.Sequence[EventInput] = (),
        context: Mapping[str, Json] | None = None,
    ) -> None:  # fmt: skip
        """Take ids as text or numbers; an event may be an item id alone. Raises DataError for a value that is no id or
        event."""
        if isinstance(user_id, bool) or not isinstance(user_id, str | int | np.integer | UUID | None):
            raise DataError(f"request: user_id is {user_id!r:.80}, expected text or a whole number")
        fields = self.__dict__
        fields["user_id"] = None if user_id is None else str(user_id)
        fields["features"] = {} if features is None else features
        fields["history"] = None if history is None else _events(history)
        fields["events"] = _events(events)
        fields["context"] = {} if context is None else context

    def __repr__(self) -> str:
        return representation(type(self), ", ".join(f"{key}={value!r}" for key, value in vars(self).items()))

    @classmethod
    def parse(cls, body: Json) -> Request:
        """Return the request of a JSON object with keys user_id, features, history, events, context. Raises DataError.

        `features` and `context` are objects of columns and values. An entry of `history` or `events` is an item id or
        {"id": …, "liked": true, "time": …}, with the time in seconds since 1970. If the log has types of events,
        `event` (the type) replaces `liked`.
        """
        return cls.of(read_body(body))

    @classmethod
    def of(cls, body: RequestBody) -> Request:
        """Return the request of a body. Raises DataError for an event with a type and `liked`, or an implausible
        time."""
        history = None if body.history is None else item_events(body.history)
        return cls(body.user_id, body.features, history, item_events(body.events), body.context)


def _events(given: abc.Sequence[EventInput]) -> list[Event]:
    """Return the events that a caller gives. Raises DataError."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, abc.Iterable):
        raise DataError(f"request: a history is {given!r:.80}, expected a list of item ids or events")
    return [as_event(event) for event in given]


@dataclass(frozen=True)
class Item:
    """A recommended item: external id, score (the logit; a cosine in `similar`) and title."""

    id: ItemId
    score: float
    title: str


@dataclass(frozen=True)
class Answer:
    """Result of a call of a retriever."""

    items: list[Item]
    bundle_id: str
    """Empty for the answer of a run."""
    method: Method
    source: Source
    milliseconds: float
    truncated: bool = False
    """True if fewer than k items remain after the filters."""
    unknown: list[str] = field(default_factory=list)
    """Features with values outside the training data, and items of the history outside the bundle."""

    def __repr__(self) -> str:
        items = ", ".join(f"{item.title!r} {item.score:.3f}" for item in self.items[:20])
        return representation(type(self), f"source={self.source!r}, {len(self.items)} items: {items}")

    def _repr_html_(self) -> str:
        """Return the answer as a table, for notebooks."""
        rows = (
            f"<tr><td>{place}<td>{escape(item.title)}<td>{escape(item.id)}<td>{item.score:.3f}"
            for place, item in enumerate(self.items, 1)
        )
        return f"<table><tr><th>rank<th>title<th>id<th>score ({self.source}){''.join(rows)}</table>"

    def to_json(self) -> str:
        """Return the answer as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


def checked_k(k: int) -> int:
    """Return `k` as an int. Raises DataError unless it is a whole number from 1 to `MAX_K`."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= MAX_K:
        raise DataError(f"k is {k!r}, expected 1 to {MAX_K:,}")
    return int(k)  # a numpy integer could overflow


def check_method(method: int) -> None:
    """Raise DataError unless `method` is 1 or 2."""
    if method not in (1, 2):
        raise DataError(f"method is {method}, expected 1 (precomputed user vectors) or 2 (online user tower)")


def text_request(text: str, schema: Schema, feature: str, context: Mapping[str, Json] | None) -> tuple[Request, int]:
    """Return a search text as the request of a user, and the number of features that read it.

    The text is the value of the column of the text `feature`, whose name is required if text features read several
    columns; `context` has the other columns of the context. Raises DataError for an unknown feature, a text without a
    word, or a schema whose other user features require a value.
    """
    if not isinstance(text, str):
        raise DataError(f"search: the text is {text!r}, expected text")
    column = _text_column(feature, schema)
    of_context = column in schema.context_columns()
    for f in schema.side("user"):
        if f.refuses_missing and (of_context or f.source != column):
            raise DataError(
                f"search: feature '{f.name}' of the users has missing = 'error', so a text alone does not suffice; use "
                "recommend, with features"
            )
    text = text.encode(errors="replace").decode()  # a lone surrogate is no letter
    if not len(words(pl.Series(column, [text]))[1]):
        raise DataError("search: the text holds no word, expected at least one letter or digit")
    given: dict[str, Json] = dict(context or {})
    request = (
        Request(context={**given, column: text}) if of_context else Request(features={column: text}, context=given)
    )
    return request, sum(f.source == column for f in schema.side("context" if of_context else "user"))


def _text_column(name: str, schema: Schema) -> str:
    """Return the column of the text feature `name`; without a name, the column of all text features. Raises
    DataError."""
    columns = {f.name: f.source for f in schema.searchable()}
    if not columns:
        raise DataError(
            "search: the users and the context of this bundle have no text feature; train with a feature of kind = "
            "'text', side = 'user' or 'context'"
        )
    if name and name not in columns:
        raise DataError(
            f"search: no text feature '{name}'{did_you_mean(name, columns)} (allowed: {', '.join(columns)})"
        )
    if not name and len(set(columns.values())) > 1:
        raise DataError(f"search: the users have {len(columns)} text features; name one of {', '.join(columns)}")
    return columns[name] if name else next(iter(columns.values()))
