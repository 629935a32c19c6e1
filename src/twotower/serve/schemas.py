"""Bodies of requests and replies. The OpenAPI document is generated from these classes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)

from twotower.retrieval.request import Source

MAX_ID_LENGTH = 512
"""Characters of an id, a column name or a filter value."""
MAX_TEXT_LENGTH = 10_000
"""Characters of a text feature or of a search text."""
MAX_VECTOR_LENGTH = 65_536
"""Values of a vector or multi-hot feature."""
RENAMED_FIELDS = {"live": "use_recent_events"}
"""Fields of requests: former name -> present name."""


def _id_text(value: object) -> object:
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
FeatureValue = Scalar | Annotated[list[Scalar], Field(max_length=MAX_VECTOR_LENGTH)]
"""A feature's value: text, number, boolean, null, or a list of these."""


class _RequestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class ItemEvent(_RequestModel):
    """An event of a user: an item, liked or not."""

    id: Id = Field(description="Item id.")
    liked: StrictBool = Field(True, description="false: an explicit negative.")


EventInput = Id | ItemEvent


class UserRequest(_RequestModel):
    """A user: known to the bundle, or described by features and a history. What the request gives replaces what the bundle
    has stored."""

    user_id: Id | None = Field(None, description="User id, known to the bundle or new. null: an anonymous user.")
    features: dict[ColumnName, FeatureValue] = Field(
        {}, max_length=1_000, description="Values of columns of the users table, by column."
    )
    history: list[EventInput] | None = Field(
        None, description="Items, oldest first; replaces the stored history. null: the stored history."
    )
    events: list[EventInput] = Field([], description="Events after the history, oldest first.")
    method: Literal[1, 2] | None = Field(
        None,
        description="1: the precomputed user vector. 2: the online user tower. null: 2 if the request or the recent events "
        "add something, else 1.",
    )
    use_recent_events: StrictBool = Field(
        True, description="Append the user's recent events (POST /v1/events) to the history."
    )


class ItemFilter(_RequestModel):
    """The number of items, and conditions on them."""

    k: StrictInt = Field(10, ge=1, description="Number of items. At most limits.k of GET /v1/bundle.")
    allow: list[Id] | None = Field(None, description="Only these items. null: every item.")
    ban: list[Id] = Field([], description="None of these items.")
    where: dict[ColumnName, Annotated[str, Field(max_length=MAX_ID_LENGTH)]] = Field(
        {},
        max_length=20,
        description="Only items whose column equals the value, or contains it (multi-hot), by column.",
    )


class RecommendRequest(UserRequest, ItemFilter):
    """A user, the number of items, and conditions on them."""

    keep_seen: StrictBool = Field(False, description="Do not exclude the items of the user's history.")


class BatchRequest(_RequestModel):
    """Several requests, answered one by one between other clients' requests."""

    requests: list[RecommendRequest] = Field(min_length=1, description="At most limits.batch of GET /v1/bundle.")


class SearchRequest(ItemFilter):
    """A text, embedded by the online user tower. Needs a bundle whose users have a text feature."""

    text: str = Field(max_length=MAX_TEXT_LENGTH, description="Search text.")
    feature: Annotated[str, Field(max_length=MAX_ID_LENGTH)] = Field(
        "", description="Name of the text feature. Empty: the only one."
    )


class EventsRequest(_RequestModel):
    """New events of a user, oldest first."""

    user_id: Id = Field(description="User id, known to the bundle or new.")
    events: list[EventInput] = Field(min_length=1, description="Item ids, or objects with id and liked.")


class RollbackRequest(_RequestModel):
    """The bundle that becomes current."""

    to: Annotated[str, Field(max_length=64)] = Field("", description="Bundle id. Empty: the previous bundle.")
    reason: Annotated[str, Field(max_length=1_000)] = Field("", description="Text for the store's history.")


