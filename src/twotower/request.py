"""What is asked of a bundle, and what is answered."""

from __future__ import annotations

import json
from collections import abc
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from twotower.errors import DataError, did_you_mean

Method = Literal[1, 2]
Source = Literal["model", "cold_start", "popular", "fallback"]
MAX_K = 10_000


class UnknownId(DataError):
    """A user or an item that the bundle does not know."""


@dataclass(frozen=True)
class Request:
    """Who asks. `user_id` is known or not; `features` replace the stored ones; `history` replaces the stored one, and
    `events` have happened since: they go on from whichever it is.

    Method 1 answers a known user from the stored vector: it only leaves out what `history` and `events` name,
    and takes no `features`.
    """

    user_id: str | None = None
    features: Mapping[str, Any] = field(default_factory=dict)
    history: abc.Sequence[tuple[str, bool]] | None = None  # item ids, oldest first, and whether the user liked each
    events: abc.Sequence[tuple[str, bool]] = ()  # likewise

    def __post_init__(self) -> None:
        if self.user_id is not None:
            object.__setattr__(self, "user_id", str(self.user_id))

    @property
    def has_details(self) -> bool:
        """Whether it says more than who asks."""
        return bool(self.features or self.events) or self.history is not None

    @classmethod
    def parse(cls, body: Any) -> Request:
        """From JSON: {"user_id", "features": {column: value}, "history": [id or {"id", "liked"}], "events": [likewise]}.

        Raises DataError for anything else.
        """
        if not isinstance(body, dict):
            raise DataError('a request is a JSON object such as {"features": {"age": 25}, "history": ["1", "2"]}')
        known = ("user_id", "features", "history", "events")
        for key in body:
            if key not in known:
                raise DataError(f"request: unknown key '{key}'{did_you_mean(key, known)} (allowed: {', '.join(known)})")
        user_id, features = body.get("user_id"), body.get("features")
        if isinstance(user_id, bool) or not isinstance(user_id, str | int | None):
            raise DataError(f"request: user_id is {user_id!r}, expected text or a number")
        if not isinstance(features, dict | None):
            raise DataError("request: features is not an object of columns and values")
        lists: dict[str, list[tuple[str, bool]]] = {}
        for name in ("history", "events"):
            if (value := body.get(name)) is not None:
                if not isinstance(value, list):
                    raise DataError(f"request: {name} is not a list")
                lists[name] = [_event(e) for e in value]
        return cls(
            None if user_id is None else str(user_id), features or {}, lists.get("history"), lists.get("events", [])
        )


def _event(event: Any) -> tuple[str, bool]:
    if isinstance(event, str | int) and not isinstance(event, bool):
        return str(event), True
    if isinstance(event, dict) and set(event) <= {"id", "liked"}:
        item, liked = event.get("id"), event.get("liked", True)
        if isinstance(item, str | int) and not isinstance(item, bool) and isinstance(liked, bool):
            return str(item), liked
    raise DataError(f'request: {event!r} is no event of a history, expected an item id or {{"id": …, "liked": true}}')


@dataclass(frozen=True)
class Item:
    """An item by external id, with its score (the logit; for `similar` a cosine) and the line to show."""

    id: str
    score: float
    title: str


@dataclass(frozen=True)
class Answer:
    """What a call gives back; `to_json` is the wire form."""

    items: list[Item]
    bundle_id: str
    method: int
    source: Source
    milliseconds: float
    truncated: bool = False
    """Fewer than k were left to give."""
    unknown: list[str] = field(default_factory=list)
    """Features whose values the model has never met, and items of the history it does not know."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


def check_k(k: object) -> None:
    """Raises DataError if no answer can have so many items."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= MAX_K:
        raise DataError(f"k is {k!r}, expected 1 to {MAX_K:,}")


def check_method(method: object) -> None:
    """Raises DataError for what is no method."""
    if method not in (1, 2):
        raise DataError(f"method is {method}, expected 1 (stored vectors) or 2 (the user tower live)")
