"""States of encoders: the facts of encoders.json, and the vocabularies in one Arrow IPC file, a row with a list of values
for each."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Annotated

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=2**31)]
"""Number of embedding rows, values or characters."""
VOCABULARY_TYPES = (pl.String, pl.Int64, pl.UInt64)


class EncoderState(BaseModel):
    """State of an encoder without its vocabulary."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def write_vocabularies(vocabularies: Mapping[str, pl.Series]) -> bytes:
    """Return the content of the file for vocabularies by name."""
    buffer = io.BytesIO()
    pl.DataFrame({name: [values] for name, values in vocabularies.items()}).write_ipc(buffer)
    return buffer.getvalue()


def read_vocabularies(data: bytes) -> dict[str, pl.Series]:
    """Return the vocabularies by name. Raises ValueError for values of another type, and errors of polars."""
    frame = pl.read_ipc(io.BytesIO(data))
    found: dict[str, pl.Series] = {}
    for column in frame:
        values = column[0] if frame.height == 1 and isinstance(column.dtype, pl.List) else None
        if not isinstance(values, pl.Series) or values.dtype not in VOCABULARY_TYPES or values.null_count():
            raise ValueError(
                f"column '{column.name}' of {frame.height} rows is {column.dtype}, expected one list of values"
            )
        found[column.name] = values.alias("value")
    return found
