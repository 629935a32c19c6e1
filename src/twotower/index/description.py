"""Content of `index.json`, the file that describes the index of a folder."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from twotower.index.vector_store import MAX_NORM, Similarity

INDEX_FORMAT = 2
Row = Annotated[int, Field(ge=0, le=np.iinfo(np.int64).max)]


class IndexDescription(BaseModel):
    """Description of every kind of index."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    format: int
    kind: str
    metric: Similarity
    n: int
    """Number of rows in the index."""
    width: int
    params: dict[str, JsonValue]
    """Options of the kind alone."""
    search_params: dict[str, int]
    max_norm: float = Field(ge=0, le=MAX_NORM)
    rejected: list[Row]
    norm_bound: float = Field(0.0, ge=0, le=2 * MAX_NORM)
    """Norm of every augmented vector; 0 if vectors are not augmented."""


class RemoteDescription(IndexDescription):
    """Description of an index whose vectors are in a collection of a server."""

    uri: str
    """The server."""
    alias: str
    """Name that the server gives to the collection of the current bundle."""
    collection: str
    model: str
    """SHA-256 of the model that made the vectors."""
