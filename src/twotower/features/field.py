"""Description of an encoded column, and the choice of its pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import to_jsonable_python

from twotower.section import Section


class PoolingSpec(Section):
    """Kind of a pooling, its window, and the options of the kind, which `twotower.model.pooling` checks.

    Reads a name, a section, or a pooling of `twotower.model.pooling`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    kind: str = Field(min_length=1, description="Kind of the pooling, or its import path module:Class.")
    window: int = Field(0, ge=0, description="Number of latest interactions to read. 0: the whole history.")

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


@dataclass(frozen=True)
class InputField:
    """Description of an encoded column, from which a tower makes its embedding."""

    name: str
    kind: str  # carrier: "lookup" of one code, "bag" of many, "dense" of numbers, or an import path
    rows: int = 0  # embedding rows of a lookup or bag
    length: int = 0  # numbers per row of a dense field
    width: int = 0  # embedding width; 0: the width of the tower
    pooling: PoolingSpec = MEAN  # of many codes
    sequence: bool = False  # True for a history, which never holds the target
    share_with: str = ""  # field of the other side that lends its embedding
    identifies: bool = False  # True for a lookup of the side's ids
    starts_at_zero: bool = False  # True if its embedding starts at zeros: untrained rows add nothing
    added_to: str = ""  # history to whose embeddings its own are added before pooling

    @property
    def limit(self) -> int:
        """Number of latest codes that the pooling reads. 0: all."""
        return self.pooling.window
