"""Replies, which the OpenAPI document describes. They are not validated: orjson writes them as they are."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import cleandoc
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, with_config

from twotower.retrieval.request import Item, Source
from twotower.serve.problems import ProblemObject

T = TypeVar("T")


@dataclass_transform()
def _reply(cls: type[T]) -> type[T]:
    """Make a dataclass whose docstring is its description in the OpenAPI document. Replies are not validated."""
    described = ConfigDict(json_schema_extra={"description": cleandoc(cls.__doc__ or "")})
    return with_config(described)(dataclass(cls))


class ScoredItem(BaseModel):
    """An item of an answer."""

    id: str = Field(description="Item id.")
    score: float = Field(description="The model's logit; for similar items the cosine.")
    title: str = Field(description="Title of the item, or its id.")


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


_ScoredItem = Annotated[Item, GetPydanticSchema(lambda _, handler: handler(ScoredItem))]
_ProblemObject = Annotated[ProblemObject, GetPydanticSchema(lambda _, handler: handler(ProblemReply))]


_Bundle = Annotated[str, Field(description="Bundle that answered.")]
_Method = Annotated[int, Field(description="1: the precomputed user vector. 2: the online user tower.")]
_Metric = Annotated[Literal["cosine", "dot"], Field(description="Metric of the index.")]
_Unknown = Annotated[
    list[str], Field(description="Features and items of the request whose values are unknown to the model.")
]
_RecentEvents = Annotated[int, Field(description="Number of recent events that were used.")]


@_reply
class ItemsReply:
    """Items, best first, and how they were found."""

    items: Annotated[list[_ScoredItem], Field(description="At most k items, best first.")]
    bundle_id: _Bundle
    method: _Method
    source: Annotated[
        Source,
        Field(
            description="model: a known user, or a text. cold_start: an unknown user, by features and items of the "
            "request. popular: nothing is known. fallback: the index does not answer."
        ),
    ]
    milliseconds: Annotated[float, Field(description="Time of tower and search.")]
    truncated: Annotated[bool, Field(description="Fewer than k items pass the conditions.")]
    unknown: _Unknown
    recent_events: _RecentEvents


@_reply
class BatchReply:
    """A reply or a problem for each request, in the order of the requests."""

    replies: Annotated[list[ItemsReply | _ProblemObject], Field(description="One for each request.")]


@_reply
class VectorReply:
    """A user vector. Its dot product with an item vector is the score, without own counts (scorer 'repeats')."""

    vector: Annotated[list[float], Field(description="D numbers, as the index is searched with.")]
    metric: _Metric
    bundle_id: _Bundle
    method: _Method
    source: Annotated[
        Source, Field(description="As in ItemsReply. popular: the tower's vector of a user of whom nothing is known.")
    ]
    milliseconds: Annotated[float, Field(description="Time of the tower.")]
    unknown: _Unknown
    recent_events: _RecentEvents


@_reply
class EventsReply:
    """The state of a user's recent events."""

    recent_events: Annotated[int, Field(description="Number of recent events kept of the user.")]
    shared: Annotated[bool, Field(description="true: other workers and hosts read them (Redis).")]


@_reply
class BundleReply:
    """The current bundle, and the limits of requests."""

    bundle_id: Annotated[str, Field(description="Id of the current bundle.")]
    created: Annotated[str, Field(description="Time of publication, UTC.")]
    dims: Annotated[int, Field(description="Width of the vectors.")]
    metric: _Metric
    counts: Annotated[dict[str, int], Field(description="Number of users and items.")]
    recall_check: Annotated[
        dict[str, Any], Field(description="Recall of the index against exact search at publication, and the threshold.")
    ]
    index: Annotated[dict[str, Any], Field(description="Kind and parameters of the index.")]
    features: Annotated[
        dict[str, list[str]],
        Field(description="Allowed columns. user: in `features`. item: in `where`. context: in `context`."),
    ]
    context: Annotated[
        dict[str, Any],
        Field(description="Value of each column of the context: its default, else an example. null: a time."),
    ]
    methods: Annotated[
        list[int], Field(description="Methods of the bundle. Without 1 there are no precomputed user vectors.")
    ]
    history: Annotated[bool, Field(description="true: the user tower reads a history.")]
    events: Annotated[list[str], Field(description="Types of events that the log has. Empty: it has none.")]
    keep_seen: Annotated[
        bool,
        Field(description="true: answers hold items of the user's history, unless a request says keep_seen false."),
    ]
    search: Annotated[list[str], Field(description="Text features for /v1/search.")]
    limits: Annotated[
        dict[str, int],
        Field(description="k; list: entries of a list; batch: requests of a batch; body: bytes of a body."),
    ]


@_reply
class HealthReply:
    """The state of the process."""

    status: Annotated[str, Field(description="ok.")]
    bundle_id: Annotated[str | None, Field(description="Current bundle. null: none is loaded.")] = None
    store: Annotated[
        str,
        Field(
            description="answers; or silent, if the store does not say which bundle is current: the loaded one stays."
        ),
    ] = "answers"
