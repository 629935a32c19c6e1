"""A request in JSON: the models that HTTP, Python and tables of users share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar

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
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from twotower.errors import DataError, did_you_mean
from twotower.retrieval.event import Event, checked_event

T = TypeVar("T")
Json = str | float | None | Sequence["Json"] | Mapping[str, "Json"]
"""Parsed JSON. The value of a feature is a text, a number, or a list of texts or numbers."""
MAX_ID_LENGTH = 512
"""Characters of an id, a column name or a filter value."""
MAX_TEXT_LENGTH = 10_000
"""Characters of a text feature or of a search text."""
MAX_VECTOR_LENGTH = 65_536
"""Values of a vector or multi-hot feature."""


def _id_text(value: JsonValue) -> str:
    """Return an id as text. Raises PydanticCustomError for what is neither text nor a whole number."""
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    raise PydanticCustomError("id", "Input should be text or a whole number")


Id = Annotated[
    str,
    Field(min_length=1, max_length=MAX_ID_LENGTH),
    BeforeValidator(_id_text),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}, {"type": "integer"}]}),
]
"""An external id: text, or an integer, which is the same id as its decimal digits."""
ColumnName = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
Scalar = Annotated[StrictStr, Field(max_length=MAX_TEXT_LENGTH)] | StrictBool | StrictInt | StrictFloat | None


def _feature_value(value: JsonValue) -> JsonValue:
    """Return a value of a feature. Raises one PydanticCustomError for an invalid value; a union has one a branch."""
    found, expected = "", "text, a number, true, false, null, or a list of these"
    if isinstance(value, list) and len(value) > MAX_VECTOR_LENGTH:
        found, expected = f"a list of {len(value):,} values", f"at most {MAX_VECTOR_LENGTH:,}"
    for inner in value if isinstance(value, list) else [value]:
        if isinstance(inner, dict | list):
            found = ("an object" if isinstance(inner, dict) else "a list") + " in a list" * isinstance(value, list)
        elif isinstance(inner, float) and not math.isfinite(inner):
            found, expected = str(inner), "a finite number"
        elif isinstance(inner, str) and len(inner) > MAX_TEXT_LENGTH:
            found, expected = f"a text of {len(inner):,} characters", f"at most {MAX_TEXT_LENGTH:,}"
    if found:
        raise PydanticCustomError(
            "feature_value", "found {found}, expected {expected}", {"found": found, "expected": expected}
        )
    return value


FeatureValue = Annotated[
    Scalar | Annotated[list[Scalar], Field(max_length=MAX_VECTOR_LENGTH)], BeforeValidator(_feature_value)
]
"""A feature's value: text, number, boolean, null, or a list of these."""


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
    time: StrictFloat | None = Field(
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
MAX_SHOWN = 40
"""Characters of a wrong event that a message shows."""


def _event_branch(value: JsonValue | ItemEvent) -> str | None:
    """Return the form of an event, None for neither."""
    if isinstance(value, dict | ItemEvent):
        return EVENT_BRANCHES[1]
    return EVENT_BRANCHES[0] if isinstance(value, str) or type(value) is int else None


EventBody = Annotated[
    Annotated[Id, Tag(EVENT_BRANCHES[0])] | Annotated[ItemEvent, Tag(EVENT_BRANCHES[1])],
    Discriminator(_event_branch, custom_error_type=NO_EVENT, custom_error_message=EXPECTED_EVENT),
]

RequestContext = Annotated[
    dict[ColumnName, FeatureValue],
    Field(
        max_length=1_000,
        description="Values of the context by column (features.context of GET /v1/bundle). Columns without a default "
        "are required. A time is of the request, by default now.",
    ),
]


class RequestBody(RequestModel):
    """A user: known to the bundle, or described by features and a history. These replace the stored ones."""

    user_id: Id | None = Field(None, description="User id, known to the bundle or new. null: an anonymous user.")
    features: dict[ColumnName, FeatureValue] = Field(
        {}, max_length=1_000, description="Values of columns of the users table, by column."
    )
    history: list[EventBody] | None = Field(
        None,
        description="Items, oldest first; sorted by time if each has one. Replaces the stored history. null: the "
        "stored history.",
    )
    events: list[EventBody] = Field(
        [], description="Events after the history, oldest first; sorted by time if each has one."
    )
    context: RequestContext = {}


_BODY, _EVENTS = TypeAdapter(RequestBody), TypeAdapter(list[EventBody])


def read_body(body: Json) -> RequestBody:
    """Return the request in JSON. Raises DataError."""
    if not isinstance(body, dict):
        raise DataError('a request is a JSON object such as {"features": {"age": 25}, "history": ["1", "2"]}')
    return _validated(_BODY, body)


def read_events(name: str, given: Json) -> list[Event]:
    """Return the events of the list `name` of a request. Raises DataError."""
    events: list[str | ItemEvent] = _validated(_EVENTS, given, name)
    return item_events(events)


def item_events(given: Sequence[str | ItemEvent]) -> list[Event]:
    """Return events as a retriever takes them. Raises DataError as `checked_event` does."""
    return [checked_event(e.id, e.liked, e.event, e.time) if isinstance(e, ItemEvent) else Event(e) for e in given]


def place_of(error: ErrorDetails) -> str:
    """Return the place of a validation error in a request, such as events.0.id."""
    return ".".join(str(step) for step in error["loc"] if step not in EVENT_BRANCHES)


def message_of(error: ErrorDetails) -> str:
    """Return the message of a validation error."""
    if error["type"] == NO_EVENT:
        given = json.dumps(error["input"], ensure_ascii=False, default=str)
        return f"found {given[:MAX_SHOWN]}{'…' if len(given) > MAX_SHOWN else ''}, {error['msg']}"
    return str(error["msg"])


def _validated(form: TypeAdapter[T], given: Json, *within: str) -> T:
    """Return a value of a form, at a place `within` a request. Raises DataError."""
    try:
        return form.validate_python(given)
    except ValidationError as e:
        first, known = e.errors()[0], RequestBody.model_fields
    place, message = ".".join([*within, *filter(None, [place_of(first)])]), message_of(first)
    if first["type"] == "extra_forbidden" and place.isidentifier():
        raise DataError(f"request: unknown key '{place}'{did_you_mean(place, known)} (allowed: {', '.join(known)})")
    shown = "" if message.startswith("found ") else f", got {first['input']!r:.80}"
    raise DataError(f"request: {place}: {message[:1].lower()}{message[1:]}{shown}")