class ScoredItem(BaseModel):
    """An item of an answer."""

    id: str = Field(description="Item id.")
    score: float = Field(description="The model's logit; for similar items the cosine.")
    title: str = Field(description="Title of the item, or its id.")


class ItemsReply(BaseModel):
    """Items, best first, and how they were found."""

    items: list[ScoredItem] = Field(description="At most k items, best first.")
    bundle_id: str = Field(description="Bundle that answered.")
    method: int = Field(description="1: the precomputed user vector. 2: the online user tower.")
    source: Source = Field(
        description="model: a known user, or a text. cold_start: an unknown user, by the features and items of the request. "
        "popular: nothing is known of the user. fallback: popular items, because the index does not answer."
    )
    milliseconds: float = Field(description="Time of tower and search.")
    truncated: bool = Field(description="Fewer than k items pass the conditions.")
    unknown: list[str] = Field(description="Features and items of the request whose values are unknown to the model.")
    recent_events: int = Field(description="Number of recent events that were used.")


class ProblemReply(BaseModel):
    """An error (RFC 9457, application/problem+json)."""

    type: str = Field(description="/problems/NAME, a page that explains the error.")
    title: str = Field(description="Short text, the same for every error of the type.")
    status: int = Field(description="HTTP status.")
    detail: str = Field(description="Cause of this error and remedy.")
    instance: str = Field("", description="Id of the request, as in the header X-Request-ID.")
    errors: list[dict[str, str]] | None = Field(
        None, description="Invalid fields: `at`, the place in the request, and `detail`."
    )


class BatchReply(BaseModel):
    """A reply or a problem for each request, in the order of the requests."""

    replies: list[ItemsReply | ProblemReply] = Field(description="One for each request.")


class VectorReply(BaseModel):
    """A user vector. Its dot product with an item vector is the score."""

    vector: list[float] = Field(description="D numbers, as the index is searched with.")
    metric: Literal["cosine", "dot"] = Field(description="Metric of the index.")
    bundle_id: str = Field(description="Bundle that answered.")
    method: int = Field(description="1: the precomputed user vector. 2: the online user tower.")
    source: Source = Field(
        description="As in ItemsReply. popular: the tower's vector of a user of whom nothing is known."
    )
    milliseconds: float = Field(description="Time of the tower.")
    unknown: list[str] = Field(description="Features and items of the request whose values are unknown to the model.")
    recent_events: int = Field(description="Number of recent events that were used.")


class EventsReply(BaseModel):
    """The state of a user's recent events."""

    recent_events: int = Field(description="Number of recent events kept of the user.")
    shared: bool = Field(description="true: other workers and hosts read them (Redis).")


class BundleReply(BaseModel):
    """The current bundle, and the limits of requests."""

    bundle_id: str = Field(description="Id of the current bundle.")
    created: str = Field(description="Time of publication, UTC.")
    dims: int = Field(description="Width of the vectors.")
    metric: Literal["cosine", "dot"] = Field(description="Metric of the index.")
    counts: dict[str, int] = Field(description="Number of users and items.")
    recall_check: dict[str, Any] = Field(
        description="Recall of the index against exact search at publication, and the threshold."
    )
    index: dict[str, Any] = Field(description="Kind and parameters of the index.")
    features: dict[str, list[str]] = Field(
        description="user: columns allowed in `features`. item: columns allowed in `where`."
    )
    history: bool = Field(description="true: the user tower reads a history.")
    search: list[str] = Field(description="Text features for /v1/search.")
    limits: dict[str, int] = Field(
        description="k; list: entries of a list; batch: requests of a batch; body: bytes of a body."
    )


class HealthReply(BaseModel):
    """The state of the process."""

    status: str = Field(description="ok.")
    bundle_id: str | None = Field(None, description="Current bundle. null: none is loaded.")


def item_events(events: list[Any] | None) -> list[tuple[str, bool]]:
    """Return events as the retriever takes them: (item id, liked)."""
    return [(e.id, e.liked) if isinstance(e, ItemEvent) else (e, True) for e in events or ()]
