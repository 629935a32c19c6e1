"""What travels: bodies, replies and problems. The OpenAPI document is made of these classes."""

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

MAX_ID_LENGTH = 512
"""Characters of an id, a column's name or a filter's value."""
MAX_TEXT_LENGTH = 10_000
"""Characters of a text feature or of a text that is searched."""
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
"""An external id: text, or a whole number, which is the same id as its digits."""
ColumnName = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
Scalar = Annotated[StrictStr, Field(max_length=MAX_TEXT_LENGTH)] | StrictBool | StrictInt | StrictFloat | None
FeatureValue = Scalar | Annotated[list[Scalar], Field(max_length=MAX_VECTOR_LENGTH)]
"""A feature's value: text, number, boolean, null, or a list of them."""


class _RequestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class ItemEvent(_RequestModel):
    """Something that happened with an item."""

    id: Id
    liked: StrictBool = True


EventInput = Id | ItemEvent
Source = Literal["model", "cold_start", "popular", "fallback"]


class UserRequest(_RequestModel):
    """Who asks. A known user, or features and a history that are told, or both; told ones replace the stored."""

    user_id: Id | None = Field(None, description="a user of the bundle, or somebody new")
    features: dict[ColumnName, FeatureValue] = Field(
        {}, max_length=1_000, description="columns of the users table and their values"
    )
    history: list[EventInput] | None = Field(None, description="items, oldest first; replaces the stored history")
    events: list[EventInput] = Field([], description="what has happened since, oldest first")
    method: Literal[1, 2] | None = Field(
        None,
        description="1: the stored user vector; 2: the user tower live. Left out: 2 if the request or the live history "
        "tells something new, else 1",
    )
    use_recent_events: StrictBool = Field(True, description="go on with the user's live history (POST /v1/events)")


class ItemFilter(_RequestModel):
    """For how many, and which items may be answered."""

    k: StrictInt = Field(10, ge=1, description="how many; the service has a limit (GET /v1/bundle)")
    allow: list[Id] | None = Field(None, description="only these items")
    ban: list[Id] = Field([], description="none of these items")
    where: dict[ColumnName, Annotated[str, Field(max_length=MAX_ID_LENGTH)]] = Field(
        {}, max_length=20, description="only items whose column equals the value, or holds it"
    )


class RecommendRequest(UserRequest, ItemFilter):
    """Who asks, for how many, and which items may be answered."""

    keep_seen: StrictBool = Field(False, description="do not leave out what the user has met")


class BatchRequest(_RequestModel):
    """Several requests, answered one by one between other clients' requests."""

    requests: list[RecommendRequest] = Field(min_length=1)


class SearchRequest(ItemFilter):
    """A text, by the user tower live; needs a bundle whose users have a text feature."""

    text: str = Field(max_length=MAX_TEXT_LENGTH)
    feature: Annotated[str, Field(max_length=MAX_ID_LENGTH)] = Field("", description="which text feature, if several")


class EventsRequest(_RequestModel):
    """What a user has done just now, oldest first."""

    user_id: Id
    events: list[EventInput] = Field(min_length=1)


class RollbackRequest(_RequestModel):
    """Which bundle becomes current again: the one before, if none is named."""

    to: Annotated[str, Field(max_length=64)] = ""
    reason: Annotated[str, Field(max_length=1_000)] = ""


class ScoredItem(BaseModel):
    """An item, its score (the logit; for similar items a cosine), and the line to show."""

    id: str
    score: float
    title: str


class ItemsReply(BaseModel):
    """The best items, and who says so."""

    items: list[ScoredItem]
    bundle_id: str
    method: int
    source: Source = Field(
        description="model: a known user, or a text; cold_start: an unknown one by what the request tells; popular: nothing is known; "
        "fallback: popular items, because the index does not answer"
    )
    milliseconds: float
    truncated: bool = Field(description="fewer than k were left to give")
    unknown: list[str] = Field(description="features and items of the request that the model has never met")
    recent_events: int = Field(description="live events that were used")


class ProblemReply(BaseModel):
    """An error as RFC 9457 shapes it (application/problem+json)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = Field("", description="the id of the request, as in the header X-Request-ID")
    errors: list[dict[str, str]] | None = Field(None, description="where in the body, and what")


class BatchReply(BaseModel):
    """A reply or a problem for each request, in their order."""

    replies: list[ItemsReply | ProblemReply]


class VectorReply(BaseModel):
    """A user's vector; its dot product with an item's vector is the score."""

    vector: list[float]
    metric: Literal["cosine", "dot"]
    bundle_id: str
    method: int
    source: Source = Field(
        description="as in a reply; popular: the tower's vector of somebody of whom nothing is known"
    )
    milliseconds: float
    unknown: list[str]
    recent_events: int


class EventsReply(BaseModel):
    """How many live events are kept of the user, and whether other workers and hosts see them."""

    recent_events: int
    shared: bool


class BundleReply(BaseModel):
    """What answers, and what may be asked."""

    bundle_id: str
    created: str
    dims: int
    metric: Literal["cosine", "dot"]
    counts: dict[str, int]
    recall_check: dict[str, Any] = Field(description="the recall of the index against exact search, and the threshold")
    index: dict[str, Any]
    features: dict[str, list[str]] = Field(description="user: what a request may tell; item: what `where` may name")
    history: bool = Field(description="whether the user tower reads a history")
    search: list[str] = Field(description="text features that /v1/search reads")
    limits: dict[str, int]


class HealthReply(BaseModel):
    """`ok`, or why not."""

    status: str
    bundle_id: str | None = None


def item_events(told: list[Any] | None) -> list[tuple[str, bool]]:
    """As the retriever takes them: item ids, and whether the user liked each."""
    return [(e.id, e.liked) if isinstance(e, ItemEvent) else (e, True) for e in told or ()]
