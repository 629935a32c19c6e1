"""Choice of a pooling in a schema; the poolings themselves need torch and stand in `twotower.model.pooling`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import to_jsonable_python

from twotower.section import Section


class PoolingSpec(Section):
    """Kind of a pooling, by name or import path, its window, and the options of its kind, kept as given.

    A name alone stands for the kind with its defaults; a pooling of `twotower.model.pooling` stands for itself."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    kind: str = Field(min_length=1, description="Kind of the pooling, or its import path module:Class.")
    window: int = Field(
        0, ge=0, description="Number of latest interactions that the pooling reads at once. 0: the whole history."
    )

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, str):
            return {"kind": value}
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json")
        if not isinstance(value, Mapping):
            raise ValueError(f"expected the name of a pooling or a section with its kind, got {value!r:.60}")
        return to_jsonable_python(value)


MEAN = PoolingSpec(kind="mean")
