"""Bodies and parameters of requests, which the OpenAPI document describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from twotower.retrieval.event import Event, checked_event
from twotower.retrieval.request import Request

MAX_ID_LENGTH = 512
"""Characters of an id, a column name or a filter value."""
MAX_TEXT_LENGTH = 10_000
"""Characters of a text feature or of a search text."""
MAX_VECTOR_LENGTH = 65_536
"""Values of a vector or multi-hot feature."""


def _id_text(value: JsonValue) -> JsonValue:
    return str(value) if type(value) is int else value


Id = Annotated[
    str,
    Field(min_length=1, max_length=MAX_ID_LENGTH),
    BeforeValidator(_id_text),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}, {"type": "integer"}]}),
]
"""An external id: text, or an integer, which is the same id as its decimal digits."""
ColumnName = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
Scalar = Annotated[StrictStr, Field(max_length=MAX_TEXT_LENGTH)] | StrictBool | StrictInt | StrictFloat | None
CONTEXT = (
    "Values of the context by column (features.context of GET /v1/bundle). Columns without a default are required. "
    "A time is of the request, by default now."
)


def _feature_value(value: JsonValue) -> JsonValue:
    """Return a value of a feature. Raises one PydanticCustomError for an invalid value; a union has one a branch."""
    for inner in value if isinstance(value, list) else [value]:
        if isinstance(inner, dict | list):
            found = "an object" if isinstance(inner, dict) else "a list"
            within = " in a list" if isinstance(value, list) else ""
            raise PydanticCustomError(
                "feature_value",
                "found {found}, expected text, a number, true, false, null, or a list of these",
                {"found": found + within},
            )
    return value


FeatureValue = Annotated[
    Scalar | Annotated[list[Scalar], Field(max_length=MAX_VECTOR_LENGTH)], BeforeValidator(_feature_value)
]
"""A feature's value: text, number, boolean, null, or a list of these."""


def _method(value: JsonValue) -> JsonValue:
    """Return a method. Raises PydanticCustomError for true, which equals 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("literal_error", "Input should be 1 or 2")
    return value


class RequestModel(BaseModel):
    """A body, or a part of one."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class ItemEvent(RequestModel):
    """An event of a user: an item, liked or not, and its type and time where the model reads them."""

    id: Id = Field(description="Item id.")
    liked: StrictBool | None = Field(None, description="false: an explicit negative. null: true, or as the type says.")
    event: Id | None = Field(
        None,
        description="Type of the event, from events of GET /v1/bundle, in place of liked. Ignored types count for "
        "nothing. null: unknown.",
    )
    time: StrictInt | StrictFloat | None = Field(
        None, description="Seconds since 1970. null: the time of the call for POST /v1/events, else unknown."
    )


EVENT_BRANCHES = ("item id", "event object")
"""Forms of an event, which pydantic names in the place of an error."""
NO_EVENT = "no_event"
"""Type of the error of an event in neither form."""
EXPECTED_EVENT = (
    "expected an item id (text or a whole number), or an object with id and, where the model reads them, liked or "
    "event, and time"
)


def _event_branch(value: JsonValue | ItemEvent) -> str | None:
    """Return the form of an event, None for neither."""
    if isinstance(value, dict | ItemEvent):
        return EVENT_BRANCHES[1]
    return EVENT_BRANCHES[0] if isinstance(value, str) or type(value) is int else None


EventInput = Annotated[
    Annotated[Id, Tag(EVENT_BRANCHES[0])] | Annotated[ItemEvent, Tag(EVENT_BRANCHES[1])],
    Discriminator(_event_branch, custom_error_type=NO_EVENT, custom_error_message=EXPECTED_EVENT),
]


