"""Request to a bundle, and its answer."""

from __future__ import annotations

import json
from collections import abc
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Literal, NamedTuple
from uuid import UUID

import numpy as np

from twotower.arrays.types import Ints, ItemId, ItemRow, UserId, UserRow
from twotower.data.ids import ItemIds, UserIds
from twotower.errors import DataError, did_you_mean
from twotower.escaping import representation
from twotower.retrieval.event import EVENT_KEYS, Event, EventLike, Told, as_event, in_time_order, told_event

Json = str | float | None | abc.Sequence["Json"] | Mapping[str, "Json"]
"""Parsed JSON. The value of a feature is text, a number, or a list of them."""
Method = Literal[1, 2]
Source = Literal["model", "cold_start", "popular", "fallback"]
MAX_K = 10_000


class UnknownId(DataError):
    """A user or an item is not in the bundle."""


@dataclass(frozen=True)
class Request:
    """The user of a recommendation: an id that the bundle may not know, features, interactions, and the context.

    `features` replace the stored ones. `history` replaces the stored one, and `recent` and `events` extend either. `context` gives the
    columns of the interactions that the model reads. Method 1 (precomputed user vectors) takes no `features` and no `context`,
    and uses `history`, `recent` and `events` only to exclude items; method 2 (online user tower) computes the vector from all of them.
    """

    user_id: str | None = None
    features: Mapping[str, Json] = field(default_factory=dict)
    history: abc.Sequence[Told] | None = None
    """Interactions, oldest first, each an item id or an event; sorted by time if each has one."""
    events: abc.Sequence[Told] = ()
    """Interactions since the history, oldest first; sorted by time if each has one."""
    context: Mapping[str, Json] = field(default_factory=dict)
    """Values of the moment, by column."""
    recent: abc.Sequence[Event] = ()
    """Interactions that a service has heard of before, oldest first; each with a time stands at it in the stored history."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "user_id", _user_id(self.user_id))
        if self.history is not None:
            object.__setattr__(self, "history", _events(self.history))
        object.__setattr__(self, "events", _events(self.events))

    def __repr__(self) -> str:
        return representation(type(self), ", ".join(f"{key}={value!r}" for key, value in vars(self).items()))

    @property
    def told(self) -> list[Event]:
        """The interactions of history, recent events and events, oldest first."""
        later = in_time_order([*self.recent, *map(as_event, self.events)])
        return [as_event(event) for event in (*(self.history or ()), *later)]

    @property
    def has_details(self) -> bool:
        """True if the request has features, a history, events, recent ones among them, or a context."""
        return bool(self.features or self.recent or self.events or self.context) or self.history is not None

    @classmethod
    def parse(cls, body: Json) -> Request:
        """Return the request of a JSON object with keys user_id, features, history, events, context; raises DataError.

        `features` and `context` are objects of columns and values; an entry of `history` or `events` is an item id or
        {"id": …, "liked": true}, with `event`, the type, in place of `liked` where the log has types, and `time`, seconds since
        1970.
        """
        if not isinstance(body, dict):
            raise DataError('a request is a JSON object such as {"features": {"age": 25}, "history": ["1", "2"]}')
        known = ("user_id", "features", "history", "events", "context")
        for key in body:
            if key not in known:
                raise DataError(f"request: unknown key '{key}'{did_you_mean(key, known)} (allowed: {', '.join(known)})")
        user_id = body.get("user_id")
        if not isinstance(user_id, str | int | None):
            raise DataError(f"request: user_id is {user_id!r:.80}, expected text or a whole number")
        objects: dict[str, Mapping[str, Json]] = {}
        for name in ("features", "context"):
            value = body.get(name)
            if not isinstance(value, dict | None):
                raise DataError(f"request: {name} is {value!r:.80}, expected an object of columns and values")
            objects[name] = value or {}
        lists: dict[str, list[Event]] = {}
        for name in ("history", "events"):
            if (value := body.get(name)) is not None:
                if not isinstance(value, list):
                    raise DataError(f"request: {name} is {value!r:.80}, expected a list")
                lists[name] = [_event(e) for e in value]
        return cls(
            _user_id(user_id), objects["features"], lists.get("history"),
            lists.get("events", []), objects["context"],
        )  # fmt: skip


def _user_id(told: str | int | np.integer | UUID | None) -> str | None:
    """Return a user's id as text. Raises DataError for what is no id, such as 3.0."""
    if isinstance(told, bool) or not isinstance(told, str | int | np.integer | UUID | None):
        raise DataError(f"request: user_id is {told!r:.80}, expected text or a whole number")
    return None if told is None else str(told)


def _events(told: abc.Sequence[Told]) -> abc.Sequence[EventLike]:
    """Return told interactions as events, in the order of their times if each has one. Raises DataError."""
    if isinstance(told, str | bytes | Mapping) or not isinstance(told, abc.Iterable):
        raise DataError(f"request: a history is {told!r:.80}, expected a list of item ids or events")
    return in_time_order([as_event(event) for event in told])


def _event(event: Json) -> Event:
    if isinstance(event, str | int) and not isinstance(event, bool):
        return Event(str(event))
    if isinstance(event, dict) and set(event) <= {*EVENT_KEYS}:
        item, liked, kind, time = (event.get(key) for key in EVENT_KEYS)
        if (
            (isinstance(item, str | int) and not isinstance(item, bool))
            and isinstance(liked, bool | None)
            and (kind is None or (isinstance(kind, str | int) and not isinstance(kind, bool)))
            and (time is None or (isinstance(time, int | float) and not isinstance(time, bool)))
        ):
            return told_event(str(item), liked, None if kind is None else str(kind), time)
    raise DataError(
        f'request: a history holds {event!r}, expected an item id or {{"id": …, "liked": true}}, where "event" may stand for '
        '"liked", and "time" is in seconds since 1970'
    )


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
    """Features with values outside the training data, and items of the history that are not in the bundle."""

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


class RequestRows(NamedTuple):
    """Row of a request's user, None for an unknown one, and of each item in history and events, -1 for unknown ones."""

    user: UserRow | None
    items: dict[str, ItemRow]

    @classmethod
    def of(cls, request: Request, users: UserIds, items: ItemIds) -> RequestRows:
        """Look up the ids of a request."""
        named = [event.item for event in request.told]
        user = None if request.user_id is None else users.row(UserId(request.user_id))
        return cls(user, dict(zip(named, items.rows([ItemId(str(i)) for i in named]), strict=True)))

    @property
    def known_items(self) -> Ints:
        """Rows of the items in the bundle."""
        return np.array([row for row in self.items.values() if row >= 0], np.int64)


def checked_k(k: int) -> int:
    """Return `k` as an int. Raises DataError unless it is a whole number from 1 to `MAX_K`."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= MAX_K:
        raise DataError(f"k is {k!r}, expected 1 to {MAX_K:,}")
    return int(k)  # a numpy integer could overflow


def check_method(method: int) -> None:
    """Raise DataError unless `method` is 1 or 2."""
    if method not in (1, 2):
        raise DataError(f"method is {method}, expected 1 (precomputed user vectors) or 2 (online user tower)")
