"""Base of the states of encoders, the facts of encoders.json."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=2**31)]
"""Number of embedding rows, values or characters."""


class EncoderState(BaseModel):
    """State of an encoder without its vocabulary."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
