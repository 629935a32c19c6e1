"""Encoder of precomputed vectors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import JsonValue

from twotower.arrays.types import Floats
from twotower.errors import DataError
from twotower.features.state import Count, EncoderState


class VectorState(EncoderState):
    """State of a `VectorEncoder`."""

    length: Count
    scale: float


class VectorEncoder:
    """Encoder of vectors as floats (n, length), divided by the root mean square of the training vectors' entries.

    Missing vectors and non-finite numbers become zeros."""

    def __init__(self, length: int, scale: float) -> None:
        self.length, self.scale = length, scale

    @classmethod
    def fit(cls, series: pl.Series, used: npt.NDArray[np.bool_], length: int) -> VectorEncoder:
        if not length:
            length = int(_as_lists(series).list.len().drop_nulls().max() or 0)  # type: ignore[arg-type]
        if not length:
            raise DataError(f"column '{series.name}': every vector is missing or empty; drop the feature")
        numbers = cls(length, 1.0).transform(series)[used]
        present = numbers[(numbers != 0).any(1)].astype(np.float64)
        scale = float(np.sqrt((present**2).mean())) if len(present) else 1.0
        return cls(length, scale)

    def transform(self, series: pl.Series) -> Floats:
        lists = _as_lists(series)
        lengths = lists.list.len().to_numpy().astype(float)
        wrong = np.flatnonzero(~np.isnan(lengths) & (lengths != self.length))
        if len(wrong):
            raise DataError(
                f"column '{series.name}': {len(wrong)} vectors of unequal length, the first in row {wrong[0]} with "
                f"{int(lengths[wrong[0]])} numbers, expected {self.length}; pad or drop them"
            )
        out = np.zeros((len(series), self.length), np.float32)
        present = ~np.isnan(lengths)
        flat = lists.drop_nulls().explode().cast(pl.Float32).fill_null(0.0).to_numpy()
        out[present] = flat.reshape(-1, self.length)
        out[~np.isfinite(out)] = 0.0
        return out / np.float32(self.scale)

    def state(self) -> VectorState:
        return VectorState(length=self.length, scale=self.scale)

    @classmethod
    def restore(cls, state: JsonValue) -> VectorEncoder:
        found = VectorState.model_validate(state)
        return cls(found.length, found.scale)


def _as_lists(series: pl.Series) -> pl.Series:
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if series.dtype in (pl.Null, pl.List(pl.Null)):
        series = series.cast(pl.List(pl.Float64))
    if not (isinstance(series.dtype, pl.List) and series.dtype.inner.is_numeric()):
        raise DataError(
            f"column '{series.name}': found {series.dtype}, expected lists of numbers; "
            "convert it, or choose another kind of feature"
        )
    return series
