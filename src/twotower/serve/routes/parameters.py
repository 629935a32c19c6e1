"""Parameters of paths and queries, as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from twotower.serve.schemas import MAX_ID_LENGTH

PathId = Annotated[str, Path(min_length=1, max_length=MAX_ID_LENGTH, description="Any id, percent-encoded.")]
QueryId = Annotated[str, Query(min_length=1, max_length=MAX_ID_LENGTH, description="Any id, percent-encoded.")]
ItemCount = Annotated[int, Query(description="Number of items. At most limits.k of GET /v1/bundle.")]
QueryText = Annotated[str, Query(max_length=MAX_ID_LENGTH, description="Text to find. Empty: all.")]
GroupColumn = Annotated[
    str, Query(max_length=MAX_ID_LENGTH, description="Item column that groups the points. Empty: the first.")
]
RowLimit = Annotated[int, Query(ge=1, le=200, description="Greatest number of results.")]
PointLimit = Annotated[int, Query(ge=1, le=20_000, description="Greatest number of points.")]
BundleId = Annotated[str, Query(max_length=64, description="Bundle id. Empty: the current bundle.")]
ProblemName = Annotated[str, Path(max_length=64, description="Name of the problem.")]
