"""Replies of the console, as orjson writes them. They are no part of the OpenAPI document: only its page reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from twotower.retrieval.request import Json
from twotower.serve.replies import ItemsReply


@dataclass
class FoundUser:
    """A user, and the number of the interactions."""

    id: str
    events: int


@dataclass
class FoundUsers:
    """Users that match a text; `total` counts those beyond the limit too."""

    users: list[FoundUser]
    total: int


@dataclass
class TitledItem:
    """An item with its title."""

    id: str
    title: str


@dataclass
class FoundItems:
    """Items that match a text; `total` counts those beyond the limit too."""

    items: list[TitledItem]
    total: int


@dataclass
class TitledEvent:
    """An event with the title of its item; `liked` is null for a stored one that is neither liked nor disliked."""

    id: str
    title: str
    liked: bool | None


@dataclass
class UserReply:
    """Data of a user in the bundle, and the recent events. Events are ordered from the oldest."""

    id: str
    features: Mapping[str, Json]
    history: list[TitledEvent]
    events: int
    """Number of items seen."""
    recent_events: list[TitledEvent]


@dataclass
class MapReply:
    """Points of items; a point is x, y and the number of its group, -1 for none."""

    bundle_id: str
    columns: list[str]
    """Columns that can colour the map."""
    column: str
    groups: list[str]
    points: list[tuple[float, float, int]]
    ids: list[str]
    titles: list[str]


@dataclass
class GateReply:
    """Weights of the features of a SENet gate."""

    name: str
    fields: list[str]
    weights: list[float]


@dataclass
class FilteredReply:
    """Number of items that each filter excludes or, for `where`, leaves; and the best of those excluded."""

    seen: int
    banned: int
    where: int | None
    items: list[TitledItem]


@dataclass
class ExplainedReply:
    """An answer, with what shaped it."""

    reply: ItemsReply
    history: list[TitledEvent]
    filtered: FilteredReply
    vector_norm: float | None = None
    point: list[float] | None = None
    """Place of the user on the map."""
    gates: list[GateReply] = field(default_factory=list)


@dataclass
class StoredBundle:
    """A bundle of the store.

    `size` in bytes; `damaged` is the reason if it cannot be loaded; `context`: its allowed columns."""

    id: str
    created: str | None
    size: int
    current: bool
    recall: float | None
    damaged: str | None
    context: list[str]


@dataclass
class BundlesReply:
    """Bundles of the store, the oldest first."""

    bundles: list[StoredBundle]
