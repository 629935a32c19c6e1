"""Bodies and parameters of requests, which the OpenAPI document describes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, StrictBool, StrictInt
from pydantic_core import PydanticCustomError

from twotower.retrieval.request_body import (
    MAX_ID_LENGTH,
    MAX_TEXT_LENGTH,
    ColumnName,
    EventBody,
    Id,
    RequestBody,
    RequestContext,
    RequestModel,
)


def _method(value: JsonValue) -> JsonValue:
    """Return a method. Raises PydanticCustomError for true, which equals 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("literal_error", "Input should be 1 or 2")
    return value


class UserRequest(RequestBody):
    """A user: known to the bundle, or described by features and a history. These replace the stored ones."""

    method: Annotated[Literal[1, 2] | None, BeforeValidator(_method)] = Field(
        None,
        description="1: the precomputed user vector. 2: the online user tower. null: 1 if it suffices, else 2.",
    )
    use_recent_events: StrictBool = Field(
        True,
        description="Add the user's recent events (POST /v1/events) that the stored history lacks. A given history "
        "gets all of them: one that it holds counts twice.",
    )


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
    context: RequestContext = {}


class EventsRequest(RequestModel):
    """New events of a user, oldest first. They are read in the order of their times."""

    user_id: Id = Field(description="User id, known to the bundle or new.")
    events: list[EventBody] = Field(
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
