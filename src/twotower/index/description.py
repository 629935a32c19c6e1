"""Content of `index.json`, the file that describes the index of a folder."""

from __future__ import annotations

from typing import Annotated, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from twotower.index.vector_store import MAX_NORM, Metric
from twotower.section import first_problem

INDEX_FORMAT = 2
Row = Annotated[int, Field(ge=0, le=np.iinfo(np.int64).max)]


class IndexDescription(BaseModel):
    """Description of every kind of index."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    format: int
    kind: str
    metric: Metric
    n: int
    """Number of rows in the index."""
    width: int
    params: dict[str, int]
    search_params: dict[str, int]
    max_norm: float = Field(ge=0, le=MAX_NORM)
    rejected: list[Row]


class AugmentedDescription(IndexDescription):
    """Description of an index that may augment its vectors."""

    norm_bound: float = Field(ge=0, le=2 * MAX_NORM)


Description = TypeVar("Description", bound=IndexDescription)


def parse_description(kind: type[Description], facts: dict[str, JsonValue]) -> Description:
    """Return the facts in the content of an `index.json`. Raises ValueError with one line that names the field."""
    try:
        return kind.model_validate(facts)
    except ValidationError as e:
        raise ValueError(first_problem(e)) from None