class UserRequest(RequestModel):
    """A user: known to the bundle, or described by features and a history. These replace the stored ones."""

    user_id: Id | None = Field(None, description="User id, known to the bundle or new. null: an anonymous user.")
    features: dict[ColumnName, FeatureValue] = Field(
        {}, max_length=1_000, description="Values of columns of the users table, by column."
    )
    history: list[EventInput] | None = Field(
        None,
        description="Items, oldest first; sorted by time if each has one. Replaces the stored history. null: the "
        "stored history.",
    )
    events: list[EventInput] = Field(
        [], description="Events after the history, oldest first; sorted by time if each has one."
    )
    context: dict[ColumnName, FeatureValue] = Field({}, max_length=1_000, description=CONTEXT)
    method: Annotated[Literal[1, 2] | None, BeforeValidator(_method)] = Field(
        None,
        description="1: the precomputed user vector. 2: the online user tower. null: 1 if it suffices, else 2.",
    )
    use_recent_events: StrictBool = Field(
        True,
        description="Add the user's recent events (POST /v1/events) that the stored history lacks.",
    )

    def request(self) -> Request:
        """Return the request for a retriever. Raises DataError for an event with a type and `liked`, or an implausible
        time."""
        history = self.history or []
        read = item_events([*history, *self.events])
        told = None if self.history is None else read[: len(history)]
        return Request(self.user_id, self.features, told, read[len(history) :], self.context)


class ItemFilter(RequestModel):
    """The number of items, and conditions on them."""

    k: StrictInt = Field(10, ge=1, description="Number of items. At most limits.k of GET /v1/bundle.")
    allow: list[Id] | None = Field(None, description="Only these items. null: every item.")
    ban: list[Id] = Field([], description="None of these items.")
    where: dict[ColumnName, Annotated[str, Field(max_length=MAX_ID_LENGTH)]] = Field(
        {},
        max_length=20,
        description="Only items whose column equals the value, or contains it (multi-hot), by column. Dates and times: "
        "ISO 8601, UTC without a zone.",
    )


class RecommendRequest(UserRequest, ItemFilter):
    """A user, the number of items, and conditions on them."""

    keep_seen: StrictBool | None = Field(
        None,
        description="false: exclude the items of the user's history. true: keep them. null: keep_seen of "
        "GET /v1/bundle.",
    )


class BatchRequest(RequestModel):
    """Several requests, answered one by one between other clients' requests."""

    requests: list[RecommendRequest] = Field(min_length=1, description="At most limits.batch of GET /v1/bundle.")


class SearchRequest(ItemFilter):
    """A text, embedded by the online user tower. Needs a bundle whose user tower has a text feature."""

    text: str = Field(max_length=MAX_TEXT_LENGTH, description="Search text.")
    feature: Annotated[str, Field(max_length=MAX_ID_LENGTH)] = Field(
        "", description="Name of the text feature. Empty: the only one."
    )
    context: dict[ColumnName, FeatureValue] = Field({}, max_length=1_000, description=CONTEXT)


class EventsRequest(RequestModel):
    """New events of a user, oldest first. They are read in the order of their times."""

    user_id: Id = Field(description="User id, known to the bundle or new.")
    events: list[EventInput] = Field(
        min_length=1, description="Item ids, or objects with id and liked, or with id, event and time."
    )


class RollbackRequest(RequestModel):
    """The bundle that becomes current."""

    to: Annotated[str, Field(max_length=64)] = Field("", description="Bundle id. Empty: the previous bundle.")
    reason: Annotated[str, Field(max_length=1_000)] = Field("", description="Text for the store's history.")


PathOrQueryId = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH, description="Any id, percent-encoded.")]
ItemCount = Annotated[int, Field(description="Number of items. At most limits.k of GET /v1/bundle.")]
QueryText = Annotated[str, Field(max_length=MAX_ID_LENGTH, description="Text to find. Empty: all.")]
GroupColumn = Annotated[
    str, Field(max_length=MAX_ID_LENGTH, description="Item column that groups the points. Empty: the first.")
]
RowLimit = Annotated[int, Field(ge=1, le=200, description="Greatest number of results.")]
PointLimit = Annotated[int, Field(ge=1, le=20_000, description="Greatest number of points.")]
BundleId = Annotated[str, Field(max_length=64, description="Bundle id. Empty: the current bundle.")]


def item_events(events: Sequence[str | ItemEvent]) -> list[Event]:
    """Return events as the retriever takes them. Raises DataError as `checked_event` does."""
    return [checked_event(e.id, e.liked, e.event, e.time) if isinstance(e, ItemEvent) else Event(e) for e in events]
