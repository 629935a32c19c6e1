"""The protocol of all kinds of indexes: options, the content of `index.json`, and the deadline of a remote search."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from twotower.arrays.types import Rows, Shaped, Vectors
from twotower.errors import DataError, RunError, Unavailable
from twotower.index.vector_store import MAX_NORM, Similarity
from twotower.kinds import Kind
from twotower.section import first_problem

if TYPE_CHECKING:
    from twotower.index.exact import Index

INDEX_FORMAT = 2
Row = Annotated[int, Field(ge=0, le=np.iinfo(np.int64).max)]
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 24)]
"""Whole number of lists, neighbours and the like."""
CONNECT_TIMEOUT = 3.0
"""Default limit for connecting to the server of a remote index. Seconds."""
_until: ContextVar[float | None] = ContextVar("until", default=None)


class IndexDescription(BaseModel):
    """Content of `index.json`, the file that describes the index of a folder."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    format: int
    kind: str
    metric: Similarity
    n: int
    """Number of rows in the index."""
    width: int
    params: dict[str, JsonValue]
    """Options that only this kind has."""
    search_params: dict[str, int]
    max_norm: float = Field(ge=0, le=MAX_NORM)
    rejected: list[Row]


class RemoteDescription(IndexDescription):
    """Content of `index.json` of an index whose vectors are in a collection of a server."""

    uri: str
    alias: str
    """Alias of the current bundle's collection on the server."""
    collection: str
    model: str
    """SHA-256 of the model that made the vectors."""


class CollectionServer(Protocol):
    """A server that holds the vectors of each remote index in a collection."""

    def drop(self, name: str) -> None:
        """Drop a collection, if it exists. Raises Unavailable."""

    def set_alias(self, alias: str, name: str) -> None:
        """Create the alias for the collection, or move it there. Raises RunError, Unavailable."""


class Publication(NamedTuple):
    """The bundle that an index is built for."""

    model: str = ""
    """SHA-256 of the model of the vectors."""
    register: Callable[[str, str, str], None] | None = None
    """Function of kind, server and name of a collection, called before a remote index creates it."""


class IndexConfig(Kind):
    """Index over the item vectors of a published model.

    The recall check leaves out the items that the answers to its users leave out."""

    min_recall: float = Field(
        0.95, gt=0, le=1,
        description="Minimum recall over held-out users, against exact search, that search parameters are tuned to and "
        "publishing accepts.",
    )  # fmt: skip
    k: int = Field(100, ge=1, description="Cut-off of min_recall.")
    queries: int = Field(
        1000,
        ge=20,
        description="Held-out users of the recall check: one half tunes the index, the other half measures it.",
    )

    remote: ClassVar[bool] = False
    """True if another process holds the vectors."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions a bundle notes, in addition to those of every bundle."""
    description_type: ClassVar[type[IndexDescription]] = IndexDescription
    """Content of `index.json`."""

    @abstractmethod
    def empty(self, width: int, metric: Similarity, publication: Publication) -> Index:
        """Return an index without vectors, for vectors of dimension `width`. Raises ConfigError, DataError."""

    def choose(self, n_items: int, metric: Similarity) -> tuple[IndexConfig, str]:
        """Return the options for a number of items, and the reason as a sentence."""
        return self, "set by index.kind"

    @property
    def label(self) -> str:
        """Name of the kind in a log."""
        return self.kind

    @property
    def params(self) -> dict[str, JsonValue]:
        """Options that only this kind has, as in `index.json` and the manifest."""
        found: dict[str, JsonValue] = self.model_dump(mode="json", exclude=set(IndexConfig.model_fields))
        del found["kind"]
        return found

    @classmethod
    def from_description(cls, known: IndexDescription) -> Self:
        """Return the options of a saved index. Raises ValueError."""
        return cls.model_validate(known.params)

    @classmethod
    def connect(cls, uri: str, timeout: float) -> CollectionServer:
        """Connect within `timeout` seconds to the server of a remote index. Raises Unavailable."""
        raise RunError(f"{uri}: index kind '{cls.kind}' has no server")

    def build(
        self, vectors: Shaped[Vectors, "*_"], rows: Shaped[Rows, "*_"], metric: Similarity,
        publication: Publication = Publication(),
    ) -> Index:  # fmt: skip
        """Build an index of vectors (N, D) under rows (N,); rows of unusable vectors are in `rejected`.

        Raises ConfigError, DataError."""
        if np.ndim(vectors) != 2:
            raise DataError(f"vectors have shape {np.shape(vectors)}, expected (N, D)")
        index = self.choose(len(vectors), metric)[0].empty(vectors.shape[1], metric, publication)
        index.fill(rows, vectors)
        return index

    @classmethod
    def load(cls, folder: Path, facts: dict[str, JsonValue], verify: bool) -> Index:
        """Load the index of a folder; `facts` is the content of its `index.json`. Raises RunError, Unavailable."""
        try:
            known = cls.description_type.model_validate(facts)
            index = cls.from_description(known).empty(known.width, known.metric, Publication())
            index.restore(folder, known)
        except ValidationError as e:
            raise RunError(f"{folder}: not a usable index ({first_problem(e)})") from None
        except (ValueError, KeyError, OverflowError, DataError) as e:
            raise RunError(f"{folder}: not a usable index ({e})") from e
        index.load_engine(folder, verify)
        return index


@contextmanager
def deadline(until: float) -> Iterator[None]:
    """Limit the remote searches of this thread in the block to end by `until`, a time of `time.monotonic`."""
    token = _until.set(until)
    try:
        yield
    finally:
        _until.reset(token)


def remaining_seconds(limit: float) -> float:
    """Return the seconds that a call may take: `limit`, or less if the deadline is nearer.

    Raises Unavailable if the deadline has passed.
    """
    until = _until.get()
    if until is None:
        return limit
    rest = until - time.monotonic()
    if rest <= 0:
        raise Unavailable("the time for the search is over")
    return min(limit, rest)
